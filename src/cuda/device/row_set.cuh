// Rows of a shared memory tile that hold infinities or NaN, and how they are taken out of it.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/score_math.cuh"

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

// Rows with statistics, of which the first of two floats is not finite where the row is to be taken out: whether any of
// those is that this thread has copied (each kNumThreads-th from its own on).
template <int kRows, int kNumThreads>
__device__ __forceinline__ bool has_special_row(uint32 statistics) {
  bool has = false;
  for (int row = ptx::thread_index(); row < kRows; row += kNumThreads) {
    has = has || !(fabsf(__uint_as_float(ptx::load_shared_4(statistics + row * 8))) < kInfinity);
  }
  return has;
}

// Replaces such rows of two tiles by zeros. Called by the whole block, after a barrier. A function of its own, so that
// it takes no registers from the usual case.
template <class TileA, class TileB, int kNumThreads>
__device__ __noinline__ void take_out_special_rows(uint32 a, uint32 b, uint32 statistics) {
  constexpr int kChunks = TileA::kChunks + TileB::kChunks;
#pragma unroll 1
  for (int index = ptx::thread_index(); index < TileA::kRows * kChunks; index += kNumThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    if (fabsf(__uint_as_float(ptx::load_shared_4(statistics + row * 8))) < kInfinity) continue;
    const uint32 at =
        chunk < TileA::kChunks ? a + TileA::offset(row, chunk) : b + TileB::offset(row, chunk - TileA::kChunks);
    ptx::store_shared_16(at, {0, 0, 0, 0});
  }
  __syncthreads();
}

}  // namespace heed::cuda
