// Attention of one query over a KV cache. What the members mean: ops/small_op.h.
#pragma once

#include "ops/small_op.h"

namespace heed {

struct AttentionDecodeOp {
  using Problem = AttentionDecodeProblem;
  using Args = SingleDecodeArgs;
  using KernelType = Kernel<Problem, Args>;
  static constexpr std::string_view kName = "attention_decode", kTitle = "single decode";
  static constexpr std::array<std::string_view, 3> kResultNames = {"out", "lse", "workspace"};
  static constexpr bool kHasWorkspace = true;

  static std::array<TensorView*, Problem::kNumInputs> inputs(Args& args) {
    return {&args.q, &args.k, &args.v, &args.sinks, &args.alibi_slopes};
  }
  static std::array<TensorView*, 3> results(Args& args) { return {&args.out, &args.lse, &args.workspace}; }
  static std::array<TensorSpec, 3> result_specs(const Problem& problem, int64_t workspace_floats);
  static Resolution<KernelType> resolve(const Problem& problem, const Target& target);
  HEED_API static ResolvedOp<AttentionDecodeOp> resolve_text(std::string_view text, const Target& target);
  HEED_API static std::shared_ptr<const PreparedOp<AttentionDecodeOp>> prepare(std::string_view text,
                                                                               const Target& target);
  HEED_API static void load(const PreparedOp<AttentionDecodeOp>& prepared, int device);
  HEED_API static void run(const PreparedOp<AttentionDecodeOp>& prepared, const Args& args);
};

}  // namespace heed
