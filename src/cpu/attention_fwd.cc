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

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_fwd.h"

namespace heed::cpu {

HWY_EXPORT(attention_fwd_run);

namespace {

// Axes after the leading ones, outermost first; `nullptr` ends the list.
using AxisList = std::initializer_list<int64_t Operand::*>;

Operand make_operand(const TensorView& view, int num_lead_axes, AxisList axes) {
  Operand operand;
  if (!view.defined()) return operand;
  operand.data = view.data;
  for (int axis = 0; axis < num_lead_axes; ++axis) {
    operand.lead[axis] = view.shape[axis] == 1 ? 0 : view.strides[axis];
  }
  int axis = num_lead_axes;
  for (int64_t Operand::*stride : axes) operand.*stride = view.strides[axis++];
  return operand;
}

ForwardPlan make_plan(const AttentionProblem& problem, const AttentionForwardArgs& args) {
  ForwardPlan plan;
  plan.dtype = problem.dtype;
  plan.num_lead_axes = static_cast<int>(problem.lead.size());
  std::copy(problem.lead.begin(), problem.lead.end(), plan.lead_sizes.begin());
  plan.is_varlen = problem.is_varlen;
  plan.num_sequences = problem.is_varlen ? problem.batch : 0;
  plan.batch = problem.is_varlen ? 1 : problem.batch;
  plan.num_problems = plan.batch;
  for (int64_t size : problem.lead) plan.num_problems *= size;
  plan.q_len = problem.q_len;
  plan.kv_len = problem.kv_len;
  plan.num_kv_heads = problem.num_kv_heads;
  plan.group = problem.num_kv_heads == 0 ? 0 : problem.num_q_heads / problem.num_kv_heads;
  plan.head_dim_qk = static_cast<int>(problem.head_dim_qk);
  plan.head_dim_v = static_cast<int>(problem.head_dim_v);

  const int lead = plan.num_lead_axes;
  const AxisList dense_tokens = {&Operand::batch, &Operand::token, &Operand::head, &Operand::dim};
  const AxisList varlen_tokens = {&Operand::token, &Operand::head, &Operand::dim};
  const AxisList tokens_by_heads = problem.is_varlen ? varlen_tokens : dense_tokens;
  plan.q = make_operand(args.q, lead, tokens_by_heads);
  plan.k = make_operand(args.k, lead, tokens_by_heads);
  plan.v = make_operand(args.v, lead, tokens_by_heads);
  plan.out = make_operand(args.out, lead, tokens_by_heads);
  plan.sinks = make_operand(args.sinks, lead, {&Operand::head});
  plan.alibi_slopes = make_operand(args.alibi_slopes, lead, {&Operand::head});
  plan.q_segment_ids = make_operand(args.q_segment_ids, lead, {&Operand::batch, &Operand::token});
  plan.kv_segment_ids = make_operand(args.kv_segment_ids, lead, {&Operand::batch, &Operand::token});
  plan.cu_seqlens_q = make_operand(args.cu_seqlens_q, lead, {&Operand::token});
  plan.cu_seqlens_k = make_operand(args.cu_seqlens_k, lead, {&Operand::token});
  plan.seqused_k = make_operand(args.seqused_k, lead, {&Operand::token});
  const AxisList dense_rows = {&Operand::batch, &Operand::head, &Operand::token};
  const AxisList varlen_rows = {&Operand::head, &Operand::token};
  plan.lse = make_operand(args.lse, lead, problem.is_varlen ? varlen_rows : dense_rows);

  plan.window_left = problem.window_left;
  plan.window_right = problem.window_right;
  plan.is_bottom_right = problem.causal_align == CausalAlign::kBottomRight;
  plan.scale = std::abs(problem.softmax_scale);
  plan.negates_q = problem.softmax_scale < 0.0;
  // Beyond 1e30 a cap changes no float32 score that it does not flush to zero in the division. Below the smallest
  // normal float it would itself be flushed, and there all scores are 0 to float32.
  plan.has_softcap = problem.softcap > 0.0 && problem.softcap < 1e30;
  if (plan.has_softcap) {
    constexpr double kSmallest = std::numeric_limits<float>::min();
    plan.softcap = static_cast<float>(std::max(problem.softcap, kSmallest));
    plan.scale_over_cap = static_cast<float>(
        std::min(plan.scale / problem.softcap, static_cast<double>(std::numeric_limits<float>::max())));
  }
  // A scale near 0 must not meet the -inf of a masked score, and one near the largest float must not overflow when it
  // becomes the factor of a base-2 exponent.
  plan.has_score_transform =
      plan.has_softcap || plan.alibi_slopes.data != nullptr || plan.scale < 1e-30 || plan.scale > 1e38;
  return plan;
}

}  // namespace

std::string attention_fwd_declines(const AttentionProblem& /*problem*/, const Target& target) {
  if (!target.is_cpu) return "runs on the CPU only, and the target is " + target.name;
  return "";
}

void attention_fwd(const AttentionProblem& problem, const AttentionForwardArgs& args) {
  const ForwardPlan plan = make_plan(problem, args);
  if (plan.num_problems == 0 || plan.q_len == 0 || plan.num_kv_heads == 0) return;
  HEED_DYNAMIC_DISPATCH(attention_fwd_run)(plan, num_threads());
}

}  // namespace heed::cpu

#endif  // HWY_ONCE
