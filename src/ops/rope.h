// Rotary position embeddings. What the members mean: ops/small_op.h.
#pragma once

#include "ops/small_op.h"

namespace heed {

struct RopeOp {
  using Problem = RopeProblem;
  using Args = RopeArgs;
  using KernelType = Kernel<Problem, Args>;
  static constexpr std::string_view kName = "rope", kTitle = "rotary embedding";
  static constexpr std::array<std::string_view, 2> kResultNames = {"q_rope", "k_rope"};
  static constexpr bool kHasWorkspace = false;

  static std::array<TensorView*, Problem::kNumInputs> inputs(Args& args) {
    return {&args.q, &args.k, &args.indptr, &args.offsets, &args.pos_ids, &args.cos_sin_cache};
  }
  static std::array<TensorView*, 2> results(Args& args) { return {&args.q_rope, &args.k_rope}; }
  static std::array<TensorSpec, 2> result_specs(const Problem& problem, int64_t workspace_floats);
  static Resolution<KernelType> resolve(const Problem& problem, const Target& target);
  HEED_API static ResolvedOp<RopeOp> resolve_text(std::string_view text, const Target& target);
  HEED_API static std::shared_ptr<const PreparedOp<RopeOp>> prepare(std::string_view text, const Target& target);
  HEED_API static void load(const PreparedOp<RopeOp>& prepared, int device);
  HEED_API static void run(const PreparedOp<RopeOp>& prepared, const Args& args);
};

}  // namespace heed
