// Rotary position embeddings of queries and keys, for every GPU since Ampere.
//
// Where the bytes go
// ------------------
// Every element is read once and written once; memory is the only limit, as long as enough of it is asked for at once
// and sines cost little. The threads of a block number pairs of chunks: the two of a pair lie rotary_dim / 2 apart, so
// that each holds 8 pairs of elements of 16 bits, whether pairs are neighbours or not. A thread keeps its two chunks'
// place in the head and takes several heads of one token: it issues the loads of 2 heads, looks up the token's position
// while they are under way, computes its 8 sines and cosines once, and uses them for all heads. Tokens, not sequences,
// are divided among blocks: one long sequence fills the GPU as many short ones do. A token finds its sequence by
// bisection.
//
// A thread reads what it writes, and nothing else that is written: q_rope may be q, and k_rope k.
//
// Angles
// ------
// A float32 angle loses the position: at 2^20, 0.06 radians. Here a frequency is a 64-bit fraction of a turn, and the
// angle, as a fraction of a turn too, is the lower half of an integer product: exact for every position, at the cost of
// two multiplications. What remains is a sine between -pi/4 and pi/4.
#pragma once

#include "cuda/device/rotation.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/sm80_rope_spec.h"

namespace heed::cuda {

template <Sm80RopeSpec kSpec>
struct Sm80Rope {
  using Params = Sm80RopeParams;
  static constexpr int kNumThreads = kRopeThreads;
  static constexpr int kMinBlocksPerSm = kSpec.heads == 1 ? 4 : kSpec.element == Element::kFloat32 ? 2 : 3;
  static constexpr int kSharedBytes = 0;

  static constexpr int kWidth = chunk_width(kSpec.element, kSpec.is_aligned);
  static constexpr int kHeads = kSpec.heads;
  static constexpr bool kPairsInside = kSpec.interleaves && kWidth > 1;  // a chunk holds both elements of its pairs
  using Chunk = RowChunk<kSpec.element, kWidth>;

  // Which two chunks of a head are a thread's, and which pairs they hold: `first_pair` and its neighbours; with pairs
  // inside chunks, half of them in each chunk and those of the second from `second_pair` on.
  struct Place {
    int left, right;  // columns
    int first_pair, second_pair;
    bool is_rotated;  // else they are copied
    bool has_right;   // the last one of an odd number of chunks has none

    __device__ __forceinline__ Place(const Params& params, int chunk) {
      const int num_rotated = params.rotary_dim / (2 * kWidth);
      is_rotated = chunk < num_rotated;
      if (!is_rotated) {
        left = params.rotary_dim + 2 * kWidth * (chunk - num_rotated);
        right = left + kWidth;
      } else if (kSpec.interleaves && kWidth == 1) {
        left = 2 * chunk;
        right = left + 1;
      } else {
        left = kWidth * chunk;
        right = left + params.rotary_dim / 2;
      }
      first_pair = kPairsInside ? left / 2 : kWidth * chunk;
      second_pair = right / 2;
      has_right = right < params.head_dim;
    }
    // The pair that sine number i is of.
    __device__ __forceinline__ int pair(int i) const {
      return kPairsInside && i >= kWidth / 2 ? second_pair + i - kWidth / 2 : first_pair + i;
    }
  };

  struct Angles {
    float sine[kWidth], cosine[kWidth];
  };

  // Where a token's heads lie: q, k, q_rope, k_rope.
  struct Token {
    long long offsets[Params::kNumOperands];
    int number;  // of its leading index
  };
  static __device__ __forceinline__ Token token_of(const Params& params, uint32 index) {
    Token token{};
    const uint32 lead = divide(index, params.num_tokens);
    token.number = static_cast<int>(index - lead * params.num_tokens.divisor);
    if (params.leads.count > 0) add_offsets(params.leads, lead, token.offsets);
#pragma unroll
    for (int i = Params::kQ; i <= Params::kKRope; ++i) token.offsets[i] += token.number * params.token_strides[i];
    return token;
  }

  // Chunks of some heads: part, part + step, ...
  struct Heads {
    Chunk left[kHeads], right[kHeads];
  };
  // One head of q and k laid end to end, or of their results.
  struct Head {
    void* data;
    long long offset, element_stride;

    __device__ __forceinline__ Head(const Params& params, const Token& token, int head, Params::Operand q,
                                    Params::Operand k) {
      const bool is_k = head >= params.num_q_heads;
      const int number = is_k ? head - params.num_q_heads : head;
      data = is_k ? params.data[k] : params.data[q];
      offset = (is_k ? token.offsets[k] : token.offsets[q]) +
               number * (is_k ? params.head_strides[k] : params.head_strides[q]);
      element_stride = is_k ? params.element_strides[k] : params.element_strides[q];
    }
    __device__ __forceinline__ long long at(int column) const {
      return offset + column_offset<kSpec.is_aligned>(column, element_stride);
    }
  };
  static __device__ __forceinline__ Heads load(const Params& params, const Token& token, const Place& place,
                                               int first) {
    Heads heads{};
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int number = first + i * static_cast<int>(params.threads_per_token.divisor);
      if (number >= params.num_heads) continue;
      const Head head(params, token, number, Params::kQ, Params::kK);
      heads.left[i] = Chunk::template load<Read::kMayBeResult>(head.data, head.at(place.left));
      if (place.has_right) {
        heads.right[i] = Chunk::template load<Read::kMayBeResult>(head.data, head.at(place.right));
      }
    }
    return heads;
  }

