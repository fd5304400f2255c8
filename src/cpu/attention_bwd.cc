// CPU attention backward: turns a problem into a BackwardPlan and runs the kernel of the instruction set in use.
//
// Where the time and the bytes go
// -------------------------------
// Five matrix products per pair of a row block (96 query rows) and a chunk of keys (up to 192), and an exponential:
//   S = Q K^T, dP = dO V^T;  P = exp(S - lse), dS = P (dP - delta);  dV += P^T dO, dK += dS^T Q, dQ += dS K.
// Nothing of the size of S outlives its pair, and S is computed again instead of kept by the forward pass.
//
// Loops. A work item is a chunk of keys of one KV head: dK and dV of a chunk are summed where they lie, over all row
// blocks that see it, and written once. dQ is the sum over the chunks, in float32 in the workspace (head_dim + 1 floats
// a row; none if all keys fit in one chunk). All query heads of a GQA group are rows of the same blocks, so their sums
// need no step of their own.
//
// Lanes. Keys lie along the lanes of S and dP (what is per row, lse and delta, is then a broadcast), and the head dim
// along those of the gradients. So every product is one kind of register tile: 6 rows of a left operand, broadcast
// element by element, times 4 vectors of a right one: 24 accumulators, 4 + 6 loads for 24 multiply-adds. Only K and V
// are transposed, once per chunk; Q and dO are copied row by row (and converted, if they are 16 bits wide).
//
// L1 (48 KB). Each product keeps the 4 vectors' columns of its right operand there while the left one passes by: K^T or
// V^T (head_dim x 64 floats: 32 KB at 128), 96 rows of dO, Q or K (24 KB).
//
// L2 (1 MB). K and V both ways round, dK and dV of the chunk: 480 KB at head dim 128; Q, dO, dQ and both score tiles of
// the row block: 300 KB. Above head_dim_qk + head_dim_v = 256 chunks are half as long.
//
// Memory. An item reads K and V once and Q and dO of its head once: 192 x 5 multiply-adds per element of Q and dO.
//
// Masks. Per row tile the keys, and per tile of keys the rows, that any of them sees: products run over just those, so
// a causal mask wastes half a register tile at its edge, not half a block. What a mask hides is exactly 0 in P and dS,
// and where a masked block holds NaN or infinities, its products run over the kept pairs only.
//
// Order, and why results do not depend on the threads. A pass before the chunks computes delta = <dO, O> - dlse. Chunks
// then add to a row block of dQ strictly in their order: each waits for the turn that a counter in the workspace
// announces. It seldom waits: items go heads first, so that with as many heads as threads a chunk starts when the one
// before it has long passed; and where chunks of one head do run side by side, all walk from the last row block to the
// first, and meet there one after the other. The alternative, computing S and dP again in a pass of its own for dQ, is
// 7 products instead of 5. Sums for sinks and slopes are formed last, per head, over per-row values in the workspace.
//
// Memory per thread, whatever the lengths: 3 x 192 rows of K, dK and dV and 3 x 96 rows of Q, dO and dQ, all of 272
// floats; 192 x 256 floats of K^T and V^T, 2 x 96 x 208 of scores: 1.24 MiB at most. Short head dims touch only their
// part of the rows.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_bwd.cc"
#include "cpu/simd.h"
// clang-format off
#include "hwy/foreach_target.h"
#include "cpu/attention_bwd-inl.h"
// clang-format on

#if HWY_ONCE

#include "cpu/attention_bwd.h"

namespace heed::cpu {

HWY_EXPORT(attention_bwd_run);

std::string attention_bwd_declines(const AttentionBwdProblem& /*problem*/, const Target& target) {
  if (!target.is_cpu) return "runs on the CPU only, and the target is " + target.name;
  return "";
}

int64_t attention_bwd_workspace(const AttentionBwdProblem& problem) {
  const AttentionProblem& forward = problem.forward;
  const bool has_chunks = forward.kv_len > max_chunk_keys(forward.head_dim_qk, forward.head_dim_v);
  return workspace_per_head(forward.q_len, forward.head_dim_qk, has_chunks, forward.has_alibi);
}

void attention_bwd(const AttentionBwdProblem& problem, const AttentionBackwardArgs& args) {
  const BackwardPlan plan = make_backward_plan(problem, args);
  if (plan.forward.num_problems == 0 || plan.forward.num_kv_heads == 0) return;
  HEED_DYNAMIC_DISPATCH(attention_bwd_run)(plan);
}

}  // namespace heed::cpu

#endif  // HWY_ONCE
