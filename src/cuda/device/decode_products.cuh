// out += V^T P^T: the second product of attention of few queries, which are its columns. The accumulators of Q K^T,
// rows of queries g and g + 8, are operands of 8 keys and 8 queries as they lie.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/shared_tile.cuh"

namespace heed::cuda {

// weights[i]: of keys [8 * i, 8 * i + 8) of the tile at `v`. out[half][i]: of queries [8 * half, 8 * half + 8) and
// columns [16 * i, 16 * i + 16) of V, which are the rows of the accumulators.
template <class Math, class VTile, int kKeyTiles, int kHalves, int kDimTiles>
__device__ __forceinline__ void multiply_values(const Accumulator (&weights)[kKeyTiles], uint32 v, int lane,
                                                Accumulator (&out)[kHalves][kDimTiles]) {
  const LaneReader<VTile> values(v, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
#pragma unroll
  for (int key_tile = 0; key_tile < kKeyTiles; key_tile += 2) {
    typename Math::B b[kHalves];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const Accumulator &left = weights[key_tile], &right = weights[key_tile + 1];
      b[half] = Math::make_b(Math::pack(left[2 * half], left[2 * half + 1]),
                             Math::pack(right[2 * half], right[2 * half + 1]));
    }
#pragma unroll
    for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
      uint32 bits[4];
      ptx::ldmatrix_x4_trans(bits, values.of_step(dim_tile) + key_tile * 8 * VTile::kRowBytes);
      const typename Math::A a = Math::make_a(bits);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) Math::mma(out[half][dim_tile], a, b[half]);
    }
  }
}

// The same for float32. An operand takes its 8 keys in the order in which a thread has their weights: t and t + 4 are
// keys 2t and 2t + 1.
template <class Math, class VTile, int kKeyTiles, int kHalves, int kDimTiles>
__device__ __forceinline__ void multiply_values_float32(const Accumulator (&weights)[kKeyTiles], uint32 v, int lane,
                                                        Accumulator (&out)[kHalves][kDimTiles]) {
  typename Math::B b[kHalves][kKeyTiles];
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
      const Accumulator& pair = weights[key_tile];
      b[half][key_tile] = Math::make_b(__float_as_uint(pair[2 * half]), __float_as_uint(pair[2 * half + 1]));
    }
  }
  const auto load = [&](int key, int column) {
    return ptx::load_shared_4(v + VTile::offset(key, column >> 2) + (column & 3) * 4);
  };
#pragma unroll
  for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
    typename Math::Sum sums[kHalves];
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
      const int key = key_tile * 8 + (lane & 3) * 2, column = dim_tile * 16 + (lane >> 2);
      const uint32 bits[4] = {load(key, column), load(key, column + 8), load(key + 1, column),
                              load(key + 1, column + 8)};
      const typename Math::A a = Math::make_a(bits);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) sums[half].add_product(a, b[half][key_tile]);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[half][dim_tile][i] += sums[half].total(i);
    }
    __syncwarp();  // the compiler loads no further ahead: registers
  }
}

}  // namespace heed::cuda
