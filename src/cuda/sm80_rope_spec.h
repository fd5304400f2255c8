// What the portable kernel of rotary embeddings is specialised for, how it divides the work, and its parameters: shared
// by the host side (sm80_rope.cc) and the device code (device/sm80_rope.cuh). Includes nothing from std: NVRTC compiles
// it too.
#pragma once

#include "cuda/row_spec.h"

namespace heed::cuda {

struct Sm80RopeSpec {
  Element element = Element::kBFloat16;
  bool is_aligned = true;    // every part of every row starts at a multiple of 16 bytes
  bool interleaves = false;  // pairs (2i, 2i + 1)
  bool has_pos_ids = false;  // else sequences
  bool has_cache = false;    // cosines and sines are read, not computed
  int heads = 2;             // of one token that a thread has in flight at once

  HEED_HOST_DEVICE friend constexpr bool operator==(const Sm80RopeSpec&, const Sm80RopeSpec&) = default;
};

inline constexpr int kRopeThreads = 256;

// Fills in how many heads of a token a thread has in flight at once, and returns how many it takes in all. A thread
// that takes several uses its sines for all of them; a small call gets as many threads as there is work. 2 heads are
// 64 bytes of loads for each thread.
HEED_HOST_DEVICE constexpr int set_heads(Sm80RopeSpec& spec, long long num_tokens, int num_heads, int chunks_per_head) {
  const long long all = num_tokens * num_heads * chunks_per_head;
  const bool is_small = all < (1 << 18);
  spec.heads = is_small ? 1 : 2;
  return is_small ? 1 : 4;
}

struct Sm80RopeParams {
  enum Operand : int { kQ, kK, kQRope, kKRope, kIndptr, kOffsets, kPosIds, kCache, kNumOperands };

  void* data[kNumOperands];
  RowAxes<kNumOperands> leads;
  // [lead.., n, heads, D]; [lead.., B + 1]; [lead.., B]; [lead.., n]; [lead.., max_position, rotary_dim]
  long long token_strides[kNumOperands];  // of the axis after the leading ones
  long long head_strides[4];
  long long element_strides[kNumOperands];  // of the last axis of q, k, q_rope, k_rope and the cache

  int num_q_heads, num_heads;  // of q; of q and k
  int head_dim, rotary_dim;
  int num_sequences, max_position;
  Divisor num_tokens;         // of a leading index
  Divisor threads_per_token;  // for each pair of chunks
  Divisor chunks_per_head;    // pairs of chunks
  unsigned num_slots;         // tokens of all leading indices * threads_per_token
  int slots_per_block;
  bool is_inverse;
  // The turns, as fractions of 2^64, that pair i makes from one position to the next. Whole turns do not matter, so
  // that the product with a position is exact where it overflows.
  unsigned long long turns[kMaxRopePairs];
};

}  // namespace heed::cuda
