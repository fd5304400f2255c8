// The gradient of the RMS norm, for every GPU since Ampere. With xhat = x / sqrt(mean(x^2) + eps) and g = dout *
// weight:
//   dx = (g - xhat mean(g xhat)) / sqrt(mean(x^2) + eps) [+ dsum],   dweight = sum over the rows of dout * xhat.
//
// Where the bytes go
// ------------------
// A row of x and of dout is read once and one of dx is written; as in the forward kernel, rows stay in registers, and
// the next ones are under way while the two sums of this one go round. Each block keeps its sum for dweight in
// registers over all its rows, in float32, and leaves it in the workspace, one row for each of a few hundred blocks. A
// second pass adds those up, in the same order at every call.
#pragma once

#include "cuda/device/rms_norm_rows.cuh"
#include "cuda/device/row_sums.cuh"

namespace heed::cuda {

template <Sm80RmsNormSpec kSpec>
struct Sm80RmsNormBwd {
  using Params = Sm80RmsNormParams;
  static constexpr int kNumThreads = kSpec.num_threads();
  static constexpr int kMinBlocksPerSm = sm80_rms_norm_min_blocks(kSpec, true);
  static constexpr int kThreadsPerRow = kSpec.threads_per_row;
  static constexpr int kRowsAtOnce = kSpec.rows_at_once();
  static constexpr int kChunks = kSpec.is_long() ? 1 : kSpec.chunks;  // of a row, kept in registers
  using Sums = RowSums<kNumThreads, kThreadsPerRow, 2>;

  static constexpr int kWidth = chunk_width(kSpec.element, kSpec.is_aligned);
  using Chunk = RowChunk<kSpec.element, kWidth>;
  using Row = RmsNormRow<kSpec.is_aligned>;
  static constexpr int kRowFloats = kThreadsPerRow * kChunks * kWidth;  // columns, those past the end included
  static constexpr int kGatherBytes = kRowsAtOnce == 1 ? 0 : kRowsAtOnce * kRowFloats * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = Sums::kSharedBytes + kGatherBytes;

  // What both sums make of a row.
  struct Factors {
    float inverse, mean;  // of g xhat

    __device__ __forceinline__ Factors(const float (&sums)[2], const Params& params) {
      inverse = inverse_norm(sums[0], params);
      mean = sums[1] * inverse / static_cast<float>(params.hidden);
    }
  };

  // Adds to the sums of x^2 and of g x.
  static __device__ __forceinline__ void add_sums(const Chunk& x, const Chunk& dout, const Chunk& weight,
                                                  float (&sums)[2]) {
    float xs[kWidth], gs[kWidth], weights[kWidth];
    x.to_floats(xs);
    dout.to_floats(gs);
    weight.to_floats(weights);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sums[0] += xs[i] * xs[i];
      sums[1] += gs[i] * weights[i] * xs[i];
    }
  }
  // The chunk of dx; adds the one of dweight.
  static __device__ __forceinline__ Chunk finish(const Chunk& x, const Chunk& dout, const Chunk& weight,
                                                 const Chunk& dsum, const Factors& factors, float (&dweights)[kWidth]) {
    float xs[kWidth], douts[kWidth], weights[kWidth], result[kWidth];
    x.to_floats(xs);
    dout.to_floats(douts);
    weight.to_floats(weights);
    if constexpr (kSpec.has_addend) dsum.to_floats(result);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float xhat = xs[i] * factors.inverse;
      const float dx = (douts[i] * weights[i] - xhat * factors.mean) * factors.inverse;
      result[i] = kSpec.has_addend ? dx + result[i] : dx;
      dweights[i] += douts[i] * xhat;
    }
    return Chunk::of_floats(result);
  }

  // A thread's part of a row.
  struct Part {
    Chunk x[kChunks], dout[kChunks];
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
      part.dout[c] = Chunk::load(block.params.data[Params::kDout], rows.at(Params::kDout, column));
    }
    return part;
  }
  static __device__ __forceinline__ Chunk load_weight(const RmsNormBlock& block, int column) {
    const Params& params = block.params;
    return Chunk::load(params.data[Params::kWeight],
                       block.bases[Params::kWeight] +
                           column_offset<kSpec.is_aligned>(column, params.element_strides[Params::kWeight]));
  }
  static __device__ __forceinline__ Chunk load_dsum(const Params& params, const Row& rows, int column) {
    if constexpr (kSpec.has_addend) {
      return Chunk::load(params.data[Params::kAddend], rows.at(Params::kAddend, column));
    }
    return Chunk{};
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
      if (column_of(c) < params.hidden) weights[c] = load_weight(block, column_of(c));
    }
    float dweights[kChunks][kWidth] = {};
    int turn = 0;
