// The attention backward op: resolve, and run a problem that has been resolved.
#pragma once

#include <array>
#include <memory>
#include <string_view>

#include "core/attention_bwd_problem.h"
#include "core/registry.h"
#include "core/target.h"
#include "heed/heed.h"
#include "ops/attention_fwd.h"

namespace heed {

using AttentionBwdKernel = Kernel<AttentionBwdProblem, AttentionBackwardArgs>;
using AttentionBwdResolution = Resolution<AttentionBwdKernel>;
using PreparedAttentionBwd = Prepared<AttentionBwdKernel>;

// Picks a kernel for the problem on the target, or none, with every candidate's reason.
HEED_API AttentionBwdResolution resolve(const AttentionBwdProblem& problem, const Target& target);

// The views of the inputs in the order of AttentionBwdOperand, and of the gradients in that of AttentionGradient.
using AttentionBwdInputs = std::array<TensorView*, kNumAttentionBwdInputs>;
using AttentionGradients = std::array<TensorView*, kNumAttentionGradients>;
inline AttentionBwdInputs bwd_inputs_of(AttentionBackwardArgs& args) {
  AttentionBwdInputs inputs{};
  int next = 0;
  for (TensorView* view : inputs_of(args)) inputs[next++] = view;
  for (TensorView* view : {&args.out, &args.lse, &args.dout, &args.dlse}) inputs[next++] = view;
  return inputs;
}
inline AttentionGradients gradients_of(AttentionBackwardArgs& args) {
  return {&args.dq, &args.dk, &args.dv, &args.dsinks, &args.dalibi_slopes};
}

// As for the forward op: see prepare_attention_fwd(), load_attention_fwd() and run_attention_fwd().
HEED_API std::shared_ptr<const PreparedAttentionBwd> prepare_attention_bwd(std::string_view text, const Target& target);
HEED_API void load_attention_bwd(const PreparedAttentionBwd& prepared, int device);
// Checks the workspace's size as well: a compiled program may come from a version of heed that needed less.
HEED_API void run_attention_bwd(const PreparedAttentionBwd& prepared, const AttentionBackwardArgs& args);

}  // namespace heed
