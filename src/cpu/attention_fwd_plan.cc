// From a problem and its tensors to what the CPU attention kernels are told.
#include "cpu/attention_fwd_plan.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

namespace heed::cpu {
namespace {

// Axes after the leading ones, outermost first.
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

}  // namespace

Operand token_operand(const TensorView& view, int num_lead_axes, bool is_varlen) {
  if (is_varlen) return make_operand(view, num_lead_axes, {&Operand::token, &Operand::head, &Operand::dim});
  return make_operand(view, num_lead_axes, {&Operand::batch, &Operand::token, &Operand::head, &Operand::dim});
}

Operand row_operand(const TensorView& view, int num_lead_axes, bool is_varlen) {
  if (is_varlen) return make_operand(view, num_lead_axes, {&Operand::head, &Operand::token});
  return make_operand(view, num_lead_axes, {&Operand::batch, &Operand::head, &Operand::token});
}

Operand head_operand(const TensorView& view, int num_lead_axes, bool is_varlen) {
  if (is_varlen) return make_operand(view, num_lead_axes, {&Operand::head});
  return make_operand(view, num_lead_axes, {&Operand::batch, &Operand::head});
}

SoftCap make_soft_cap(double softcap, double scale) {
  // Beyond 1e30 a cap changes no float32 score that it does not flush to zero in the division. Below the smallest
  // normal float it would itself be flushed, and there all scores are 0 to float32.
  SoftCap result;
  result.is_on = softcap > 0.0 && softcap < 1e30;
  if (!result.is_on) return result;
  constexpr double kSmallest = std::numeric_limits<float>::min();
  constexpr double kLargest = std::numeric_limits<float>::max();
  result.cap = static_cast<float>(std::max(softcap, kSmallest));
  result.scale_over_cap = static_cast<float>(std::clamp(scale / softcap, -kLargest, kLargest));
  return result;
}

ForwardPlan make_forward_plan(const AttentionProblem& problem, const AttentionForwardArgs& args) {
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
  plan.q = token_operand(args.q, lead, plan.is_varlen);
  plan.k = token_operand(args.k, lead, plan.is_varlen);
  plan.v = token_operand(args.v, lead, plan.is_varlen);
  plan.out = token_operand(args.out, lead, plan.is_varlen);
  plan.lse = row_operand(args.lse, lead, plan.is_varlen);
  plan.sinks = make_operand(args.sinks, lead, {&Operand::head});
  plan.alibi_slopes = make_operand(args.alibi_slopes, lead, {&Operand::head});
  plan.q_segment_ids = make_operand(args.q_segment_ids, lead, {&Operand::batch, &Operand::token});
  plan.kv_segment_ids = make_operand(args.kv_segment_ids, lead, {&Operand::batch, &Operand::token});
  plan.cu_seqlens_q = make_operand(args.cu_seqlens_q, lead, {&Operand::token});
  plan.cu_seqlens_k = make_operand(args.cu_seqlens_k, lead, {&Operand::token});
  plan.seqused_k = make_operand(args.seqused_k, lead, {&Operand::token});

  plan.window_left = problem.window_left;
  plan.window_right = problem.window_right;
  plan.is_bottom_right = problem.causal_align == CausalAlign::kBottomRight;
  plan.scale = std::abs(problem.softmax_scale);
  plan.negates_q = problem.softmax_scale < 0.0;
  const SoftCap soft_cap = make_soft_cap(problem.softcap, plan.scale);
  plan.has_softcap = soft_cap.is_on;
  plan.softcap = soft_cap.cap;
  plan.scale_over_cap = soft_cap.scale_over_cap;
  // A scale near 0 must not meet the -inf of a masked score, and one near the largest float must not overflow when it
  // becomes the factor of a base-2 exponent.
  plan.has_score_transform =
      plan.has_softcap || plan.alibi_slopes.data != nullptr || plan.scale < 1e-30 || plan.scale > 1e38;
  return plan;
}

}  // namespace heed::cpu