#pragma unroll 1
    for (int first = block.begin; first < block.end; first += kRowsAtOnce, turn ^= 1) {
      const Part part = next;
      next = load(block, first + kRowsAtOnce + group);
      float sums[2] = {0.0f, 0.0f};
#pragma unroll
      for (int c = 0; c < kChunks; ++c) add_sums(part.x[c], part.dout[c], weights[c], sums);
      Sums::sum(sums, shared, turn);
      if (first + group >= block.end) continue;
      const Factors factors(sums, params);
      const Row rows(block, first + group);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = column_of(c);
        if (column >= params.hidden) continue;
        const Chunk dsum = load_dsum(params, rows, column);
        finish(part.x[c], part.dout[c], weights[c], dsum, factors, dweights[c])
            .store(params.data[Params::kResult], rows.at(Params::kResult, column));
      }
    }
    leave(params, dweights, shared + Sums::kSharedBytes / sizeof(float));
  }

  // Leaves the block's sum in the workspace.
  static __device__ __forceinline__ void leave(const Params& params, const float (&dweights)[kChunks][kWidth],
                                               float* shared) {
    float* to = params.partial_sums + static_cast<long long>(blockIdx.x) * params.hidden;
    const int group = static_cast<int>(threadIdx.x) / kThreadsPerRow;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const int column = column_of(c) + i;
        if constexpr (kRowsAtOnce > 1) {
          shared[group * kRowFloats + column] = dweights[c][i];
        } else {
          if (column < params.hidden) to[column] = dweights[c][i];
        }
      }
    }
    if constexpr (kRowsAtOnce > 1) {
      __syncthreads();
      for (int column = static_cast<int>(threadIdx.x); column < params.hidden; column += kNumThreads) {
        float sum = 0.0f;
#pragma unroll 4
        for (int row = 0; row < kRowsAtOnce; ++row) sum += shared[row * kRowFloats + column];
        to[column] = sum;
      }
    }
  }

  // Rows that do not fit: all threads of the block on one after the other, and the block's sum in the workspace.
  static __device__ __forceinline__ void run_twice(const Params& params, float* shared) {
    const RmsNormBlock block(params);
    ptx::wait_for_previous_kernel();
    float* sums_of_block = params.partial_sums + static_cast<long long>(blockIdx.x) * params.hidden;
    int turn = 0;
#pragma unroll 1
    for (int row = block.begin; row < block.end; ++row, turn ^= 1) {
      const Row rows(block, row);
      const auto chunk_at = [&](Params::Operand operand, int column) {
        return Chunk::load(params.data[operand], rows.at(operand, column));
      };
      float sums[2] = {0.0f, 0.0f};
#pragma unroll 2
      for (int column = column_of(0); column < params.hidden; column += kThreadsPerRow * kWidth) {
        add_sums(chunk_at(Params::kX, column), chunk_at(Params::kDout, column), load_weight(block, column), sums);
      }
      Sums::sum(sums, shared, turn);
      const Factors factors(sums, params);
#pragma unroll 1
      for (int column = column_of(0); column < params.hidden; column += kThreadsPerRow * kWidth) {
        float dweights[kWidth] = {};
        if (row > block.begin) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) dweights[i] = sums_of_block[column + i];
        }
        finish(chunk_at(Params::kX, column), chunk_at(Params::kDout, column), load_weight(block, column),
               load_dsum(params, rows, column), factors, dweights)
            .store(params.data[Params::kResult], rows.at(Params::kResult, column));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sums_of_block[column + i] = dweights[i];
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

// Adds up the blocks' sums, 32 columns a block: each of kStrips threads adds every kStrips-th, then one adds the
// strips.
template <int kStrips>
struct Sm80RmsNormWeightSum {
  using Params = Sm80RmsNormParams;
  static constexpr int kColumns = kRmsNormSumColumns;
  static constexpr int kNumThreads = kColumns * kStrips;
  static constexpr int kMinBlocksPerSm = 1;
  static constexpr int kSharedBytes = kNumThreads * static_cast<int>(sizeof(float));

  static __device__ __forceinline__ void run(const Params& params) {
    auto* shared = reinterpret_cast<float*>(tight_shared_memory);
    const uint32 lead = divide(blockIdx.x, params.column_blocks);
    const int column_block = static_cast<int>(blockIdx.x - lead * params.column_blocks.divisor);
    const int column = column_block * kColumns + static_cast<int>(threadIdx.x) % kColumns;
    const int strip = static_cast<int>(threadIdx.x) / kColumns;
    const int num_partials = static_cast<int>(params.blocks_per_lead.divisor);
    const float* from = params.partial_sums + static_cast<long long>(lead) * num_partials * params.hidden + column;
    ptx::wait_for_previous_kernel();
    float sum = 0.0f;
    if (column < params.hidden && params.num_rows > 0) {
#pragma unroll 8
      for (int i = strip; i < num_partials; i += kStrips) sum += from[static_cast<long long>(i) * params.hidden];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (strip != 0 || column >= params.hidden) return;
    for (int i = 1; i < kStrips; ++i) sum += shared[i * kColumns + threadIdx.x];
    long long offsets[Params::kNumOperands] = {};
    add_offsets(params.leads, lead, offsets);
    static_cast<float*>(
        params.data[Params::kDweight])[offsets[Params::kDweight] + column * params.element_strides[Params::kDweight]] =
        sum;
  }
};

}  // namespace heed::cuda
