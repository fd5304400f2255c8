// From a backward problem and its tensors to what the CPU attention backward kernel is told.
#include "cpu/attention_bwd_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace heed::cpu {

BackwardPlan make_backward_plan(const AttentionBwdProblem& problem, const AttentionBackwardArgs& args) {
  AttentionForwardArgs forward;
  forward.q = args.q, forward.k = args.k, forward.v = args.v;
  forward.sinks = args.sinks, forward.alibi_slopes = args.alibi_slopes;
  forward.q_segment_ids = args.q_segment_ids, forward.kv_segment_ids = args.kv_segment_ids;
  forward.cu_seqlens_q = args.cu_seqlens_q, forward.cu_seqlens_k = args.cu_seqlens_k;
  forward.seqused_k = args.seqused_k;
  forward.out = args.out, forward.lse = args.lse;

  BackwardPlan plan{};
  plan.forward = make_forward_plan(problem.forward, forward);
  const int lead = plan.forward.num_lead_axes;
  const bool is_varlen = plan.forward.is_varlen;
  plan.dout = token_operand(args.dout, lead, is_varlen);
  plan.dlse = row_operand(args.dlse, lead, is_varlen);
  plan.dq = token_operand(args.dq, lead, is_varlen);
  plan.dk = token_operand(args.dk, lead, is_varlen);
  plan.dv = token_operand(args.dv, lead, is_varlen);
  plan.dsinks = head_operand(args.dsinks, lead, is_varlen);
  plan.dalibi_slopes = head_operand(args.dalibi_slopes, lead, is_varlen);
  plan.workspace = static_cast<float*>(args.workspace.data);

  constexpr double kLargest = std::numeric_limits<float>::max();
  plan.scale = static_cast<float>(std::clamp(problem.forward.softmax_scale, -kLargest, kLargest));
  plan.scale_over_cap = std::copysign(plan.forward.scale_over_cap, plan.scale);
  plan.max_chunk_keys = max_chunk_keys(plan.forward.head_dim_qk, plan.forward.head_dim_v);
  plan.has_chunks = plan.forward.kv_len > plan.max_chunk_keys;
  return plan;
}

}  // namespace heed::cpu
