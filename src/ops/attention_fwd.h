// The attention forward op: resolve, and run a problem that has been resolved.
#pragma once

#include <array>
#include <memory>
#include <string_view>

#include "core/problem.h"
#include "core/registry.h"
#include "core/target.h"
#include "heed/heed.h"

namespace heed {

using AttentionFwdKernel = Kernel<AttentionProblem, AttentionForwardArgs>;
using AttentionFwdResolution = Resolution<AttentionFwdKernel>;
using PreparedAttentionFwd = Prepared<AttentionFwdKernel>;

// Picks a kernel for the problem on the target, or none, with every candidate's reason.
HEED_API AttentionFwdResolution resolve(const AttentionProblem& problem, const Target& target);

// The views of the inputs, in the order of AttentionOperand. Args: those of either pass.
using AttentionInputs = std::array<TensorView*, kNumAttentionInputs>;
template <class Args>
AttentionInputs inputs_of(Args& args) {
  return {&args.q,
          &args.k,
          &args.v,
          &args.sinks,
          &args.alibi_slopes,
          &args.q_segment_ids,
          &args.kv_segment_ids,
          &args.cu_seqlens_q,
          &args.cu_seqlens_k,
          &args.seqused_k};
}

// Parses, validates and resolves the text, or finds it among those seen before: one lock-free lookup by the text's
// bytes. Throws what validation throws, and UnsupportedError. The table keeps a bounded number of texts; past that a
// text is prepared anew at each call.
HEED_API std::shared_ptr<const PreparedAttentionFwd> prepare_attention_fwd(std::string_view text, const Target& target);

// Makes the kernel ready on CUDA's device of that ordinal: compiles it if need be, and loads it. Idempotent. Throws
// std::runtime_error. Kernels of the CPU need nothing.
HEED_API void load_attention_fwd(const PreparedAttentionFwd& prepared, int device);

// Checks the views against the problem (shapes, dtypes, memory) and runs the kernel. The workspace may be absent, and
// one that is smaller than the kernel would have it is left alone: a compiled program may come from a version of heed,
// or be made for a GPU, that had less use for one. (attention_forward refuses that: its caller has just asked.)
HEED_API void run_attention_fwd(const PreparedAttentionFwd& prepared, const AttentionForwardArgs& args);

}  // namespace heed
