// What the CPU attention forward kernel is told: one call, resolved to pointers, strides and numbers. Independent of
// the instruction set. Strides count elements.
#pragma once

#include <array>
#include <cstdint>

#include "core/problem.h"
#include "heed/heed.h"
#include "variants/band.h"

namespace heed::cpu {

inline constexpr int kMaxHeadDim = 256;

// One operand; axes that it lacks, and leading axes that it broadcasts over, have stride 0.
struct Operand {
  void* data = nullptr;  // nullptr: absent
  std::array<int64_t, kMaxLeadAxes> lead{};
  int64_t batch = 0, token = 0, head = 0, dim = 0;
};

template <class T>
inline void advance(Operand& operand, int64_t elements) {
  if (operand.data != nullptr) operand.data = static_cast<T*>(operand.data) + elements;
}

// Soft cap of scores: cap * tanh(scale_over_cap * product).
struct SoftCap {
  bool is_on = false;
  float cap = 0.0f;             // a normal number if on
  float scale_over_cap = 0.0f;  // finite
};
SoftCap make_soft_cap(double softcap, double scale);

struct ForwardPlan {
  DType dtype{};
  int num_lead_axes = 0;
  std::array<int64_t, kMaxLeadAxes> lead_sizes{};
  int64_t num_problems = 0;  // product of the leading axes and, in a dense batch, the batch
  bool is_varlen = false;
  int64_t num_sequences = 0;  // of a batch of variable lengths; its operands have no batch axis: `batch` is 1
  int64_t batch = 0, q_len = 0, kv_len = 0, num_kv_heads = 0;
  int64_t group = 0;  // query heads per KV head
  int head_dim_qk = 0, head_dim_v = 0;

  Operand q;               // [.., B, Lq, Hq, D] or [.., Tq, Hq, D]
  Operand k;               // [.., B, Lk, Hk, D] or [.., Tk, Hk, D]
  Operand v;               // [.., B, Lk, Hk, Dv] or [.., Tk, Hk, Dv]
  Operand sinks;           // [.., Hq] float32, optional
  Operand alibi_slopes;    // [.., Hq] float32, optional
  Operand q_segment_ids;   // [.., B, Lq] int32, optional
  Operand kv_segment_ids;  // [.., B, Lk] int32, optional
  Operand cu_seqlens_q;    // [.., B + 1] int32, of a batch of variable lengths
  Operand cu_seqlens_k;    // [.., B + 1] int32, optional
  Operand seqused_k;       // [.., B] int32, optional
  Operand out;             // [.., B, Lq, Hq, Dv] or [.., Tq, Hq, Dv]
  Operand lse;             // [.., B, Hq, Lq] or [.., Hq, Tq] float32, optional

  // Causal masks and windows, as variants::make_band() takes them.
  int64_t window_left = -1, window_right = -1;
  bool is_bottom_right = true;
  // The band of one sequence.
  variants::Band band(int64_t sequence_q_len, int64_t sequence_kv_len) const {
    return variants::make_band(sequence_q_len, sequence_kv_len, window_left, window_right, is_bottom_right);
  }

  // Scores. If `has_score_transform`, the tile of raw products is first turned into scores in natural units; if not,
  // the scale is folded into the exponent. Queries are negated while packing if `negates_q`, so that the scale is never
  // < 0.
  bool has_score_transform = false;
  bool negates_q = false;
  double scale = 0.0;  // >= 0
  bool has_softcap = false;
  float softcap = 0.0f;         // a normal number if has_softcap
  float scale_over_cap = 0.0f;  // finite
};

// Operands of views, which have `num_lead_axes` leading axes and then those that the comment names.
Operand token_operand(const TensorView& view, int num_lead_axes, bool is_varlen);  // [B, L, H, D] or [T, H, D]
Operand row_operand(const TensorView& view, int num_lead_axes, bool is_varlen);    // [B, H, L] or [H, T]
Operand head_operand(const TensorView& view, int num_lead_axes, bool is_varlen);   // [B, H] or [H]

ForwardPlan make_forward_plan(const AttentionProblem& problem, const AttentionForwardArgs& args);

// Which of the plan's problems: its place along each leading axis and in the batch.
struct ProblemIndex {
  std::array<int64_t, kMaxLeadAxes> lead{};
  int64_t batch = 0;
};

inline ProblemIndex split_problem(const ForwardPlan& plan, int64_t problem) {
  ProblemIndex index;
  index.batch = problem % plan.batch;
  for (int64_t axis = plan.num_lead_axes - 1, rest = problem / plan.batch; axis >= 0; --axis) {
    index.lead[axis] = rest % plan.lead_sizes[axis];
    rest /= plan.lead_sizes[axis];
  }
  return index;
}

// Elements from an operand's first one to the problem's first one.
inline int64_t offset_of(const ForwardPlan& plan, const Operand& operand, const ProblemIndex& index) {
  int64_t elements = index.batch * operand.batch;
  for (int axis = 0; axis < plan.num_lead_axes; ++axis) elements += index.lead[axis] * operand.lead[axis];
  return elements;
}

}  // namespace heed::cpu
