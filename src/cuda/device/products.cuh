// The two matrix products of attention on one step's tiles: S = Q K^T and O += P V. Everything that they index is in
// registers but for the tiles of shared memory that the readers point into.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/shared_tile.cuh"

namespace heed::cuda {

template <int kRows, int kColumns>
__device__ __forceinline__ void clear(Accumulator (&tiles)[kRows][kColumns]) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tiles[row][column][i] = 0.0f;
    }
  }
}

template <int kRows, int kColumns>
__device__ __forceinline__ bool is_finite(const Accumulator (&tiles)[kRows][kColumns]) {
  float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // NaN from the first infinity or NaN on
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) zero[i] = fmaf(tiles[row][column][i], 0.0f, zero[i]);
    }
  }
  return (zero[0] + zero[1]) + (zero[2] + zero[3]) == 0.0f;
}

// scores = Q K^T: kRowTiles times 16 rows of Q, kKeyTiles times 8 rows of K, kSteps times 32 bytes of each.
// kUnroll: how many steps the compiler may overlap; their operands take registers.
template <class Math, int kSteps, int kUnroll, class QTile, class KTile, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void multiply_transposed(const LaneReader<QTile>& q, const LaneReader<KTile>& k,
                                                    Accumulator (&scores)[kRowTiles][kKeyTiles]) {
  clear(scores);
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; ++step) {
    typename Math::A a[kRowTiles];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      uint32 bits[4];
      ptx::ldmatrix_x4(bits, q.of_step(step) + row_tile * 16 * QTile::kRowBytes);
      a[row_tile] = Math::make_a(bits);
    }
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; key_tile += 2) {
      uint32 bits[4];
      ptx::ldmatrix_x4(bits, k.of_step(step) + key_tile * 8 * KTile::kRowBytes);
      const typename Math::B left = Math::make_b(bits[0], bits[1]), right = Math::make_b(bits[2], bits[3]);
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        Math::mma(scores[row_tile][key_tile], a[row_tile], left);
        Math::mma(scores[row_tile][key_tile + 1], a[row_tile], right);
      }
    }
  }
}

// out += P V for 16-bit types: the accumulators of two key tiles are one operand, V's rows are read transposed.
template <class Math, class VTile, int kRowTiles, int kKeyTiles, int kDimTiles>
__device__ __forceinline__ void multiply(const Accumulator (&p)[kRowTiles][kKeyTiles], const LaneReader<VTile>& v,
                                         Accumulator (&out)[kRowTiles][kDimTiles]) {
#pragma unroll
  for (int key_tile = 0; key_tile < kKeyTiles; key_tile += 2) {
    typename Math::A a[kRowTiles];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      a[row_tile] = Math::make_a(p[row_tile][key_tile], p[row_tile][key_tile + 1]);
    }
#pragma unroll
    for (int dim_tile = 0; dim_tile < kDimTiles; dim_tile += 2) {
      uint32 bits[4];
      ptx::ldmatrix_x4_trans(bits, v.of_step(dim_tile / 2) + key_tile * 8 * VTile::kRowBytes);
      const typename Math::B left = Math::make_b(bits[0], bits[1]), right = Math::make_b(bits[2], bits[3]);
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        Math::mma(out[row_tile][dim_tile], a[row_tile], left);
        Math::mma(out[row_tile][dim_tile + 1], a[row_tile], right);
      }
    }
  }
}

// scores = Q K^T for float32.
template <class Math, int kSteps, int kUnroll, class QTile, class KTile, int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void multiply_transposed_float32(const LaneReader<QTile>& q, const LaneReader<KTile>& k,
                                                            Accumulator (&scores)[kRowTiles][kKeyTiles]) {
  typename Math::Sum sums[kRowTiles][kKeyTiles];
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; ++step) {
    typename Math::A a[kRowTiles];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      uint32 bits[4];
      ptx::ldmatrix_x4(bits, q.of_step(step) + row_tile * 16 * QTile::kRowBytes);
      a[row_tile] = Math::make_a(bits);
    }
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; key_tile += 2) {
      uint32 bits[4];
      ptx::ldmatrix_x4(bits, k.of_step(step) + key_tile * 8 * KTile::kRowBytes);
      const typename Math::B left = Math::make_b(bits[0], bits[1]), right = Math::make_b(bits[2], bits[3]);
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        sums[row_tile][key_tile].add_product(a[row_tile], left);
        sums[row_tile][key_tile + 1].add_product(a[row_tile], right);
      }
    }
  }
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[row_tile][key_tile][i] = sums[row_tile][key_tile].total(i);
    }
  }
}

// out += P V for float32: one key tile is one operand, and V's elements are read one by one, in the order of its keys
// (`even` and `odd` point at a lane's two keys, `inside` is its element's offset in a chunk). A step's products are
// summed up first: one rounding of the output a step.
template <class Math, class VTile, int kRowTiles, int kKeyTiles, int kDimTiles>
__device__ __forceinline__ void multiply_float32(const Accumulator (&p)[kRowTiles][kKeyTiles],
                                                 const LaneReader<VTile>& even, const LaneReader<VTile>& odd,
                                                 uint32 inside, Accumulator (&out)[kRowTiles][kDimTiles]) {
  typename Math::A a[kRowTiles][kKeyTiles];
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile)
      a[row_tile][key_tile] = Math::make_a(p[row_tile][key_tile]);
  }
#pragma unroll
  for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
    typename Math::Sum sums[kRowTiles];
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
      const uint32 keys = key_tile * 8 * VTile::kRowBytes + inside;
      const typename Math::B b = Math::make_b(ptx::load_shared_4(even.of_step(dim_tile) + keys),
                                              ptx::load_shared_4(odd.of_step(dim_tile) + keys));
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) sums[row_tile].add_product(a[row_tile][key_tile], b);
    }
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[row_tile][dim_tile][i] += sums[row_tile].total(i);
    }
    __syncwarp();  // the compiler loads no further ahead: registers
  }
}

}  // namespace heed::cuda
