// The gated activations, forward and backward. What the members mean: ops/small_op.h.
#pragma once

#include "ops/small_op.h"

namespace heed {

struct ActAndMulOp {
  using Problem = ActAndMulProblem;
  using Args = ActAndMulArgs;
  using KernelType = Kernel<Problem, Args>;
  static constexpr std::string_view kName = "act_and_mul", kTitle = "gated activation";
  static constexpr std::array<std::string_view, 1> kResultNames = {"out"};
  static constexpr bool kHasWorkspace = false;

  static std::array<TensorView*, Problem::kNumInputs> inputs(Args& args) { return {&args.x, nullptr}; }
  static std::array<TensorView*, 1> results(Args& args) { return {&args.out}; }
  static std::array<TensorSpec, 1> result_specs(const Problem& problem, int64_t workspace_floats);
  static Resolution<KernelType> resolve(const Problem& problem, const Target& target);
  HEED_API static ResolvedOp<ActAndMulOp> resolve_text(std::string_view text, const Target& target);
  HEED_API static std::shared_ptr<const PreparedOp<ActAndMulOp>> prepare(std::string_view text, const Target& target);
  HEED_API static void load(const PreparedOp<ActAndMulOp>& prepared, int device);
  HEED_API static void run(const PreparedOp<ActAndMulOp>& prepared, const Args& args);
};

struct ActAndMulBwdOp {
  using Problem = ActAndMulProblem;
  using Args = ActAndMulBackwardArgs;
  using KernelType = Kernel<Problem, Args>;
  static constexpr std::string_view kName = "act_and_mul_bwd", kTitle = "gated activation backward";
  static constexpr std::array<std::string_view, 1> kResultNames = {"dx"};
  static constexpr bool kHasWorkspace = false;

  static std::array<TensorView*, Problem::kNumInputs> inputs(Args& args) { return {&args.x, &args.dout}; }
  static std::array<TensorView*, 1> results(Args& args) { return {&args.dx}; }
  static std::array<TensorSpec, 1> result_specs(const Problem& problem, int64_t workspace_floats);
  static Resolution<KernelType> resolve(const Problem& problem, const Target& target);
  HEED_API static ResolvedOp<ActAndMulBwdOp> resolve_text(std::string_view text, const Target& target);
  HEED_API static std::shared_ptr<const PreparedOp<ActAndMulBwdOp>> prepare(std::string_view text,
                                                                            const Target& target);
  HEED_API static void load(const PreparedOp<ActAndMulBwdOp>& prepared, int device);
  HEED_API static void run(const PreparedOp<ActAndMulBwdOp>& prepared, const Args& args);
};

}  // namespace heed
