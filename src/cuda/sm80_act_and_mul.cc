// Host side of the portable kernels of gated activations: which problems they serve, how they are specialised, their
// parameters and their launch. What they compute and how: device/sm80_act_and_mul.cuh.
#include "cuda/sm80_act_and_mul.h"

#include <array>
#include <cstdint>

#include "cuda/attention_host.h"
#include "cuda/row_host.h"
#include "cuda/sm80_act_and_mul_spec.h"

namespace heed::cuda {
namespace {

using Params = Sm80ActAndMulParams;

Gate gate_of(Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return Gate::kSilu;
    case Activation::kGelu:
      return Gate::kGelu;
    case Activation::kGeluTanh:
      return Gate::kGeluTanh;
  }
  return Gate::kSilu;
}

Sm80ActAndMulSpec make_spec(const ActAndMulProblem& problem, bool is_aligned) {
  Sm80ActAndMulSpec spec;
  spec.element = element_of(problem.dtype);
  spec.gate = gate_of(problem.activation);
  spec.is_aligned = is_aligned;
  spec.is_backward = problem.is_backward;
  return spec;
}

KernelSpec to_kernel_spec(const Sm80ActAndMulSpec& spec) {
  constexpr std::string_view kGates[] = {"Gate::kSilu", "Gate::kGelu", "Gate::kGeluTanh"};
  return {"sm80_act_and_mul", InstanceText("Sm80ActAndMul", "Sm80ActAndMulSpec", spec.element)
                                  .word("gate", kGates[static_cast<int>(spec.gate)])
                                  .flag("is_aligned", spec.is_aligned)
                                  .flag("is_backward", spec.is_backward)
                                  .str()};
}

// Whether row-major operands start both halves of every row at multiples of 16 bytes. The kernel that uses it numbers
// chunks in 32 bits.
bool is_aligned_when_packed(const ActAndMulProblem& problem) {
  return fills_chunks(problem.hidden, problem.dtype) &&
         problem.num_rows * problem.hidden / chunk_width(element_of(problem.dtype), true) <= kMaxGridBlocks;
}

struct Prepared {
  std::array<Variant, 2> variants;  // unaligned, aligned
};

std::string declines(const ActAndMulProblem& problem, const Target& target) {
  if (std::string reason = gpu_declines(target); !reason.empty()) return reason;
  if (problem.num_rows > kMaxGridBlocks || problem.hidden > kMaxGridBlocks) {
    return "counts rows and their elements up to 2^31 - 1, and this call has more";
  }
  const int block = sm80_act_and_mul_tile(make_spec(problem, false)).chunks_per_block();
  if (static_cast<double>(problem.num_rows) * static_cast<double>(problem.hidden) / block >
      static_cast<double>(kMaxGridBlocks - 1)) {
    return "launches up to 2^31 - 1 blocks of " + std::to_string(block) + " elements, and this call needs more";
  }
  return "";
}

std::shared_ptr<void> prepare(const ActAndMulProblem& problem) {
  auto prepared = std::make_shared<Prepared>();
  for (const bool is_aligned : {false, true}) {
    prepared->variants[is_aligned ? 1 : 0].spec = to_kernel_spec(make_spec(problem, is_aligned));
  }
  return prepared;
}

// `result`: out, or dx. `dout` may be undefined.
Sm80ActAndMulPlan make_plan(const ActAndMulProblem& problem, const TensorView& x, const TensorView& dout,
                            const TensorView& result) {
  Sm80ActAndMulPlan plan{};
  if (problem.num_rows == 0) return plan;
  Params& params = plan.params;
  params.x = x.data;
  params.dout = dout.data;
  params.result = result.data;
  const std::array<const TensorView*, Params::kNumOperands> operands = {&x, &dout, &result};
  for (int i = 0; i < Params::kNumOperands; ++i) {
    if (operands[i]->defined()) params.element_strides[i] = operands[i]->strides[operands[i]->rank - 1];
  }
  params.rows = merged_axes<Params::kNumOperands>(problem.lead, 0, operands);
  params.hidden = problem.hidden;
  plan.spec =
      make_spec(problem, is_aligned_when_packed(problem) && is_aligned(x) && is_aligned(dout) && is_aligned(result));
  const int64_t chunks_per_row = problem.hidden / chunk_width(plan.spec.element, plan.spec.is_aligned);
  params.chunks_per_row = make_divisor(static_cast<unsigned>(chunks_per_row));
  const int64_t num_chunks = problem.num_rows * chunks_per_row;
  params.num_chunks = static_cast<unsigned long long>(num_chunks);
  const int64_t block = sm80_act_and_mul_tile(plan.spec).chunks_per_block();
  plan.num_blocks = (num_chunks + block - 1) / block;
  return plan;
}

void run(const Sm80ActAndMulPlan& plan, int device, void* stream, void* prepared) {
  Variant& variant = static_cast<Prepared*>(prepared)->variants[plan.spec.is_aligned ? 1 : 0];
  launch_overlapping(variant, device, plan.num_blocks, stream, &plan.params);
}

void load_packed(const ActAndMulProblem& problem, void* prepared, int device) {
  static_cast<Prepared*>(prepared)->variants[is_aligned_when_packed(problem) ? 1 : 0].load_on(device);
}

}  // namespace

std::string sm80_act_and_mul_declines(const ActAndMulProblem& problem, const Target& target) {
  return declines(problem, target);
}
std::string sm80_act_and_mul_bwd_declines(const ActAndMulProblem& problem, const Target& target) {
  return declines(problem, target);
}

std::shared_ptr<void> prepare_sm80_act_and_mul(const ActAndMulProblem& problem) { return prepare(problem); }
std::shared_ptr<void> prepare_sm80_act_and_mul_bwd(const ActAndMulProblem& problem) { return prepare(problem); }

void load_sm80_act_and_mul(const ActAndMulProblem& problem, void* prepared, int device) {
  load_packed(problem, prepared, device);
}
void load_sm80_act_and_mul_bwd(const ActAndMulProblem& problem, void* prepared, int device) {
  load_packed(problem, prepared, device);
}

Sm80ActAndMulPlan plan_sm80_act_and_mul(const ActAndMulProblem& problem, const ActAndMulArgs& args) {
  return make_plan(problem, args.x, TensorView{}, args.out);
}
Sm80ActAndMulPlan plan_sm80_act_and_mul_bwd(const ActAndMulProblem& problem, const ActAndMulBackwardArgs& args) {
  return make_plan(problem, args.x, args.dout, args.dx);
}

void sm80_act_and_mul(const ActAndMulProblem& problem, const ActAndMulArgs& args, void* prepared) {
  run(plan_sm80_act_and_mul(problem, args), args.x.device.index, args.stream, prepared);
}
void sm80_act_and_mul_bwd(const ActAndMulProblem& problem, const ActAndMulBackwardArgs& args, void* prepared) {
  run(plan_sm80_act_and_mul_bwd(problem, args), args.x.device.index, args.stream, prepared);
}

std::vector<KernelSpec> sm80_act_and_mul_common_specs() {
  std::vector<KernelSpec> specs;
  const auto add = [&](Element element, Gate gate) {
    for (const bool is_backward : {false, true}) {
      specs.push_back(to_kernel_spec({.element = element, .gate = gate, .is_backward = is_backward}));
    }
  };
  for (const Element element : {Element::kBFloat16, Element::kFloat16, Element::kFloat32}) add(element, Gate::kSilu);
  for (const Gate gate : {Gate::kGelu, Gate::kGeluTanh}) add(Element::kBFloat16, gate);
  return specs;
}

}  // namespace heed::cuda
