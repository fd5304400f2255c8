// Sums over rows that several threads share: the same bits at every call, and in every thread of a row.
#pragma once

#include "cuda/device/ptx.cuh"

namespace heed::cuda {

// A block of kNumThreads threads works on kNumThreads / kThreadsPerRow rows at once. All its threads call sum(), with
// `turn` 0 and 1 by turns: one barrier a call suffices, since nobody is two calls ahead of a thread that still reads.
template <int kNumThreads, int kThreadsPerRow, int kNumSums>
struct RowSums {
  static constexpr int kLanes = kThreadsPerRow < 32 ? kThreadsPerRow : 32;
  static constexpr int kWarps = kThreadsPerRow / kLanes;  // of a row
  static constexpr int kRows = kNumThreads / kThreadsPerRow;
  static constexpr int kTurnFloats = kRows * kWarps * kNumSums;
  static constexpr int kSharedBytes = kWarps == 1 ? 0 : 2 * kTurnFloats * static_cast<int>(sizeof(float));

  static __device__ __forceinline__ void sum(float (&values)[kNumSums], float* shared, int turn) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kNumSums; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], step);
    }
    if constexpr (kWarps > 1) {
      const int thread = static_cast<int>(threadIdx.x);
      float* of_row = shared + turn * kTurnFloats + thread / kThreadsPerRow * (kWarps * kNumSums);
      if (thread % 32 == 0) {
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) of_row[thread % kThreadsPerRow / 32 * kNumSums + i] = values[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kNumSums; ++i) values[i] = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) values[i] += of_row[warp * kNumSums + i];
      }
    }
  }
};

}  // namespace heed::cuda
