// Tiles of shared memory: rows of 16-byte chunks, swizzled so that eight rows' chunks of one column lie in eight
// different bank groups, whether a warp reads them with ldmatrix or writes accumulators into them.
#pragma once

#include "cuda/attention_spec.h"
#include "cuda/device/ptx.cuh"

namespace heed::cuda {

// kRows rows of kDim elements (a multiple of 32 bytes), each kRowBytes (a multiple of 128) long.
template <Element kElement, int kRows_, int kDim_, int kRowBytes_ = sm80_row_bytes(kElement, kDim_)>
struct SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kElementBytes = bytes_of(kElement);
  static constexpr int kElementsPerChunk = 16 / kElementBytes;
  static constexpr int kChunks = kDim_ / kElementsPerChunk;
  static constexpr int kBytes = kRows * kRowBytes;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
};

// Where a lane reads one operand with ldmatrix: step s of 32 bytes lies at `of_step(s)` from the tile's row 0, and
// rows further on by whole multiples of 8 lie at whole multiples of the row size. `row` and `half` (which 16 bytes of
// the step) are the lane's.
template <class Tile>
struct LaneReader {
  uint32 first;

  __device__ __forceinline__ LaneReader(uint32 tile, int row, int half) : first(tile + Tile::offset(row, half)) {}
  // The swizzle repeats every 128 bytes, four steps; within them a step only flips bits.
  __device__ __forceinline__ uint32 of_step(int step) const { return (first ^ ((step & 3) << 5)) + (step >> 2) * 128; }
};

// How many threads copy a tile: each always the same chunk, of a row in each pass.
template <class Tile, int kNumThreads>
struct CopyShape {
  static constexpr int kRowsPerPass = kNumThreads / Tile::kChunks;
  static constexpr int kPasses = (Tile::kRows + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr bool kIsWhole = kRowsPerPass * Tile::kChunks == kNumThreads && Tile::kRows % kRowsPerPass == 0;
};

// Up to `dim` elements, one by one, from the 16 bytes that start at `from`.
template <int kElementBytes>
__device__ __forceinline__ uint4 gather_chunk(const char* from, long long dim_stride_bytes, int dim) {
  uint32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int e = 0; e < 16 / kElementBytes; ++e) {
    if (e >= dim) break;
    if constexpr (kElementBytes == 4) {
      words[e] = *reinterpret_cast<const uint32*>(from + e * dim_stride_bytes);
    } else {
      const uint32 bits = *reinterpret_cast<const unsigned short*>(from + e * dim_stride_bytes);
      words[e / 2] |= bits << (16 * (e % 2));
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Copies rows [0, num_rows) of a matrix into a tile; rows past them and columns past `dim` become zero. Asynchronous
// where rows are aligned: commit and wait around it.
template <class Tile, int kNumThreads, bool kIsAligned>
__device__ __forceinline__ void copy_rows(uint32 tile, const char* from, long long token_stride_bytes,
                                          long long dim_stride_bytes, int num_rows, int dim) {
  using Shape = CopyShape<Tile, kNumThreads>;
  const int thread = ptx::thread_index();
  const int first_row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
  if (!Shape::kIsWhole && first_row >= Shape::kRowsPerPass) return;
  const int column = chunk * Tile::kElementsPerChunk;
  const int num_rows_here = column < dim ? num_rows : 0;
  from += first_row * token_stride_bytes + column * dim_stride_bytes;
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int row = first_row + pass * Shape::kRowsPerPass;
    if (!Shape::kIsWhole && row >= Tile::kRows) break;
    const uint32 to = tile + Tile::offset(row, chunk);
    if constexpr (kIsAligned) {
      ptx::cp_async_16(to, from, row < num_rows_here ? 16 : 0);
    } else {
      const int left = row < num_rows_here ? dim - column : 0;
      ptx::store_shared_16(to, gather_chunk<Tile::kElementBytes>(from, dim_stride_bytes, left));
    }
    from += Shape::kRowsPerPass * token_stride_bytes;
  }
}

// Writes the first `dim` elements of 16 bytes that start at column `column` of a row.
template <int kElementBytes, bool kIsAligned>
__device__ __forceinline__ void write_chunk(char* row, long long dim_stride_bytes, int column, int dim, uint4 value) {
  if constexpr (kIsAligned) {
    *reinterpret_cast<uint4*>(row + column * kElementBytes) = value;
  } else {
    const uint32 words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int e = 0; e < 16 / kElementBytes; ++e) {
      if (column + e >= dim) break;
      char* to = row + (column + e) * dim_stride_bytes;
      if constexpr (kElementBytes == 4) {
        *reinterpret_cast<uint32*>(to) = words[e];
      } else {
        *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(words[e / 2] >> (16 * (e % 2)));
      }
    }
  }
}

}  // namespace heed::cuda
