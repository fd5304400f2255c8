// Segment ids of a step of keys, for warps that work on their own.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/score_math.cuh"
#include "variants/segment_ids.h"

namespace heed::cuda {

// The part of `others` that rows of `own` may see, as segment_range.cuh has it, by one warp.
__device__ __forceinline__ variants::Range warp_segment_range(const int* own_ids, long long own_stride,
                                                              variants::Range own, const int* other_ids,
                                                              long long other_stride, variants::Range others) {
  constexpr int kAtOnce = 4;  // loads of a lane
  constexpr int kNone = 0x7fffffff;
  const int lane = ptx::thread_index() & 31;
  // Of all lanes.
  const auto smallest_of = [](int value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = min(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
  };
  const auto largest_of = [](int value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
  };
  int smallest = kNone, largest = -kNone - 1;
#pragma unroll 1
  for (int row = static_cast<int>(own.begin) + lane; row < own.end; row += 32) {
    const int id = own_ids[row * own_stride];
    smallest = min(smallest, id);
    largest = max(largest, id);
  }
  smallest = smallest_of(smallest);
  largest = largest_of(largest);
  int first = kNone, last = -1;
  const int end = static_cast<int>(others.end);
  const int* from = other_ids + (others.begin + lane) * other_stride;
#pragma unroll 1
  for (int begin = static_cast<int>(others.begin) + lane; begin < end; begin += kAtOnce * 32) {
    int ids[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      ids[i] = begin + i * 32 < end ? *from : 0;
      from += 32 * other_stride;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int other = begin + i * 32;
      if (other < end && ids[i] >= smallest && ids[i] <= largest) {
        first = min(first, other);
        last = max(last, other);
      }
    }
  }
  return variants::intersect(others, {smallest_of(first), static_cast<variants::Index>(largest_of(last)) + 1});
}

// Ids of a warp's 16 rows (this lane's two of them, as accumulator tiles have them) and of the keys of a step, of which
// each lane holds every 32nd: read from memory early, handed round where they are needed.
template <int kKvRows>
struct SegmentIds {
  static constexpr int kNumKeys = (kKvRows + 31) / 32;
  int rows[2];
  int keys[kNumKeys];

  // `ids`: of the tile's rows, of which the sequence has `rows_left`.
  __device__ __forceinline__ void load_rows(const int* ids, long long stride, int row, int rows_left) {
    rows[0] = ids[min(row, rows_left - 1) * stride];
    rows[1] = ids[min(row + 8, rows_left - 1) * stride];
  }
  __device__ __forceinline__ void load_keys(const int* ids, long long stride, int first_key, int kv_len) {
    const int lane = ptx::thread_index() & 31;
#pragma unroll
    for (int i = 0; i < kNumKeys; ++i) keys[i] = ids[min(first_key + i * 32 + lane, kv_len - 1) * stride];
  }

  // Scores of keys of other segments become -inf.
  __device__ __forceinline__ void mask(float (&scores)[kKvRows / 2]) const {
    const int id = __shfl_sync(0xffffffffu, rows[0], 0);
    bool is_same = rows[0] == id && rows[1] == id;
#pragma unroll
    for (int i = 0; i < kNumKeys; ++i) is_same = is_same && keys[i] == id;
    if (!__any_sync(0xffffffffu, !is_same)) return;
    const int column = (ptx::thread_index() & 3) * 2;
#pragma unroll
    for (int i = 0; i < kKvRows / 4; ++i) {
      const int key = i / 2 * 8 + i % 2;
      const int key_id = __shfl_sync(0xffffffffu, keys[key / 32], key % 32 + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!variants::same_segment(rows[half], key_id)) scores[i / 2 * 4 + half * 2 + i % 2] = -kInfinity;
      }
    }
  }
};

}  // namespace heed::cuda
