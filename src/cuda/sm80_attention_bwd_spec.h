// What the portable attention backward kernels are specialised for, their tile table, workspace and parameters: shared
// by the host side (sm80_attention_bwd.cc) and the device code (device/sm80_attention_bwd.cuh,
// device/attention_bwd_passes.cuh). Includes nothing from std: NVRTC compiles it too.
#pragma once

#include "cuda/attention_spec.h"

namespace heed::cuda {

// Everything that the machine code of the main pass depends on; lengths, strides, masks and windows are run-time
// values.
struct Sm80AttentionBwdSpec {
  Element element = Element::kBFloat16;
  int head_dim_qk = 128;   // rounded up to a multiple of 16, or of 32 if one of both is above 128
  int head_dim_v = 128;    // rounded up likewise
  bool is_aligned = true;  // rows start at multiples of 16 bytes and their elements are adjacent: copied asynchronously
  bool is_varlen = false;
  bool has_segment_ids = false;
  bool has_softcap = false;
  bool has_alibi = false;
  bool is_deterministic = false;

  // Whether exponents are differences of natural scores and lse, and not of their multiples by log2(e): more accurate,
  // and what score transforms give anyway.
  HEED_HOST_DEVICE constexpr bool is_natural() const {
    return has_softcap || has_alibi || element == Element::kFloat32;
  }
};

// How a block of threads divides the work: kv_rows keys stay, q_rows queries a step pass by.
struct Sm80AttentionBwdTile {
  int key_warps;      // each has rows_per_warp keys
  int rows_per_warp;  // 16 or 32
  int split;          // so many warps share their keys: each has a share of a step's queries, then of the head dims
  int q_rows;
  int q_chunk;      // queries that a warp works on at a time
  int num_stages;   // of Q and dO: 1 in use, 1 in flight and, delayed and split, 1 of the step before
  bool is_delayed;  // what needs other warps' scores is done in the next step: one barrier a step less
  int min_blocks;   // per multiprocessor, where its shared memory suffices for them

