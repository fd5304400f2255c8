// What the Hopper attention forward kernel is specialised for, its tile table, its shared memory and its parameters:
// shared by the host side (sm90_attention_fwd.cc) and the device code (device/sm90_attention_fwd.cuh). Includes nothing
// from std: NVRTC compiles it too.
#pragma once

#include "cuda/attention_spec.h"
#include "cuda/tensor_map.h"
#include "variants/band.h"

namespace heed::cuda {

// Everything that the machine code depends on; lengths, strides, the sizes of windows and scales are run-time values.
struct Sm90AttentionFwdSpec {
  Element element = Element::kBFloat16;  // 16 bits
  int head_dim_qk = 128;                 // rounded up to a multiple of 16
  int head_dim_v = 128;                  // rounded up likewise
  bool is_varlen = false;
  bool has_mask = false;  // some row does not see some key
  bool has_segment_ids = false;
  bool has_softcap = false;
  bool has_alibi = false;
  bool scales_first = false;  // scores take their scale before the maximum: one that is negative, 0 or extreme
  // A tile has rows of several heads of a group, which read the same keys: for few rows a head. Not with packed
  // sequences, segment ids or ALiBi.
  bool packs_heads = false;
  // The last tiles are shared out by steps, not whole: dense, all tiles touch the same keys, and Q in registers.
  bool splits_steps = false;
  bool is_tall = false;  // tiles of more query rows, where `has_tall_tile`; faster where sequences are long

  HEED_HOST_DEVICE constexpr bool has_score_transform() const { return has_softcap || has_alibi || scales_first; }
  HEED_HOST_DEVICE constexpr bool has_tall_tile() const {
    return head_dim_qk <= 64 && head_dim_v <= 64 && !has_score_transform() && !has_segment_ids;
  }
};

// A row of an operand in shared memory is cut into parts of 64 elements, 128 bytes, which tensor maps swizzle.
inline constexpr int kPartColumns = 64;
inline constexpr int kPartRowBytes = 128;
HEED_HOST_DEVICE constexpr int parts_of(int head_dim) { return (head_dim + kPartColumns - 1) / kPartColumns; }

// How a block of threads divides the work. The rows of a tensor map's box: Q 64, K and V kv_rows, out 16.
struct Sm90AttentionFwdTile {
  int num_consumers;        // warpgroups that compute, 64 query rows each; one more loads
  int kv_rows;              // of a step
  int num_slots;            // K and V tiles in use and in flight
  bool has_q_in_registers;  // Q moves there. Otherwise it stays in shared memory until its last step
  bool has_out_in_shared;   // the output leaves through shared memory of its own. Otherwise it leaves from registers
  // Columns of a step's scores, of 8 keys each, that are exponentials before the products with V have to be done.
  int num_early_columns;

