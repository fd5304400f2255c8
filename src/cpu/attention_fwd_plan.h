// What the CPU attention forward kernel is told: one call, resolved to pointers, strides and numbers. Independent of
// the instruction set. Strides count elements.
#pragma once

#include <array>
#include <cstdint>

#include "heed/heed.h"
#include "variants/band.h"

namespace heed::cpu {

inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxLeadAxes = kMaxRank - 4;

// One operand; axes that it lacks, and leading axes that it broadcasts over, have stride 0.
struct Operand {
  void* data = nullptr;  // nullptr: absent
  std::array<int64_t, kMaxLeadAxes> lead{};
  int64_t batch = 0, token = 0, head = 0, dim = 0;
};

struct ForwardPlan {
  DType dtype{};
  int num_lead_axes = 0;
  std::array<int64_t, kMaxLeadAxes> lead_sizes{};
  int64_t num_problems = 0;  // product of the leading axes and the batch
  int64_t batch = 0, q_len = 0, kv_len = 0, num_kv_heads = 0;
  int64_t group = 0;  // query heads per KV head
  int head_dim_qk = 0, head_dim_v = 0;

  Operand q;               // [.., B, Lq, Hq, D]
  Operand k;               // [.., B, Lk, Hk, D]
  Operand v;               // [.., B, Lk, Hk, Dv]
  Operand sinks;           // [.., Hq] float32, optional
  Operand alibi_slopes;    // [.., Hq] float32, optional
  Operand q_segment_ids;   // [.., B, Lq] int32, optional
  Operand kv_segment_ids;  // [.., B, Lk] int32, optional
  Operand out;             // [.., B, Lq, Hq, Dv]
  Operand lse;             // [.., B, Hq, Lq] float32, optional

  variants::Band band;
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

}  // namespace heed::cpu
