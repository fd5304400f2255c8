// Rotary position embeddings: validate -> resolve -> plan -> launch, in call_op().
#include "ops/rope.h"

#include "cpu/rope.h"
#include "cuda/sm80_rope.h"

namespace heed {
namespace {

void run_on_cpu(const RopeProblem& problem, const RopeArgs& args, void* /*prepared*/) { cpu::rope(problem, args); }

constexpr RopeOp::KernelType kKernels[] = {
    {"sm80_rope", Backend::kSm80, "sm80", cuda::sm80_rope_declines, cuda::sm80_rope, cuda::prepare_sm80_rope,
     cuda::load_sm80_rope},
    {"cpu_rope", Backend::kCpu, "cpu", cpu::rope_declines, run_on_cpu},
};

}  // namespace

std::array<TensorSpec, 2> RopeOp::result_specs(const Problem& problem, int64_t /*workspace_floats*/) {
  const std::string dtype(info(problem.dtype).name);
  return {TensorSpec{dtype, problem.q_shape(), true}, TensorSpec{dtype, problem.k_shape(), true}};
}

Resolution<RopeOp::KernelType> RopeOp::resolve(const Problem& problem, const Target& target) {
  return resolve_in(kKernels, problem, target);
}

ResolvedOp<RopeOp> RopeOp::resolve_text(std::string_view text, const Target& target) {
  return resolve_request<RopeOp>(parse_rope_request(text), target);
}

std::shared_ptr<const PreparedOp<RopeOp>> RopeOp::prepare(std::string_view text, const Target& target) {
  static auto* const tables = new PreparedTables<PreparedOp<RopeOp>>;
  return tables->find_or_make(text, target, [&] { return prepare_request<RopeOp>(parse_rope_request(text), target); });
}

void RopeOp::load(const PreparedOp<RopeOp>& prepared, int device) { load_op(prepared, device); }
void RopeOp::run(const PreparedOp<RopeOp>& prepared, const Args& args) { run_op(prepared, args); }

void apply_rope(const RopeArgs& args, const RopeOptions& options) {
  RopeRequest request{.options = options};
  set_operands<RopeOp>(request, args);
  call_op<RopeOp>(request, args);
}

}  // namespace heed
