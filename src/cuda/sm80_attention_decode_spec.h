// What the GPU kernels of attention of one query are specialised for, their tile table, workspace and parameters:
// shared by the host side (sm80_attention_decode.cc) and the device code (device/sm80_attention_decode.cuh,
// device/attention_decode_merge.cuh). Includes nothing from std: NVRTC compiles it too.
#pragma once

#include "cuda/row_spec.h"

namespace heed::cuda {

// Everything that the machine code depends on; lengths, strides, windows, soft caps and slopes are run-time values.
struct Sm80AttentionDecodeSpec {
  Element element = Element::kBFloat16;
  int head_dim_qk = 128;   // rounded up to a multiple of 16
  int head_dim_v = 128;    // likewise
  int query_rows = 8;      // query heads of one KV head that a block serves: up to 8, or up to 16
  bool is_aligned = true;  // rows start at multiples of 16 bytes and their elements are adjacent: copied asynchronously
  bool has_rope = false;
};

// How a block of threads divides the work: each warp has keys of its own, `keys` at a time, and a ring of `num_slots`
// tiles that hold K and V of them in turn.
struct Sm80AttentionDecodeTile {
  int num_warps;
  int keys;
  int num_slots;

  HEED_HOST_DEVICE constexpr int num_threads() const { return num_warps * 32; }
};

HEED_HOST_DEVICE constexpr int sm80_attention_decode_slot_bytes(const Sm80AttentionDecodeSpec& spec, int keys) {
  const int qk_row_bytes = sm80_row_bytes(spec.element, spec.head_dim_qk);
  const int v_row_bytes = sm80_row_bytes(spec.element, spec.head_dim_v);
  return keys * (qk_row_bytes > v_row_bytes ? qk_row_bytes : v_row_bytes);
}

// What a block may have: 227 KiB on 9.0, 10.0 and 10.3, 163 on 8.0 and 8.7, and 99 on 8.6, 8.9 and 12.0.
HEED_HOST_DEVICE constexpr int most_shared_bytes(int arch) {
  if (arch == 86 || arch == 89 || arch >= 120) return 99 << 10;
  return (arch >= 90 ? 227 : 163) << 10;
}

HEED_HOST_DEVICE constexpr Sm80AttentionDecodeTile sm80_attention_decode_tile(const Sm80AttentionDecodeSpec& spec,
                                                                              int arch) {
  // Memory keeps up with its bandwidth when some 60 KiB per multiprocessor are on their way. Of rings of this size five
  // sixths are, and two blocks fit a large multiprocessor. Four warps have fewer parts to merge than eight.
  constexpr int kRingBytes = 96 << 10, kSmallRingBytes = 60 << 10;
  constexpr int kKeys = 16, kMostWarps = 4, kMostSlots = 6;
  const int ring_bytes = most_shared_bytes(arch) <= 99 << 10 ? kSmallRingBytes : kRingBytes;
  const int slot_bytes = sm80_attention_decode_slot_bytes(spec, kKeys);
  Sm80AttentionDecodeTile tile{kMostWarps, kKeys, 2};
  while (tile.num_warps > 1 && tile.num_warps * 2 * slot_bytes > ring_bytes) tile.num_warps /= 2;
  const int num_slots = ring_bytes / (tile.num_warps * slot_bytes);
  if (num_slots > tile.num_slots) tile.num_slots = num_slots < kMostSlots ? num_slots : kMostSlots;
  return tile;
}

// The largest cluster: of larger ones, which not every GPU has, fewer fit, and more blocks have to meet
// (docs/kernel-notes.md).
inline constexpr int kMaxDecodeCluster = 8;

// The query tile, then each warp's ring, which becomes its part of the output, then the warps' statistics, the angles,
// and what the other blocks of the cluster send: their outputs of this block's share of the columns, and statistics.
struct Sm80AttentionDecodeShared {
  int rings, ring_bytes, statistics, turns, sent, sent_statistics, bytes;
};

// Floats between rows of a part of the output: four more than it has columns, so that a warp's stores meet no bank
// twice.
HEED_HOST_DEVICE constexpr int decode_part_row(int head_dim_v) { return head_dim_v + 4; }

HEED_HOST_DEVICE constexpr Sm80AttentionDecodeShared sm80_attention_decode_shared(const Sm80AttentionDecodeSpec& spec,
                                                                                  int arch) {
  const Sm80AttentionDecodeTile tile = sm80_attention_decode_tile(spec, arch);
  const int slots_bytes = tile.num_slots * sm80_attention_decode_slot_bytes(spec, tile.keys);
  const int part_bytes = spec.query_rows * decode_part_row(spec.head_dim_v) * 4;
  const int statistics_bytes = spec.query_rows * 8;
  Sm80AttentionDecodeShared shared{};
  shared.rings = spec.query_rows * sm80_row_bytes(spec.element, spec.head_dim_qk);
  shared.ring_bytes = round_up(slots_bytes > part_bytes ? slots_bytes : part_bytes, 1024);
  shared.statistics = shared.rings + tile.num_warps * shared.ring_bytes;
  shared.turns = shared.statistics + tile.num_warps * statistics_bytes;
  shared.sent = shared.turns + (spec.has_rope ? kMaxRopePairs * 8 : 0);
  const bool has_clusters = arch >= 90;
  // Shares of the columns are whole chunks of four floats: up to a chunk more for each block.
  shared.sent_statistics =
      shared.sent + (has_clusters ? (spec.query_rows * spec.head_dim_v + kMaxDecodeCluster * 4) * 4 : 0);
  shared.bytes = shared.sent_statistics + (has_clusters ? kMaxDecodeCluster * statistics_bytes : 0);
  return shared;
}

// The workspace of one query head: the output of each piece, not yet divided by the sum of its weights, [pieces][row],
// then the largest score and the sum of each, [pieces][2].
struct DecodeWorkspace {
  int row;  // floats of one output: head_dim_v, rounded up to a multiple of 16
  int floats;
};
HEED_HOST_DEVICE constexpr DecodeWorkspace decode_workspace(int num_pieces, int head_dim_v) {
  const int row = round_up(head_dim_v, 16);
  return {row, num_pieces > 1 ? round_up(num_pieces * (row + 2), 4) : 0};
}

// As DeviceOperand, but strides count bytes, and those over leading axes are apart.
struct DecodeOperand {
  char* data;  // null: absent
  long long token_bytes, head_bytes, dim_bytes;
};
enum DecodeOperandIndex : int { kDecodeQ, kDecodeK, kDecodeV, kDecodeSinks, kDecodeSlopes, kDecodeOut, kDecodeLse };
inline constexpr int kNumDecodeOperands = 7;

// In the order in which blocks read it, so that what comes before the first copies lies in few cache lines.
struct Sm80AttentionDecodeParams {
  Divisor num_kv_heads, num_pieces;  // a piece is one cluster's; pieces are merged by a second kernel
  Divisor row_tiles;                 // blocks that share the query heads of one KV head
  int cluster_log2;                  // blocks per cluster, which share a piece
  int group;                         // query heads per KV head
  int has_lead;                      // more than one index over the leading axes
  int head_dim_qk, head_dim_v;       // as the caller gave them
  int first_key, num_keys;           // of those that the query sees; it is at the last one
  DecodeOperand q;                   // [.., Hq, D]
  DecodeOperand k;                   // [.., S, Hk, D] in either order, from the first key on that the query sees
  DecodeOperand v;                   // [.., S, Hk, Dv] likewise

  float scale, softcap, scale_over_cap;  // no soft cap: 0
  DecodeOperand sinks;                   // [.., Hq] float32, optional
  DecodeOperand alibi_slopes;            // [.., Hq] float32, optional
  DecodeOperand out;                     // [.., Hq, Dv]
  DecodeOperand lse;                     // [.., Hq] float32, optional
  float* workspace;                      // [.., Hq, decode_workspace().floats], with more than one piece

  RowAxes<kNumDecodeOperands> lead;  // leading axes; strides in bytes
};

// Pair j turns by turns[j] / 2^64 of a full turn from one position to the next.
struct Sm80AttentionDecodeRopeParams : Sm80AttentionDecodeParams {
  unsigned long long turns[kMaxRopePairs];
};

// What the second kernel is specialised for.
struct AttentionDecodeMergeSpec {
  Element element = Element::kBFloat16;
};

}  // namespace heed::cuda
