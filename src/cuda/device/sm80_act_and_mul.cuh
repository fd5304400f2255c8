// Gated activations and their gradient, for every GPU since Ampere.
//
// Where the bytes go
// ------------------
// Forward, an element of the result costs two reads and one write; backward, three reads and two writes. Nothing is
// used twice, so that memory is the only limit: each byte is moved once, 16 to an access, and a thread issues all its
// loads before it computes. Each thread takes a chunk of 16 bytes of the result, whose gate and factor lie H elements
// apart. Chunks are numbered through all rows: rows of any length fill whole blocks, and a call for a few tokens is
// spread over as many multiprocessors as it has blocks. The only arithmetic on indices is one division, by
// multiplication.
//
// Rows that are not aligned to 16 bytes go element by element; neighbouring threads take neighbouring elements.
#pragma once

#include "cuda/device/activation.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/sm80_act_and_mul_spec.h"

namespace heed::cuda {

template <bool kIsLarge>
struct IndexOf {
  using Type = uint32;
};
template <>
struct IndexOf<true> {
  using Type = uint64;
};

template <Sm80ActAndMulSpec kSpec>
struct Sm80ActAndMul {
  using Params = Sm80ActAndMulParams;
  static constexpr Sm80ActAndMulTile kTile = sm80_act_and_mul_tile(kSpec);
  static constexpr int kNumThreads = kTile.num_threads;
  static constexpr int kMinBlocksPerSm = kTile.min_blocks;
  static constexpr int kSharedBytes = 0;

  static constexpr int kWidth = chunk_width(kSpec.element, kSpec.is_aligned);
  using Chunk = RowChunk<kSpec.element, kWidth>;
  using Function = GateFunction<kSpec.gate, kSpec.element == Element::kFloat32>;

  // Of chunks. Single elements may be more than 2^31.
  using Index = IndexOf<!kSpec.is_aligned>::Type;

  struct Item {
    bool is_there;
    Chunk gate, factor, dout;
    long long result, result_factor;  // offsets; backward: of the halves of dx
  };

  static __device__ __forceinline__ Item load(const Params& params, Index number) {
    Item item{};
    item.is_there = number < params.num_chunks;
    if (!item.is_there) return item;
    const Index row = divide(number, params.chunks_per_row);
    const long long column = static_cast<long long>(number - row * params.chunks_per_row.divisor) * kWidth;
    long long offsets[Params::kNumOperands] = {};
    add_offsets(params.rows, static_cast<uint32>(row), offsets);
    const auto offset = [&](int operand, long long at) {
      return offsets[operand] + column_offset<kSpec.is_aligned>(at, params.element_strides[operand]);
    };
    ptx::wait_for_previous_kernel();
    item.gate = Chunk::load(params.x, offset(Params::kX, column));
    item.factor = Chunk::load(params.x, offset(Params::kX, params.hidden + column));
    if constexpr (kSpec.is_backward) item.dout = Chunk::load(params.dout, offset(Params::kDout, column));
    item.result = offset(Params::kResult, column);
    item.result_factor = offset(Params::kResult, params.hidden + column);
    return item;
  }

  static __device__ __forceinline__ void finish(const Params& params, const Item& item) {
    if (!item.is_there) return;
    float gate[kWidth], factor[kWidth];
    item.gate.to_floats(gate);
    item.factor.to_floats(factor);
    if constexpr (kSpec.is_backward) {
      float dout[kWidth];
      item.dout.to_floats(dout);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const ValueAndSlope function = Function::both(gate[i]);
        gate[i] = dout[i] * factor[i] * function.slope;
        factor[i] = dout[i] * function.value;
      }
      Chunk::of_floats(factor).store(params.result, item.result_factor);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) gate[i] = Function::value(gate[i]) * factor[i];
    }
    Chunk::of_floats(gate).store(params.result, item.result);
  }

  static __device__ __forceinline__ void run(const Params& params) {
    const Index first = static_cast<Index>(blockIdx.x) * kTile.chunks_per_block() + threadIdx.x;
    Item items[kTile.chunks];
#pragma unroll
    for (int i = 0; i < kTile.chunks; ++i) items[i] = load(params, first + i * kNumThreads);
    ptx::let_next_kernel_start();
#pragma unroll
    for (int i = 0; i < kTile.chunks; ++i) finish(params, items[i]);
  }
};

}  // namespace heed::cuda
