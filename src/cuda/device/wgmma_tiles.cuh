// How warpgroup products address tiles in shared memory: what their 64-bit descriptors hold. No instructions.
#pragma once

#include "cuda/device/ptx.cuh"

namespace heed::cuda {

using uint64 = unsigned long long;

namespace ptx {

// Tiles of rows of 128 bytes, which tensor maps swizzle; they start at multiples of 1024 bytes, which eight rows are.
// Addresses and distances count 16 bytes.
inline constexpr uint64 kSwizzle128 = 1ull << 62;
inline constexpr uint64 kEightRowsApart = 64ull << 32;

// Rows are those of the 64 (of a) or of the N (of b), and each holds 64 elements of k: 16 of them, a step, are 32
// bytes.
__device__ __forceinline__ uint64 wgmma_k_major(uint32 tile) {
  return kSwizzle128 | kEightRowsApart | 1ull << 16 | tile >> 4;
}
// Rows are those of k, and each holds 64 of the N, of which the next 64 lie `part_bytes` on: a step is 16 rows.
__device__ __forceinline__ uint64 wgmma_n_major(uint32 tile, int part_bytes) {
  return kSwizzle128 | kEightRowsApart | static_cast<uint64>(part_bytes / 16) << 16 | tile >> 4;
}
// So many bytes further on.
__device__ __forceinline__ uint64 wgmma_advance(uint64 tile, int num_bytes) {
  return tile + static_cast<uint64>(num_bytes / 16);
}

}  // namespace ptx
}  // namespace heed::cuda