  HEED_HOST_DEVICE constexpr int num_threads() const { return (num_consumers + 1) * 128; }
  HEED_HOST_DEVICE constexpr int q_rows() const { return num_consumers * 64; }
  // What a launch gives each thread, 168 registers with two consumers and 128 with three, moves to these.
  HEED_HOST_DEVICE constexpr int consumer_registers() const { return num_consumers == 2 ? 224 : 160; }
  HEED_HOST_DEVICE constexpr int producer_registers() const { return num_consumers == 2 ? 56 : 32; }
};

// A step has as many keys as there are registers for: a thread holds kv_rows / 2 scores, half as many registers of
// probabilities, head_dim_v / 2 of the output and head_dim_qk / 4 of Q.
HEED_HOST_DEVICE constexpr Sm90AttentionFwdTile sm90_attention_fwd_tile(const Sm90AttentionFwdSpec& spec) {
  const int early = spec.has_mask ? 4 : 6;
  const int dim = spec.head_dim_qk > spec.head_dim_v ? spec.head_dim_qk : spec.head_dim_v;
  if (spec.is_tall) return {3, 128, 8, false, true, 4};
  if (dim <= 64) return {2, 128, 8, true, true, early};
  if (dim <= 128) return {2, 128, 5, true, true, early};
  if (dim <= 192 && spec.head_dim_v <= 128) return {2, 96, 4, true, true, 4};
  if (dim <= 192) return {2, 96, 4, false, false, 4};
  return {2, 64, 5, false, false, 4};
}

// A block's shared memory: offsets from its start, which is a multiple of 1024 bytes. A slot holds K or V of a step,
// part after part; Q and the output lie warpgroup after warpgroup.
struct Sm90AttentionFwdLayout {
  int k_bytes, v_bytes, slot_bytes;
  int q_bytes, out_bytes;  // of a warpgroup
  int q, out, control;
  int bytes;
};

inline constexpr int kMostPackedHeads = 16;          // a box of the output has so many rows
inline constexpr int kSm90ControlBytes = 1024;       // barriers and what the tiles in flight are (device code)
inline constexpr int kSm90SharedBytes = 227 * 1024;  // that a block may have

HEED_HOST_DEVICE constexpr Sm90AttentionFwdLayout sm90_attention_fwd_layout(const Sm90AttentionFwdSpec& spec) {
  const Sm90AttentionFwdTile tile = sm90_attention_fwd_tile(spec);
  Sm90AttentionFwdLayout layout = {};
  layout.k_bytes = tile.kv_rows * parts_of(spec.head_dim_qk) * kPartRowBytes;
  layout.v_bytes = tile.kv_rows * parts_of(spec.head_dim_v) * kPartRowBytes;
  layout.slot_bytes = layout.k_bytes > layout.v_bytes ? layout.k_bytes : layout.v_bytes;
  layout.q_bytes = 64 * parts_of(spec.head_dim_qk) * kPartRowBytes;
  layout.out_bytes = tile.has_out_in_shared ? 64 * parts_of(spec.head_dim_v) * kPartRowBytes : 0;
  layout.q = tile.num_slots * layout.slot_bytes;
  layout.out = layout.q + tile.num_consumers * layout.q_bytes;
  layout.control = layout.out + tile.num_consumers * layout.out_bytes;
  layout.bytes = layout.control + kSm90ControlBytes;
  return layout;
}

// What a part of a tile leaves to whoever merges the parts: a slot of the workspace. For each warp that computes, each
// thread's share of the output, then its references and sums, a row of 512 bytes after the other as the threads have
// them; at the end a flag of 8 bytes for each of these warps.
HEED_HOST_DEVICE constexpr int sm90_attention_fwd_slot_warp_bytes(const Sm90AttentionFwdSpec& spec) {
  return (spec.head_dim_v / 8 + 1) * 512;
}
HEED_HOST_DEVICE constexpr int sm90_attention_fwd_slot_bytes(const Sm90AttentionFwdSpec& spec) {
  return sm90_attention_fwd_tile(spec).num_consumers * 4 * sm90_attention_fwd_slot_warp_bytes(spec) + 128;
}
inline constexpr int kSm90MaxPartsOfTile = 32;  // a lane looks at each

// Keys that any row of a dense call sees. All tiles touch the same ones where a head's rows are one tile, and where
// nothing is masked.
HEED_HOST_DEVICE constexpr variants::Range sm90_attention_fwd_keys(variants::Index q_len, variants::Index kv_len,
                                                                   variants::Index window_left,
                                                                   variants::Index window_right, bool is_bottom_right) {
  const variants::Band band = variants::make_band(q_len, kv_len, window_left, window_right, is_bottom_right);
  return variants::intersect(band.keys_of_any({0, q_len}), {0, kv_len});
}

struct Sm90AttentionFwdParams : AttentionParams {
  TensorMap q_map, k_map, v_map, out_map;
  DeviceOperand out;  // [.., B, Lq, Hq, Dv]; varlen [.., Tq, Hq, Dv]
  DeviceOperand lse;  // [.., B, Hq, Lq]; varlen [.., Hq, Tq] float32, optional
  // Blocks take tiles as they get done, from a counter in 16 bytes of memory that may hold anything before the launch
  // but its nonce, which no other launch has: {nonce[3], tiles taken}. Null: each block has its fixed share.
  unsigned* next_tile;
  unsigned nonce[3];
  unsigned num_tiles_in_all;  // num_tiles of each head
  // Dense: heads at the end that are one section whatever section_heads says, so that the last tiles are short ones.
  unsigned num_tail_heads;
  // With packs_heads: a tile has 2^head_shift heads, at most kMostPackedHeads. Its row r is of token r >> head_shift
  // and of head r % 2^head_shift of them, and num_heads counts such packs. Q and the output have tensor maps of these
  // rows.
  int head_shift;
  // Kernels that split: so many tiles are taken whole. The steps of the others, one after the other, are cut into equal
  // parts, at least half as many as there are such tiles and no more than blocks: numbers from num_whole_tiles up to
  // num_tiles_in_all, which counts tiles and parts here. A block takes one part, and nothing after it. Parts times
  // their steps in all fit 32 bits, and no tile is in more than kSm90MaxPartsOfTile parts.
  unsigned num_whole_tiles;
  char* slots;  // of 128 bytes aligned; parts and split tiles together, less 1
};

}  // namespace heed::cuda
