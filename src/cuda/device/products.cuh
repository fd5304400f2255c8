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

// out += A B for 16-bit types, both in shared memory: A has kSteps times 16 columns, B as many rows. A's tile holds it
// by rows, or, transposed, by columns; the result has kRowTiles times 16 rows, A's from `first_row` on, and kDimTiles
// times 8 columns, B's from 16 * `first_pair` on.
template <class Math, class ATile, class BTile, bool kIsTransposed, int kSteps, int kUnroll, int kRowTiles,
          int kDimTiles>
__device__ __forceinline__ void multiply_tiles(uint32 a_tile, int first_row, uint32 b_tile, int first_pair, int lane,
                                               Accumulator (&out)[kRowTiles][kDimTiles]) {
  // Transposed, 16 rows are the columns of A's tile that are a step otherwise.
  const LaneReader<ATile> a_reader = kIsTransposed
                                         ? LaneReader<ATile>(a_tile, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1)
                                         : LaneReader<ATile>(a_tile, first_row + (lane & 15), lane >> 4);
  const LaneReader<BTile> b_reader(b_tile, lane & 15, lane >> 4);
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; ++step) {
    typename Math::A a[kRowTiles];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      uint32 bits[4];
      if constexpr (kIsTransposed) {
        ptx::ldmatrix_x4_trans(bits, a_reader.of_step(first_row / 16 + row_tile) + step * 16 * ATile::kRowBytes);
      } else {
        ptx::ldmatrix_x4(bits, a_reader.of_step(step) + row_tile * 16 * ATile::kRowBytes);
      }
      a[row_tile] = Math::make_a(bits);
    }
#pragma unroll
    for (int dim_tile = 0; dim_tile < kDimTiles; dim_tile += 2) {
      uint32 bits[4];
      ptx::ldmatrix_x4_trans(bits, b_reader.of_step(first_pair + dim_tile / 2) + step * 16 * BTile::kRowBytes);
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
        if (key_tile + 1 < kKeyTiles) sums[row_tile][key_tile + 1].add_product(a[row_tile], right);
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

// The same as multiply_tiles for float32: a step is 8 columns of A, elements are read one by one.
template <class Math, class ATile, class BTile, bool kIsTransposed, int kSteps, int kDimTiles>
__device__ __forceinline__ void multiply_tiles_float32(uint32 a_tile, int first_row, uint32 b_tile, int first_pair,
                                                       int lane, Accumulator (&out)[1][kDimTiles]) {
  const auto load = [](uint32 row_and_chunk, int element) {
    return ptx::load_shared_4(row_and_chunk + (element & 3) * 4);
  };
  const int row = lane >> 2, column = lane & 3;
#pragma unroll 1
  for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
    typename Math::Sum sum;
    const int dim = first_pair * 16 + dim_tile * 8 + row;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      uint32 bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int a_row = first_row + row + i % 2 * 8, a_column = step * 8 + column + i / 2 * 4;
        bits[i] = kIsTransposed ? load(a_tile + ATile::offset(a_column, a_row >> 2), a_row)
                                : load(a_tile + ATile::offset(a_row, a_column >> 2), a_column);
      }
      const int b_row = step * 8 + column;
      sum.add_product(Math::make_a(bits), Math::make_b(load(b_tile + BTile::offset(b_row, dim >> 2), dim),
                                                       load(b_tile + BTile::offset(b_row + 4, dim >> 2), dim)));
    }
#pragma unroll
    for (int tile = 0; tile < kDimTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (tile == dim_tile) out[0][tile][i] += sum.total(i);
      }
    }
  }
}

}  // namespace heed::cuda
