// What the portable attention forward kernel is specialised for, its tile table and its parameters: shared by the host
// side (sm80_attention_fwd.cc) and the device code (device/sm80_attention_fwd.cuh). Includes nothing from std: NVRTC
// compiles it too.
#pragma once

#include "cuda/attention_spec.h"

namespace heed::cuda {

// Everything that the machine code depends on; lengths, strides, masks and windows are run-time values.
struct Sm80AttentionFwdSpec {
  Element element = Element::kBFloat16;
  int head_dim_qk = 128;   // rounded up to what one instruction step takes (32 bytes)
  int head_dim_v = 128;    // rounded up likewise
  bool is_aligned = true;  // rows start at multiples of 16 bytes and their elements are adjacent: copied asynchronously
  bool is_varlen = false;
  bool has_segment_ids = false;
  bool has_softcap = false;
  bool has_alibi = false;
  bool scales_first = false;  // scores take their scale before the maximum: one that is negative, 0 or extreme

  HEED_HOST_DEVICE constexpr bool has_score_transform() const { return has_softcap || has_alibi || scales_first; }
};

// How a block of threads divides the work: q_rows x kv_rows scores a step.
struct Sm80AttentionFwdTile {
  int num_warps;
  int rows_per_warp;  // 32: half the shared memory reads per product of 16, if the registers suffice
  int kv_rows;
  int num_stages;  // 2: K and V tiles in use and in flight; 1: K and V take turns
  int min_blocks;  // per multiprocessor, where its shared memory suffices for them

  HEED_HOST_DEVICE constexpr int num_threads() const { return num_warps * 32; }
  HEED_HOST_DEVICE constexpr int q_rows() const { return num_warps * rows_per_warp; }
};

// All tiles fit the 99 KiB of shared memory that a block may have on every GPU since Ampere.
HEED_HOST_DEVICE constexpr Sm80AttentionFwdTile sm80_attention_fwd_tile(const Sm80AttentionFwdSpec& spec) {
  const int dim = spec.head_dim_qk > spec.head_dim_v ? spec.head_dim_qk : spec.head_dim_v;
  if (spec.element == Element::kFloat32) {
    if (dim <= 128) return {4, 16, 32, 2, 1};
    return {4, 16, 16, 1, 1};  // rows of 1 KiB: a second stage does not fit
  }
  if (!spec.is_aligned) return {4, dim <= 128 ? 32 : 16, 32, 2, 2};  // its copies are slow and take registers
  // More keys a step are faster as long as the registers suffice (docs/kernel-notes.md).
  const bool is_plain = !spec.has_score_transform() && !spec.has_segment_ids;
  if (dim <= 64) return {4, 32, is_plain ? 128 : 64, 2, 2};
  if (dim <= 128) return {4, 32, spec.has_score_transform() ? 32 : is_plain ? 64 : 48, 2, 2};
  // 128 accumulators a thread are all that fit. One stage of 64 keys beats two of 32 (docs/kernel-notes.md).
  if (dim > 192) return {4, 16, 64, 1, 2};
  return {4, 16, 32, 2, 2};
}

// Q, then the stages of K and V. The output tile reuses Q's memory.
HEED_HOST_DEVICE constexpr int sm80_attention_fwd_shared_bytes(const Sm80AttentionFwdSpec& spec) {
  const Sm80AttentionFwdTile tile = sm80_attention_fwd_tile(spec);
  const int qk_row_bytes = sm80_row_bytes(spec.element, spec.head_dim_qk);
  const int v_row_bytes = sm80_row_bytes(spec.element, spec.head_dim_v);
  const int q_row_bytes = qk_row_bytes > v_row_bytes ? qk_row_bytes : v_row_bytes;
  return tile.q_rows() * q_row_bytes + tile.num_stages * tile.kv_rows * (qk_row_bytes + v_row_bytes);
}

struct Sm80AttentionFwdParams : AttentionParams {
  DeviceOperand out;  // [.., B, Lq, Hq, Dv]; varlen [.., Tq, Hq, Dv]
  DeviceOperand lse;  // [.., B, Hq, Lq]; varlen [.., Hq, Tq] float32, optional
};

}  // namespace heed::cuda
