// Host side of the portable kernels of RMS norms: which problems they serve, how they are specialised, their parameters
// and their launches. What they compute and how: device/sm80_rms_norm.cuh and device/sm80_rms_norm_bwd.cuh.
#include "cuda/sm80_rms_norm.h"

#include <algorithm>
#include <array>

#include "cuda/attention_host.h"
#include "cuda/row_host.h"
#include "cuda/sm80_rms_norm_spec.h"

namespace heed::cuda {
namespace {

using Params = Sm80RmsNormParams;
using Views = std::array<const TensorView*, Params::kNumOperands>;

Sm80RmsNormSpec make_spec(const RmsNormProblem& problem, bool is_aligned) {
  Sm80RmsNormSpec spec;
  spec.element = element_of(problem.dtype);
  spec.is_aligned = is_aligned;
  spec.has_addend = problem.is_backward ? problem.has_dsum : problem.has_residual;
  return with_row_length(spec, problem.hidden, problem.is_backward);
}

KernelSpec to_kernel_spec(const Sm80RmsNormSpec& spec, bool is_backward) {
  return {is_backward ? "sm80_rms_norm_bwd" : "sm80_rms_norm",
          InstanceText(is_backward ? "Sm80RmsNormBwd" : "Sm80RmsNorm", "Sm80RmsNormSpec", spec.element)
              .flag("is_aligned", spec.is_aligned)
              .number("threads_per_row", spec.threads_per_row)
              .number("chunks", spec.chunks)
              .flag("has_addend", spec.has_addend)
              .str()};
}

KernelSpec weight_sum_spec() {
  return {"sm80_rms_norm_bwd", "Sm80RmsNormWeightSum<" + std::to_string(kRmsNormSumStrips) + ">"};
}

int64_t num_leads(const RmsNormProblem& problem) { return product_of(problem.lead); }

int64_t rows_per_block(const RmsNormProblem& problem, const Sm80RmsNormSpec& spec) {
  return problem.is_backward ? sm80_rms_norm_bwd_rows_per_block(spec, problem.num_rows, num_leads(problem))
                             : sm80_rms_norm_rows_per_block(spec, problem.num_rows);
}
int64_t blocks_per_lead(const RmsNormProblem& problem, const Sm80RmsNormSpec& spec) {
  const int64_t rows = rows_per_block(problem, spec);
  return (problem.num_rows + rows - 1) / rows;
}

struct Prepared {
  std::array<Variant, 2> variants;  // unaligned, aligned
  Variant weight_sum;               // backward
};

std::string declines(const RmsNormProblem& problem, const Target& target) {
  if (std::string reason = gpu_declines(target); !reason.empty()) return reason;
  constexpr int64_t kMost = int64_t{1} << 30;
  if (std::max(problem.num_rows, problem.hidden) > kMost ||
      static_cast<double>(num_leads(problem)) *
              static_cast<double>(
                  std::max<int64_t>(problem.num_rows, (problem.hidden + kRmsNormSumColumns - 1) / kRmsNormSumColumns)) >
          static_cast<double>(kMaxGridBlocks)) {
    return "counts rows and their elements up to 2^30, and this call has more";
  }
  return "";
}

std::shared_ptr<void> prepare(const RmsNormProblem& problem) {
  auto prepared = std::make_shared<Prepared>();
  for (const bool is_aligned : {false, true}) {
    prepared->variants[is_aligned ? 1 : 0].spec = to_kernel_spec(make_spec(problem, is_aligned), problem.is_backward);
  }
  prepared->weight_sum.spec = weight_sum_spec();
  return prepared;
}

void load_packed(const RmsNormProblem& problem, void* prepared, int device) {
  auto& [variants, weight_sum] = *static_cast<Prepared*>(prepared);
  variants[fills_chunks(problem.hidden, problem.dtype) ? 1 : 0].load_on(device);
  if (problem.is_backward) weight_sum.load_on(device);
}

void set_params(Params& params, const RmsNormProblem& problem, const Views& views) {
  const int num_lead_axes = static_cast<int>(problem.lead.size());
  Views of_rows = views;
  of_rows[Params::kWeight] = of_rows[Params::kDweight] = nullptr;
  for (int i = 0; i < Params::kNumOperands; ++i) {
    if (views[i] == nullptr || !views[i]->defined()) continue;
    params.data[i] = views[i]->data;
    params.element_strides[i] = views[i]->strides[views[i]->rank - 1];
  }
  params.leads = merged_axes<Params::kNumOperands>(problem.lead, 0, views);
  if (problem.num_rows > 0) params.rows = merged_axes<Params::kNumOperands>(problem.rows, num_lead_axes, of_rows);
  params.num_rows = static_cast<int>(problem.num_rows);
  params.hidden = static_cast<int>(problem.hidden);
  params.eps = static_cast<float>(problem.eps);
}

// Whether every operand but dweight, which is written element by element, can be read and written by 16 bytes.
bool are_aligned(const RmsNormProblem& problem, const Views& views) {
  if (!fills_chunks(problem.hidden, problem.dtype)) return false;
  for (int i = 0; i < Params::kDweight; ++i) {
    if (views[i] != nullptr && !is_aligned(*views[i])) return false;
  }
  return true;
}

Sm80RmsNormPlan make_plan(const RmsNormProblem& problem, const Views& views) {
  Sm80RmsNormPlan plan{};
  if (num_leads(problem) == 0) return plan;
  plan.spec = make_spec(problem, are_aligned(problem, views));
  set_params(plan.params, problem, views);
  const int64_t blocks = blocks_per_lead(problem, plan.spec);
  plan.params.rows_per_block = static_cast<int>(rows_per_block(problem, plan.spec));
  plan.params.blocks_per_lead = make_divisor(static_cast<unsigned>(std::max<int64_t>(blocks, 1)));
  plan.num_blocks = num_leads(problem) * blocks;
  if (problem.is_backward) {
    const int64_t column_blocks = (problem.hidden + kRmsNormSumColumns - 1) / kRmsNormSumColumns;
    plan.params.column_blocks = make_divisor(static_cast<unsigned>(column_blocks));
    plan.num_sum_blocks = num_leads(problem) * column_blocks;
  }
  return plan;
}

}  // namespace

std::string sm80_rms_norm_declines(const RmsNormProblem& problem, const Target& target) {
  return declines(problem, target);
}
std::string sm80_rms_norm_bwd_declines(const RmsNormProblem& problem, const Target& target) {
  return declines(problem, target);
}

int64_t sm80_rms_norm_bwd_workspace(const RmsNormProblem& problem) {
  // Whether the operands are aligned is not known yet.
  return problem.hidden * std::max(blocks_per_lead(problem, make_spec(problem, false)),
                                   blocks_per_lead(problem, make_spec(problem, true)));
}

std::shared_ptr<void> prepare_sm80_rms_norm(const RmsNormProblem& problem) { return prepare(problem); }
std::shared_ptr<void> prepare_sm80_rms_norm_bwd(const RmsNormProblem& problem) { return prepare(problem); }

void load_sm80_rms_norm(const RmsNormProblem& problem, void* prepared, int device) {
  load_packed(problem, prepared, device);
}
void load_sm80_rms_norm_bwd(const RmsNormProblem& problem, void* prepared, int device) {
  load_packed(problem, prepared, device);
}

Sm80RmsNormPlan plan_sm80_rms_norm(const RmsNormProblem& problem, const RmsNormArgs& args) {
  return make_plan(problem, {&args.x, &args.weight, &args.residual, nullptr, &args.out, &args.sum, nullptr});
}
Sm80RmsNormPlan plan_sm80_rms_norm_bwd(const RmsNormProblem& problem, const RmsNormBackwardArgs& args) {
  Sm80RmsNormPlan plan =
      make_plan(problem, {&args.x, &args.weight, &args.dsum, &args.dout, &args.dx, nullptr, &args.dweight});
  plan.params.partial_sums = static_cast<float*>(args.workspace.data);
  return plan;
}

void sm80_rms_norm(const RmsNormProblem& problem, const RmsNormArgs& args, void* prepared) {
  const Sm80RmsNormPlan plan = plan_sm80_rms_norm(problem, args);
  Variant& variant = static_cast<Prepared*>(prepared)->variants[plan.spec.is_aligned ? 1 : 0];
  launch_overlapping(variant, args.x.device.index, plan.num_blocks, args.stream, &plan.params);
}

void sm80_rms_norm_bwd(const RmsNormProblem& problem, const RmsNormBackwardArgs& args, void* prepared) {
  const Sm80RmsNormPlan plan = plan_sm80_rms_norm_bwd(problem, args);
  auto& [variants, weight_sum] = *static_cast<Prepared*>(prepared);
  const int device = args.x.device.index;
  launch_overlapping(variants[plan.spec.is_aligned ? 1 : 0], device, plan.num_blocks, args.stream, &plan.params);
  if (plan.num_sum_blocks == 0) return;
  // Not before the first kernel ends: how that behaves in a captured graph that XLA updates has not been measured.
  launch(weight_sum.load_on(device), {.grid_x = plan.num_sum_blocks, .stream = args.stream}, &plan.params);
}

std::vector<KernelSpec> sm80_rms_norm_common_specs() {
  std::vector<KernelSpec> specs = {weight_sum_spec()};
  const auto add = [&](Element element, int64_t hidden) {
    for (const bool is_backward : {false, true}) {
      for (const bool has_addend : {false, true}) {
        Sm80RmsNormSpec spec{.element = element, .has_addend = has_addend};
        KernelSpec text = to_kernel_spec(with_row_length(spec, hidden, is_backward), is_backward);
        // Rows of several lengths share a kernel.
        if (std::find(specs.begin(), specs.end(), text) == specs.end()) specs.push_back(std::move(text));
      }
    }
  };
  for (const int64_t hidden : {64, 128, 2048, 4096, 8192}) add(Element::kBFloat16, hidden);
  add(Element::kFloat16, 4096);
  add(Element::kFloat32, 4096);
  return specs;
}

}  // namespace heed::cuda
