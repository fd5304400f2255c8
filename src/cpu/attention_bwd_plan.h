// What the CPU attention backward kernel is told: one call, resolved to pointers, strides and numbers, and how its
// workspace is laid out. Independent of the instruction set.
#pragma once

#include <cstdint>

#include "core/attention_bwd_problem.h"
#include "cpu/attention_fwd_plan.h"
#include "heed/heed.h"

namespace heed::cpu {

// Rows of a row block: queries of all heads of a group, as in the forward pass.
inline constexpr int kBlockRows = 96;
// Keys of a chunk are a multiple of this, which all register tiles divide.
inline constexpr int kChunkStep = 48;
inline constexpr int kMaxChunkKeys = 192;

// Most keys of a chunk: its K and V, both ways round, and dK and dV stay in the L2 cache.
inline int max_chunk_keys(int64_t head_dim_qk, int64_t head_dim_v) {
  return head_dim_qk + head_dim_v <= 256 ? kMaxChunkKeys : kMaxChunkKeys / 2;
}

struct BackwardPlan {
  ForwardPlan forward;      // its `out` and `lse` are inputs here
  Operand dout;             // as forward.out
  Operand dlse;             // as forward.lse, optional
  Operand dq, dk, dv;       // as q, k, v
  Operand dsinks;           // [.., B, Hq] or [.., Hq] float32, optional
  Operand dalibi_slopes;    // [.., B, Hq] or [.., Hq] float32, optional
  float* workspace;         // [problems][num_kv_heads][group * workspace_per_head]
  float scale;              // with its sign
  float scale_over_cap;     // with its sign
  int max_chunk_keys = 0;   //
  bool has_chunks = false;  // rows may see keys of more than one chunk
};

// The workspace of one KV head of one problem. Row r is head r % group of the group at query r / group.
struct HeadWorkspace {
  float* dq = nullptr;            // [rows][head_dim_qk]: the sum over the chunks so far, if plan.has_chunks
  float* delta = nullptr;         // [rows]: <dout, out> - dlse
  int32_t* next_chunk = nullptr;  // [rows]: whose turn it is to add to a row block, at its first row, if has_chunks
  float* slope = nullptr;         // [rows]: what the row adds to its head's dalibi_slopes
};

// Floats per query head of one problem.
inline int64_t workspace_per_head(int64_t q_len, int64_t head_dim_qk, bool has_chunks, bool has_alibi) {
  return q_len * ((has_chunks ? head_dim_qk + 1 : 0) + 1 + (has_alibi ? 1 : 0));
}

inline HeadWorkspace head_workspace(const BackwardPlan& plan, int64_t problem, int64_t kv_head) {
  const ForwardPlan& forward = plan.forward;
  const bool has_alibi = forward.alibi_slopes.data != nullptr;
  const int64_t rows = forward.q_len * forward.group;
  float* at = plan.workspace + (problem * forward.num_kv_heads + kv_head) * forward.group *
                                   workspace_per_head(forward.q_len, forward.head_dim_qk, plan.has_chunks, has_alibi);
  HeadWorkspace result;
  result.delta = at;
  at += rows;
  if (has_alibi) {
    result.slope = at;
    at += rows;
  }
  if (plan.has_chunks) {
    result.next_chunk = reinterpret_cast<int32_t*>(at);
    result.dq = at + rows;
  }
  return result;
}

BackwardPlan make_backward_plan(const AttentionBwdProblem& problem, const AttentionBackwardArgs& args);

}  // namespace heed::cpu
