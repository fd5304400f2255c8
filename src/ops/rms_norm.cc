// RMS norms: validate -> resolve -> plan -> launch, in call_op().
#include "ops/rms_norm.h"

#include <algorithm>

#include "cpu/rms_norm.h"
#include "cuda/sm80_rms_norm.h"

namespace heed {
namespace {

void run_on_cpu(const RmsNormProblem& problem, const RmsNormArgs& args, void* /*prepared*/) {
  cpu::rms_norm(problem, args);
}

void run_bwd_on_cpu(const RmsNormProblem& problem, const RmsNormBackwardArgs& args, void* /*prepared*/) {
  cpu::rms_norm_bwd(problem, args);
}

constexpr RmsNormOp::KernelType kKernels[] = {
    {"sm80_rms_norm", Backend::kSm80, "sm80", cuda::sm80_rms_norm_declines, cuda::sm80_rms_norm,
     cuda::prepare_sm80_rms_norm, cuda::load_sm80_rms_norm},
    {"cpu_rms_norm", Backend::kCpu, "cpu", cpu::rms_norm_declines, run_on_cpu},
};

constexpr RmsNormBwdOp::KernelType kBwdKernels[] = {
    {"sm80_rms_norm_bwd", Backend::kSm80, "sm80", cuda::sm80_rms_norm_bwd_declines, cuda::sm80_rms_norm_bwd,
     cuda::prepare_sm80_rms_norm_bwd, cuda::load_sm80_rms_norm_bwd, cuda::sm80_rms_norm_bwd_workspace},
    {"cpu_rms_norm_bwd", Backend::kCpu, "cpu", cpu::rms_norm_bwd_declines, run_bwd_on_cpu, nullptr, nullptr,
     cpu::rms_norm_bwd_workspace},
};

template <class Op>
RmsNormRequest make_request(const typename Op::Args& args, double eps, Backend backend, bool is_backward) {
  RmsNormRequest request{.eps = eps, .is_backward = is_backward, .backend = backend};
  set_operands<Op>(request, args);
  request.num_row_axes = std::max(int64_t{args.x.rank} - args.weight.rank, int64_t{0});
  return request;
}

}  // namespace

std::array<TensorSpec, 2> RmsNormOp::result_specs(const Problem& problem, int64_t /*workspace_floats*/) {
  const TensorSpec out{std::string(info(problem.dtype).name), problem.x_shape(), true};
  return {out, problem.has_residual ? out : TensorSpec{}};
}

Resolution<RmsNormOp::KernelType> RmsNormOp::resolve(const Problem& problem, const Target& target) {
  return resolve_in(kKernels, problem, target);
}

ResolvedOp<RmsNormOp> RmsNormOp::resolve_text(std::string_view text, const Target& target) {
  return resolve_request<RmsNormOp>(parse_rms_norm_request(text, false), target);
}

std::shared_ptr<const PreparedOp<RmsNormOp>> RmsNormOp::prepare(std::string_view text, const Target& target) {
  static auto* const tables = new PreparedTables<PreparedOp<RmsNormOp>>;
  return tables->find_or_make(text, target,
                              [&] { return prepare_request<RmsNormOp>(parse_rms_norm_request(text, false), target); });
}

void RmsNormOp::load(const PreparedOp<RmsNormOp>& prepared, int device) { load_op(prepared, device); }
void RmsNormOp::run(const PreparedOp<RmsNormOp>& prepared, const Args& args) { run_op(prepared, args); }

std::array<TensorSpec, 3> RmsNormBwdOp::result_specs(const Problem& problem, int64_t workspace_floats) {
  return {TensorSpec{std::string(info(problem.dtype).name), problem.x_shape(), true},
          TensorSpec{"float32", problem.dweight_shape(), true},
          TensorSpec{"float32", problem.workspace_shape(workspace_floats), true}};
}

Resolution<RmsNormBwdOp::KernelType> RmsNormBwdOp::resolve(const Problem& problem, const Target& target) {
  return resolve_in(kBwdKernels, problem, target);
}

ResolvedOp<RmsNormBwdOp> RmsNormBwdOp::resolve_text(std::string_view text, const Target& target) {
  return resolve_request<RmsNormBwdOp>(parse_rms_norm_request(text, true), target);
}

std::shared_ptr<const PreparedOp<RmsNormBwdOp>> RmsNormBwdOp::prepare(std::string_view text, const Target& target) {
  static auto* const tables = new PreparedTables<PreparedOp<RmsNormBwdOp>>;
  return tables->find_or_make(
      text, target, [&] { return prepare_request<RmsNormBwdOp>(parse_rms_norm_request(text, true), target); });
}

void RmsNormBwdOp::load(const PreparedOp<RmsNormBwdOp>& prepared, int device) { load_op(prepared, device); }
void RmsNormBwdOp::run(const PreparedOp<RmsNormBwdOp>& prepared, const Args& args) { run_op(prepared, args); }

void rms_norm(const RmsNormArgs& args, double eps, Backend backend) {
  call_op<RmsNormOp>(make_request<RmsNormOp>(args, eps, backend, false), args);
}

void rms_norm_backward(const RmsNormBackwardArgs& args, double eps, Backend backend) {
  call_op<RmsNormBwdOp>(make_request<RmsNormBwdOp>(args, eps, backend, true), args);
}

int64_t rms_norm_backward_workspace_bytes(const RmsNormBackwardArgs& args, Backend backend) {
  // No kernel's workspace depends on eps.
  return workspace_bytes_of<RmsNormBwdOp>(make_request<RmsNormBwdOp>(args, 0.0, backend, true), args);
}

}  // namespace heed