  HEED_HOST_DEVICE constexpr int kv_rows() const { return key_warps * rows_per_warp; }
  HEED_HOST_DEVICE constexpr int num_threads() const { return key_warps * split * 32; }
};

// `arch`: 80, 89, 90, ...: a block may have 227 KiB of shared memory on 9.0, 10.0 and 10.3, 163 on 8.0 and 8.7, and 99
// on 8.6, 8.9 and 12.0.
HEED_HOST_DEVICE constexpr Sm80AttentionBwdTile sm80_attention_bwd_tile(const Sm80AttentionBwdSpec& spec, int arch) {
  using Tile = Sm80AttentionBwdTile;
  const int dim = spec.head_dim_qk > spec.head_dim_v ? spec.head_dim_qk : spec.head_dim_v;
  const bool is_small = arch == 86 || arch == 89 || arch >= 120, is_large = arch >= 90 && arch < 120;
  if (spec.element == Element::kFloat32) {
    if (dim <= 64) return Tile{4, 16, 1, 16, 16, 1, false, 1};
    if (dim <= 128) return Tile{is_small ? 2 : 4, 16, 2, 32, 16, 1, false, 1};
    return is_small ? Tile{1, 16, 2, 16, 8, 1, false, 1} : Tile{2, 16, 2, 32, 16, 1, false, 1};
  }
  // Soft caps and slopes take registers that fewer queries at a time leave.
  const int chunk = spec.has_softcap || spec.has_alibi ? 16 : 32;
  if (dim <= 64) return Tile{4, 32, 1, 64, chunk, 2, !is_small, is_large ? 2 : 1};
  if (dim <= 128) {
    if (is_large) return Tile{4, 32, 2, 64, chunk, 3, true, 1};
    return is_small ? Tile{4, 16, 1, 32, chunk, 2, false, 1} : Tile{8, 16, 1, 64, 2 * chunk, 2, true, 1};
  }
  if (is_large) return Tile{2, 32, 4, 64, 16, 2, false, 1};
  return is_small ? Tile{2, 16, 2, 32, 16, 1, false, 1} : Tile{2, 32, 4, 64, 16, 1, false, 1};
}

// K, V, then the stages of Q, dO and the rows' statistics, then dS^T and, if warps share keys, P^T: both twice if they
// are used in the next step. The tiles of dK and dV reuse K's and V's memory.
struct Sm80AttentionBwdShared {
  int v, stages, stage_bytes, out_grad, statistics, ids, scores, score_bytes, weights, bytes;
};

HEED_HOST_DEVICE constexpr Sm80AttentionBwdShared sm80_attention_bwd_shared(const Sm80AttentionBwdSpec& spec,
                                                                            int arch) {
  const Sm80AttentionBwdTile tile = sm80_attention_bwd_tile(spec, arch);
  const int qk_row_bytes = sm80_row_bytes(spec.element, spec.head_dim_qk);
  const int v_row_bytes = sm80_row_bytes(spec.element, spec.head_dim_v);
  const int tile_bytes = tile.kv_rows() * sm80_row_bytes(spec.element, tile.q_rows);
  Sm80AttentionBwdShared shared{};
  shared.v = tile.kv_rows() * qk_row_bytes;
  shared.stages = shared.v + tile.kv_rows() * v_row_bytes;
  shared.out_grad = tile.q_rows * qk_row_bytes;  // from here on in a stage
  shared.statistics = shared.out_grad + tile.q_rows * v_row_bytes;
  shared.ids = shared.statistics + tile.q_rows * 8;
  shared.stage_bytes = round_up(shared.ids + (spec.has_segment_ids ? tile.q_rows * 4 : 0), 128);
  shared.scores = shared.stages + tile.num_stages * shared.stage_bytes;
  shared.weights = tile_bytes;  // from here on in a pair of tiles
  shared.score_bytes = tile.split > 1 ? 2 * tile_bytes : tile_bytes;
  shared.bytes = shared.scores + (tile.is_delayed ? 2 : 1) * shared.score_bytes;
  return shared;
}

// The smallest tiles of any architecture: what the workspace has room for.
inline constexpr int kMinBwdRows = 16;
// The most parts of a tile of queries that take turns by themselves: each is one warp's.
inline constexpr int kTurnsPerTile = 8;
// Rows of a block of the passes before and after the main one.
inline constexpr int kBwdPassRows = 64;

// What one query head of one batch row (of all sequences, with variable lengths) has of the workspace, in floats.
struct AttentionBwdWorkspace {
  // First, [q_len][2]: the lse, in the units of the exponents, +inf for a row that takes no part and NaN for one whose
  // lse, dO or, where the lse does not tell, Q is not finite; and rowsum(dO * O) - dlse.
  long long dq;  // [q_len][dq_row], sums of dQ / scale; the elements of 16 columns in the order of accumulators
  // int [..]: a counter of blocks, then how many tiles of keys have added to each part of a tile of queries.
  long long turns;
  long long slopes;  // [..]: what each tile of keys adds to the gradient of the ALiBi slope
  long long floats;  // in all: a multiple of 4
  int dq_row;
  int num_turns, num_slopes;
};

HEED_HOST_DEVICE constexpr AttentionBwdWorkspace attention_bwd_workspace(long long q_len, long long kv_len,
                                                                         long long num_sequences, int head_dim_qk,
                                                                         bool is_deterministic, bool has_alibi) {
  AttentionBwdWorkspace work{};
  work.dq_row = round_up(head_dim_qk, 16);
  work.dq = (2 * q_len + 3) / 4 * 4;
  work.turns = work.dq + q_len * work.dq_row;
  work.num_turns =
      is_deterministic ? static_cast<int>(1 + (q_len / kMinBwdRows + num_sequences + 1) * kTurnsPerTile) : 0;
  work.slopes = work.turns + work.num_turns;
  work.num_slopes = has_alibi ? static_cast<int>(kv_len / kMinBwdRows + num_sequences + 2) : 0;
  work.floats = (work.slopes + work.num_slopes + 3) / 4 * 4;
  return work;
}

struct Sm80AttentionBwdParams : AttentionParams {
  DeviceOperand out;            // as q, with head_dim_v
  DeviceOperand lse;            // [.., B, Hq, Lq]; varlen [.., Hq, Tq] float32
  DeviceOperand dout;           // as out
  DeviceOperand dlse;           // as lse, optional
  DeviceOperand dq, dk, dv;     // as q, k, v
  DeviceOperand dsinks;         // [.., B, Hq]; varlen [.., Hq] float32, with sinks
  DeviceOperand dalibi_slopes;  // likewise, with slopes

  float* workspace;  // [.., B, Hq, floats of `layout`]; varlen [.., Hq, ..]
  AttentionBwdWorkspace layout;
  float lse_factor;  // what the statistics' lse is multiplied with: 1, or log2(e)
};

}  // namespace heed::cuda
