// CPU attention forward: turns a problem into a ForwardPlan and runs the kernel of the instruction set in use.
//
// Where the time and the bytes go
// -------------------------------
// Attention is two matrix products with an exponential between them; at head dim 128 the exponential is a few percent,
// so the kernel is a matrix product kernel that never writes the score matrix to memory.
//
// Rows. Queries are vectorised along rows, one query row per SIMD lane, and all query heads of a GQA group are rows of
// the same item: K and V are read once per group. A panel is 3 vectors of rows (48 with AVX-512), an item up to 8
// panels of one KV head. Scores are kept transposed, S^T [keys][rows]: row maxima and sums are then plain vertical
// operations, and P^T comes out in exactly the layout that the second product wants. Q is transposed once per item, O
// once at its end.
//
// Registers. Both products are the same register tile: 8 keys (or columns of V) x 3 vectors of rows = 24 accumulators.
// One step loads 3 vectors and 8 broadcast scalars for 24 multiply-adds: arithmetic, not loads, is the limit.
//
// L1 (48 KB). S^T = K Q^T keeps Q^T of the panel (head_dim x 48 floats: 24 KB at 128) and 8 rows of K; O^T += V^T P^T
// keeps P^T of the panel (128 keys x 48 floats: 24 KB) while V passes by.
//
// L2 (1 MB). A block of 128 keys of K and V is packed once per item as float32 (float16 and bfloat16 are converted
// there: 64 KB each at head dim 128) and serves all panels; so do the panels' Q^T and O^T. Per block and panel, O^T is
// read and written once, with the online softmax's correction folded into the read.
//
// Memory. Each item reads K and V of its head once: 8 panels x 48 rows do 384 multiply-adds per element of K and V
// read, which is 10 GB/s per 2 TFLOP/s. Items of one head follow each other, so K and V come from the outer caches
// after the first. Rows lie a token apart (4 KB at 8 heads of 128), where hardware prefetchers do not follow, so the
// next block's rows are prefetched one by one between register tiles. Q, out and lse are touched once.
//
// Items. A batch of variable lengths is the same kernel with other items (attention_fwd_schedule.h): sequences are cut
// into items of about the same work, longer sequences into items of fewer panels, and those with the most work come
// first. Rows outside every sequence are items without keys.
//
// Memory per thread, whatever the lengths: max(512 KiB, one panel of Q^T and O^T) for Q^T and O^T, 2 x 128 x 272 floats
// for K and V, 128 x 48 floats of scores, 1 KiB of row statistics per panel. At most 512 + 272 + 24 + 8 = 816 KiB plus
// padding.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_fwd.cc"
#include "cpu/simd.h"
// clang-format off
#include "hwy/foreach_target.h"
#include "cpu/attention_fwd-inl.h"
// clang-format on

#if HWY_ONCE

#include "cpu/attention_fwd.h"

namespace heed::cpu {

HWY_EXPORT(attention_fwd_run);

std::string attention_fwd_declines(const AttentionProblem& /*problem*/, const Target& target) {
  if (!target.is_cpu) return "runs on the CPU only, and the target is " + target.name;
  return "";
}

void attention_fwd(const AttentionProblem& problem, const AttentionForwardArgs& args) {
  const ForwardPlan plan = make_forward_plan(problem, args);
  if (plan.num_problems == 0 || plan.q_len == 0 || plan.num_kv_heads == 0) return;
  HEED_DYNAMIC_DISPATCH(attention_fwd_run)(plan, num_threads());
}

}  // namespace heed::cpu

#endif  // HWY_ONCE