  static __device__ __forceinline__ void store(const Params& params, const Token& token, const Place& place, int first,
                                               const Heads& heads) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int number = first + i * static_cast<int>(params.threads_per_token.divisor);
      if (number >= params.num_heads) continue;
      const Head head(params, token, number, Params::kQRope, Params::kKRope);
      heads.left[i].store(head.data, head.at(place.left));
      if (place.has_right) heads.right[i].store(head.data, head.at(place.right));
    }
  }

  // The token's position. False for one outside every sequence. Whatever indptr holds, nothing beyond it is read.
  static __device__ __forceinline__ bool find_position(const Params& params, const Token& token, long long& position) {
    if constexpr (kSpec.has_pos_ids) {
      const int* pos_ids = static_cast<const int*>(params.data[Params::kPosIds]) + token.offsets[Params::kPosIds];
      position = pos_ids[token.number * params.token_strides[Params::kPosIds]];
      return true;
    }
    if (params.num_sequences == 0) return false;
    const int* indptr = static_cast<const int*>(params.data[Params::kIndptr]) + token.offsets[Params::kIndptr];
    const int* offsets = static_cast<const int*>(params.data[Params::kOffsets]) + token.offsets[Params::kOffsets];
    const long long stride = params.token_strides[Params::kIndptr];
    int sequence = 0;  // the last one that begins at the token or before it, or the first
    int end = params.num_sequences;
    while (end - sequence > 1) {
      const int middle = (sequence + end) / 2;
      (indptr[middle * stride] <= token.number ? sequence : end) = middle;
    }
    const int begins = indptr[sequence * stride];
    const int ends = indptr[(sequence + 1) * stride];
    const long long offset = offsets[sequence * params.token_strides[Params::kOffsets]];
    position = offset + token.number - begins;
    return begins <= token.number && token.number < ends;
  }

  // kCount neighbours of a row of the cache.
  template <int kCount>
  static __device__ __forceinline__ void read(float* to, const float* from, long long stride) {
    if constexpr (kSpec.is_aligned && kCount % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 four = ptx::load_read_only_16(from + i);
        to[i] = __uint_as_float(four.x);
        to[i + 1] = __uint_as_float(four.y);
        to[i + 2] = __uint_as_float(four.z);
        to[i + 3] = __uint_as_float(four.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = from[i * stride];
    }
  }

  static __device__ __forceinline__ Angles angles_of(const Params& params, const Token& token, const Place& place,
                                                     long long position) {
    Angles angles;
    if constexpr (kSpec.has_cache) {
      const long long last = params.max_position - 1;
      const long long row = position < 0 ? 0 : position > last ? last : position;
      const long long stride = params.element_strides[Params::kCache];
      const float* cosines = static_cast<const float*>(params.data[Params::kCache]) + token.offsets[Params::kCache] +
                             row * params.token_strides[Params::kCache];
      const float* sines = cosines + params.rotary_dim / 2 * stride;
      constexpr int kRun = kPairsInside ? kWidth / 2 : kWidth;
#pragma unroll
      for (int i = 0; i < kWidth; i += kRun) {
        read<kRun>(angles.cosine + i, cosines + place.pair(i) * stride, stride);
        read<kRun>(angles.sine + i, sines + place.pair(i) * stride, stride);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        sine_and_cosine(static_cast<uint64>(position) * params.turns[place.pair(i)], angles.sine[i], angles.cosine[i]);
      }
    }
    if (params.is_inverse) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) angles.sine[i] = -angles.sine[i];
    }
    return angles;
  }

  static __device__ __forceinline__ void rotate(float& a, float& b, float sine, float cosine) {
    const float rotated = a * cosine - b * sine;
    b = b * cosine + a * sine;
    a = rotated;
  }
  static __device__ __forceinline__ void rotate(Heads& heads, const Angles& angles) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      float left[kWidth], right[kWidth];
      heads.left[head].to_floats(left);
      heads.right[head].to_floats(right);
      if constexpr (kPairsInside) {
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) {
          rotate(left[2 * i], left[2 * i + 1], angles.sine[i], angles.cosine[i]);
          rotate(right[2 * i], right[2 * i + 1], angles.sine[kWidth / 2 + i], angles.cosine[kWidth / 2 + i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) rotate(left[i], right[i], angles.sine[i], angles.cosine[i]);
      }
      heads.left[head] = Chunk::of_floats(left);
      heads.right[head] = Chunk::of_floats(right);
    }
  }

  static __device__ __forceinline__ void run(const Params& params) {
    const int thread = static_cast<int>(threadIdx.x);
    const int slot_of_block = static_cast<int>(divide(static_cast<uint32>(thread), params.chunks_per_head));
    const uint32 slot = blockIdx.x * params.slots_per_block + slot_of_block;
    if (slot_of_block >= params.slots_per_block || slot >= params.num_slots) return;
    const Place place(params, thread - slot_of_block * static_cast<int>(params.chunks_per_head.divisor));
    const uint32 index = divide(slot, params.threads_per_token);
    const int part = static_cast<int>(slot - index * params.threads_per_token.divisor);
    const int step = kHeads * static_cast<int>(params.threads_per_token.divisor);
    const Token token = token_of(params, index);

    ptx::wait_for_previous_kernel();
    Heads heads = load(params, token, place, part);
    ptx::let_next_kernel_start();
    long long position = 0;
    const bool rotates = place.is_rotated && find_position(params, token, position);
    Angles angles{};
    if (rotates) angles = angles_of(params, token, place, position);
#pragma unroll 1
    for (int first = part;;) {
      if (rotates) rotate(heads, angles);
      store(params, token, place, first, heads);
      first += step;
      if (first >= params.num_heads) break;
      heads = load(params, token, place, first);
    }
  }
};

}  // namespace heed::cuda
