// Rows of a shared memory tile that hold infinities or NaN, and how they are taken out of it.
#pragma once

#include "cuda/device/ptx.cuh"

namespace heed::cuda {

// Rows of a tile, a bit each.
template <int kRows>
struct RowSet {
  static constexpr int kWords = (kRows + 31) / 32;
  uint32 words[kWords];
  __device__ __forceinline__ bool contains(int row) const { return (words[row >> 5] >> (row & 31) & 1) != 0; }
};

// Replaces the rows that are not finite by zeros and notes them in `taken` (shared memory). Called by the whole block.
template <class Tile, class Math, int kNumThreads>
__device__ __forceinline__ void take_out_rows(uint32 tile, RowSet<Tile::kRows>& taken) {
  constexpr int kNumChunks = Tile::kRows * Tile::kChunks;
  const int thread = ptx::thread_index();
  if (thread < RowSet<Tile::kRows>::kWords) taken.words[thread] = 0;
  __syncthreads();
#pragma unroll 1
  for (int index = thread; index < kNumChunks; index += kNumThreads) {
    const int row = index / Tile::kChunks;
    if (!Math::are_finite(ptx::load_shared_16(tile + Tile::offset(row, index % Tile::kChunks)))) {
      atomicOr(&taken.words[row >> 5], 1u << (row & 31));
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int index = thread; index < kNumChunks; index += kNumThreads) {
    const int row = index / Tile::kChunks;
    if (taken.contains(row)) {
      ptx::store_shared_16(tile + Tile::offset(row, index % Tile::kChunks), {0, 0, 0, 0});
    }
  }
  __syncthreads();
}

}  // namespace heed::cuda
