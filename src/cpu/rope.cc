// CPU rotary embeddings.
//
// Where the time and the bytes go
// -------------------------------
// Every element is read and written once, with two multiply-adds: memory is the limit. What could cost more are the
// angles. They are computed once per token, for all its heads (rotary_dim / 2 cosines and sines; a token of 40 heads
// rotates 40 times as many pairs), in double: a float32 product of position and frequency is off by 0.06 rad at
// position 2^20. Angles are counted in quarter turns, so that reducing them to the first octant is a rounding.
//
// Items are blocks of tokens, whatever the sequences: one sequence of 32768 tokens is shared as well as 32768 sequences
// of one. A token's sequence is found by binary search, or is that of the token before it.
//
// A call may be in place: q_rope may be q, and k_rope k.
//
// Results of calls that do not fit in the caches are written past them (row_memory.h). Results do not depend on how the
// call is cut.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rope.cc"
#include "cpu/simd.h"
// clang-format off
#include "hwy/foreach_target.h"
#include "cpu/rope-inl.h"
// clang-format on

#if HWY_ONCE

#include "core/dtype.h"
#include "cpu/cpu_only.h"
#include "cpu/rope.h"

namespace heed::cpu {
namespace {

// [.., n, heads, D]
RopeTensor heads(const TensorView& view, size_t lead) {
  return {view.data, view.strides[lead], view.strides[lead + 1], view.strides[lead + 2]};
}

// [.., entries]
RopeTensor list(const TensorView& view, size_t lead) {
  if (!view.defined()) return {};
  return {view.data, view.strides[lead], 0, 1};
}

// [.., positions, rotary_dim]
RopeTensor cache(const TensorView& view, size_t lead) {
  if (!view.defined()) return {};
  return {view.data, view.strides[lead], 0, view.strides[lead + 1]};
}

}  // namespace

HWY_EXPORT(rope_run);

std::string rope_declines(const RopeProblem& /*problem*/, const Target& target) {
  return declines_other_targets(target);
}

void rope(const RopeProblem& problem, const RopeArgs& args) {
  const size_t lead = problem.lead.size();
  const RopePlan::Walk walk(
      problem.lead, {row_strides(args.q, lead), row_strides(args.k, lead), row_strides(args.q_rope, lead),
                     row_strides(args.k_rope, lead), row_strides(args.indptr, lead), row_strides(args.offsets, lead),
                     row_strides(args.pos_ids, lead), row_strides(args.cos_sin_cache, lead)});
  if (walk.num_rows() == 0 || problem.num_tokens == 0) return;
  const int64_t token_bytes =
      2 * (problem.num_q_heads + problem.num_kv_heads) * problem.head_dim * info(problem.dtype).size_bytes;
  const RopePlan plan{
      problem.dtype,
      walk,
      {heads(args.q, lead), heads(args.k, lead), heads(args.q_rope, lead), heads(args.k_rope, lead),
       list(args.indptr, lead), list(args.offsets, lead), list(args.pos_ids, lead), cache(args.cos_sin_cache, lead)},
      problem.num_tokens,
      problem.num_q_heads,
      problem.num_kv_heads,
      static_cast<int>(problem.head_dim),
      problem.num_sequences,
      problem.max_position,
      problem.options.interleave,
      problem.options.inverse,
      make_frequencies(problem.rotary_dim, problem.options),
      token_bytes,
      walk.num_rows() * problem.num_tokens * token_bytes >= kStreamingBytes};
  HEED_DYNAMIC_DISPATCH(rope_run)(plan);
}

}  // namespace heed::cpu

#endif  // HWY_ONCE
