// RMS norm, alone or after the addition of a residual, for every GPU since Ampere.
//
// Where the bytes go
// ------------------
// Each row is read once and written once; memory is the only limit. A row stays in the registers of the threads that
// share it, as it is stored, between the sum of its squares and its use: a pair of 16-byte chunks a thread at 4096
// elements of 16 bits. A block takes several rows one after the other. It keeps the weights in registers, and asks for
// the next row before it waits for the others at the barrier of this one: memory has work while the sum goes round.
// Rows that fit one warp need no barrier, and several share a warp if they are shorter still (the norms of single
// heads). Rows of more than 2048 chunks are read twice, the second time mostly from L2.
#pragma once

#include "cuda/device/rms_norm_rows.cuh"
#include "cuda/device/row_sums.cuh"

namespace heed::cuda {

template <Sm80RmsNormSpec kSpec>
struct Sm80RmsNorm {
  using Params = Sm80RmsNormParams;
  static constexpr int kNumThreads = kSpec.num_threads();
  static constexpr int kMinBlocksPerSm = sm80_rms_norm_min_blocks(kSpec, false);
  static constexpr int kThreadsPerRow = kSpec.threads_per_row;
  static constexpr int kRowsAtOnce = kSpec.rows_at_once();
  static constexpr int kChunks = kSpec.is_long() ? 1 : kSpec.chunks;  // of a row, kept in registers
  using Sums = RowSums<kNumThreads, kThreadsPerRow, 1>;
  static constexpr int kSharedBytes = Sums::kSharedBytes;

  static constexpr int kWidth = chunk_width(kSpec.element, kSpec.is_aligned);
  using Chunk = RowChunk<kSpec.element, kWidth>;
  using Row = RmsNormRow<kSpec.is_aligned>;

  // x + residual, rounded as it is returned.
  static __device__ __forceinline__ Chunk add(const Chunk& x, const Chunk& residual) {
    float a[kWidth], b[kWidth];
    x.to_floats(a);
    residual.to_floats(b);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) a[i] += b[i];
    return Chunk::of_floats(a);
  }
  static __device__ __forceinline__ float sum_of_squares(const Chunk& chunk) {
    float values[kWidth], sum = 0.0f;
    chunk.to_floats(values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += values[i] * values[i];
    return sum;
  }
  static __device__ __forceinline__ Chunk scaled(const Chunk& chunk, float factor, const Chunk& weight) {
    float values[kWidth], weights[kWidth];
    chunk.to_floats(values);
    weight.to_floats(weights);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = values[i] * factor * weights[i];
    return Chunk::of_floats(values);
  }

  // A thread's part of a row.
  struct Part {
    Chunk x[kChunks], residual[kSpec.has_addend ? kChunks : 1];
  };
  static __device__ __forceinline__ int column_of(int chunk) {
    return (chunk * kThreadsPerRow + static_cast<int>(threadIdx.x) % kThreadsPerRow) * kWidth;
  }
  static __device__ __forceinline__ Part load(const RmsNormBlock& block, int row) {
    Part part{};
    if (row >= block.end) return part;
    const Row rows(block, row);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = column_of(c);
      if (column >= block.params.hidden) continue;
      part.x[c] = Chunk::load(block.params.data[Params::kX], rows.at(Params::kX, column));
      if constexpr (kSpec.has_addend) {
        part.residual[c] = Chunk::load(block.params.data[Params::kAddend], rows.at(Params::kAddend, column));
      }
    }
    return part;
  }

  static __device__ __forceinline__ void run_in_registers(const Params& params, float* shared) {
    const RmsNormBlock block(params);
    const int group = static_cast<int>(threadIdx.x) / kThreadsPerRow;
    ptx::wait_for_previous_kernel();
    Part next = load(block, block.begin + group);
    ptx::let_next_kernel_start();
    Chunk weights[kChunks] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (column_of(c) >= params.hidden) continue;
      weights[c] =
          Chunk::load(params.data[Params::kWeight],
                      block.bases[Params::kWeight] +
                          column_offset<kSpec.is_aligned>(column_of(c), params.element_strides[Params::kWeight]));
    }
    int turn = 0;
#pragma unroll 1
    for (int first = block.begin; first < block.end; first += kRowsAtOnce, turn ^= 1) {
      Part part = next;
      next = load(block, first + kRowsAtOnce + group);
      float sums[1] = {0.0f};
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if constexpr (kSpec.has_addend) part.x[c] = add(part.x[c], part.residual[c]);
        sums[0] += sum_of_squares(part.x[c]);
      }
      Sums::sum(sums, shared, turn);
      if (first + group >= block.end) continue;
      const float factor = inverse_norm(sums[0], params);
      const Row rows(block, first + group);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = column_of(c);
        if (column >= params.hidden) continue;
        if constexpr (kSpec.has_addend) part.x[c].store(params.data[Params::kSum], rows.at(Params::kSum, column));
        scaled(part.x[c], factor, weights[c]).store(params.data[Params::kResult], rows.at(Params::kResult, column));
      }
    }
  }

  // Rows that do not fit: all threads of the block on one after the other.
  static __device__ __forceinline__ void run_twice(const Params& params, float* shared) {
    const RmsNormBlock block(params);
    ptx::wait_for_previous_kernel();
    int turn = 0;
#pragma unroll 1
    for (int row = block.begin; row < block.end; ++row, turn ^= 1) {
      const Row rows(block, row);
      const auto chunk_at = [&](int column) {
        Chunk x = Chunk::load(params.data[Params::kX], rows.at(Params::kX, column));
        if constexpr (kSpec.has_addend) {
          x = add(x, Chunk::load(params.data[Params::kAddend], rows.at(Params::kAddend, column)));
        }
        return x;
      };
      float sums[1] = {0.0f};
#pragma unroll 4
      for (int column = column_of(0); column < params.hidden; column += kThreadsPerRow * kWidth) {
        sums[0] += sum_of_squares(chunk_at(column));
      }
      Sums::sum(sums, shared, turn);
      const float factor = inverse_norm(sums[0], params);
#pragma unroll 4
      for (int column = column_of(0); column < params.hidden; column += kThreadsPerRow * kWidth) {
        const Chunk x = chunk_at(column);
        if constexpr (kSpec.has_addend) x.store(params.data[Params::kSum], rows.at(Params::kSum, column));
        const Chunk weight =
            Chunk::load(params.data[Params::kWeight],
                        block.bases[Params::kWeight] +
                            column_offset<kSpec.is_aligned>(column, params.element_strides[Params::kWeight]));
        scaled(x, factor, weight).store(params.data[Params::kResult], rows.at(Params::kResult, column));
      }
    }
  }

  static __device__ __forceinline__ void run(const Params& params) {
    auto* shared = reinterpret_cast<float*>(tight_shared_memory);
    if constexpr (kSpec.is_long()) {
      run_twice(params, shared);
    } else {
      run_in_registers(params, shared);
    }
  }
};

}  // namespace heed::cuda
