// Gated activations: validate -> resolve -> plan -> launch, in call_op().
#include "ops/act_and_mul.h"

#include "cpu/act_and_mul.h"
#include "cuda/sm80_act_and_mul.h"

namespace heed {
namespace {

void run_on_cpu(const ActAndMulProblem& problem, const ActAndMulArgs& args, void* /*prepared*/) {
  cpu::act_and_mul(problem, args);
}

void run_bwd_on_cpu(const ActAndMulProblem& problem, const ActAndMulBackwardArgs& args, void* /*prepared*/) {
  cpu::act_and_mul_bwd(problem, args);
}

constexpr ActAndMulOp::KernelType kKernels[] = {
    {"sm80_act_and_mul", Backend::kSm80, "sm80", cuda::sm80_act_and_mul_declines, cuda::sm80_act_and_mul,
     cuda::prepare_sm80_act_and_mul, cuda::load_sm80_act_and_mul},
    {"cpu_act_and_mul", Backend::kCpu, "cpu", cpu::act_and_mul_declines, run_on_cpu},
};

constexpr ActAndMulBwdOp::KernelType kBwdKernels[] = {
    {"sm80_act_and_mul_bwd", Backend::kSm80, "sm80", cuda::sm80_act_and_mul_bwd_declines, cuda::sm80_act_and_mul_bwd,
     cuda::prepare_sm80_act_and_mul_bwd, cuda::load_sm80_act_and_mul_bwd},
    {"cpu_act_and_mul_bwd", Backend::kCpu, "cpu", cpu::act_and_mul_bwd_declines, run_bwd_on_cpu},
};

std::array<TensorSpec, 1> one_result(const ActAndMulProblem& problem) {
  return {TensorSpec{std::string(info(problem.dtype).name), problem.out_shape(), true}};
}

}  // namespace

std::array<TensorSpec, 1> ActAndMulOp::result_specs(const Problem& problem, int64_t /*workspace_floats*/) {
  return one_result(problem);
}

Resolution<ActAndMulOp::KernelType> ActAndMulOp::resolve(const Problem& problem, const Target& target) {
  return resolve_in(kKernels, problem, target);
}

ResolvedOp<ActAndMulOp> ActAndMulOp::resolve_text(std::string_view text, const Target& target) {
  return resolve_request<ActAndMulOp>(parse_act_and_mul_request(text, false), target);
}

std::shared_ptr<const PreparedOp<ActAndMulOp>> ActAndMulOp::prepare(std::string_view text, const Target& target) {
  static auto* const tables = new PreparedTables<PreparedOp<ActAndMulOp>>;
  return tables->find_or_make(
      text, target, [&] { return prepare_request<ActAndMulOp>(parse_act_and_mul_request(text, false), target); });
}

void ActAndMulOp::load(const PreparedOp<ActAndMulOp>& prepared, int device) { load_op(prepared, device); }
void ActAndMulOp::run(const PreparedOp<ActAndMulOp>& prepared, const Args& args) { run_op(prepared, args); }

std::array<TensorSpec, 1> ActAndMulBwdOp::result_specs(const Problem& problem, int64_t /*workspace_floats*/) {
  return one_result(problem);
}

Resolution<ActAndMulBwdOp::KernelType> ActAndMulBwdOp::resolve(const Problem& problem, const Target& target) {
  return resolve_in(kBwdKernels, problem, target);
}

ResolvedOp<ActAndMulBwdOp> ActAndMulBwdOp::resolve_text(std::string_view text, const Target& target) {
  return resolve_request<ActAndMulBwdOp>(parse_act_and_mul_request(text, true), target);
}

std::shared_ptr<const PreparedOp<ActAndMulBwdOp>> ActAndMulBwdOp::prepare(std::string_view text, const Target& target) {
  static auto* const tables = new PreparedTables<PreparedOp<ActAndMulBwdOp>>;
  return tables->find_or_make(
      text, target, [&] { return prepare_request<ActAndMulBwdOp>(parse_act_and_mul_request(text, true), target); });
}

void ActAndMulBwdOp::load(const PreparedOp<ActAndMulBwdOp>& prepared, int device) { load_op(prepared, device); }
void ActAndMulBwdOp::run(const PreparedOp<ActAndMulBwdOp>& prepared, const Args& args) { run_op(prepared, args); }

void act_and_mul(const ActAndMulArgs& args, Activation activation, Backend backend) {
  ActAndMulRequest request{.activation = activation, .backend = backend};
  set_operands<ActAndMulOp>(request, args);
  call_op<ActAndMulOp>(request, args);
}

void act_and_mul_backward(const ActAndMulBackwardArgs& args, Activation activation, Backend backend) {
  ActAndMulRequest request{.activation = activation, .is_backward = true, .backend = backend};
  set_operands<ActAndMulBwdOp>(request, args);
  call_op<ActAndMulBwdOp>(request, args);
}

}  // namespace heed
