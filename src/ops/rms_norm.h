// RMS norms, forward and backward. What the members mean: ops/small_op.h.
#pragma once

#include "ops/small_op.h"

namespace heed {

struct RmsNormOp {
  using Problem = RmsNormProblem;
  using Args = RmsNormArgs;
  using KernelType = Kernel<Problem, Args>;
  static constexpr std::string_view kName = "rms_norm", kTitle = "RMS norm";
  static constexpr std::array<std::string_view, 2> kResultNames = {"out", "sum"};
  static constexpr bool kHasWorkspace = false;

  static std::array<TensorView*, Problem::kNumInputs> inputs(Args& args) {
    return {&args.x, &args.weight, &args.residual, nullptr, nullptr};
  }
  static std::array<TensorView*, 2> results(Args& args) { return {&args.out, &args.sum}; }
  static std::array<TensorSpec, 2> result_specs(const Problem& problem, int64_t workspace_floats);
  static Resolution<KernelType> resolve(const Problem& problem, const Target& target);
  HEED_API static ResolvedOp<RmsNormOp> resolve_text(std::string_view text, const Target& target);
  HEED_API static std::shared_ptr<const PreparedOp<RmsNormOp>> prepare(std::string_view text, const Target& target);
  HEED_API static void load(const PreparedOp<RmsNormOp>& prepared, int device);
  HEED_API static void run(const PreparedOp<RmsNormOp>& prepared, const Args& args);
};

struct RmsNormBwdOp {
  using Problem = RmsNormProblem;
  using Args = RmsNormBackwardArgs;
  using KernelType = Kernel<Problem, Args>;
  static constexpr std::string_view kName = "rms_norm_bwd", kTitle = "RMS norm backward";
  static constexpr std::array<std::string_view, 3> kResultNames = {"dx", "dweight", "workspace"};
  static constexpr bool kHasWorkspace = true;

  static std::array<TensorView*, Problem::kNumInputs> inputs(Args& args) {
    return {&args.x, &args.weight, nullptr, &args.dout, &args.dsum};
  }
  static std::array<TensorView*, 3> results(Args& args) { return {&args.dx, &args.dweight, &args.workspace}; }
  static std::array<TensorSpec, 3> result_specs(const Problem& problem, int64_t workspace_floats);
  static Resolution<KernelType> resolve(const Problem& problem, const Target& target);
  HEED_API static ResolvedOp<RmsNormBwdOp> resolve_text(std::string_view text, const Target& target);
  HEED_API static std::shared_ptr<const PreparedOp<RmsNormBwdOp>> prepare(std::string_view text, const Target& target);
  HEED_API static void load(const PreparedOp<RmsNormBwdOp>& prepared, int device);
  HEED_API static void run(const PreparedOp<RmsNormBwdOp>& prepared, const Args& args);
};

}  // namespace heed
