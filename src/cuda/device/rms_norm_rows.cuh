// What the forward and the backward kernel of RMS norms share: the rows of a block, and a thread's part of one.
#pragma once

#include "cuda/device/rows.cuh"
#include "cuda/sm80_rms_norm_spec.h"

namespace heed::cuda {

// The rows of one leading index that a block works on, and where each operand's rows of that index begin.
struct RmsNormBlock {
  using Params = Sm80RmsNormParams;
  const Params& params;
  int begin, end;
  long long bases[Params::kNumOperands];

  __device__ __forceinline__ explicit RmsNormBlock(const Params& given) : params(given), bases{} {
    const uint32 lead = divide(blockIdx.x, params.blocks_per_lead);
    const int part = static_cast<int>(blockIdx.x - lead * params.blocks_per_lead.divisor);
    begin = part * params.rows_per_block;
    end = min(begin + params.rows_per_block, params.num_rows);
    if (params.leads.count > 0) add_offsets(params.leads, lead, bases);
  }
};

// Where a row lies in each operand.
template <bool kIsAligned>
struct RmsNormRow {
  using Params = Sm80RmsNormParams;
  const Params& params;
  long long offsets[Params::kNumOperands];

  __device__ __forceinline__ RmsNormRow(const RmsNormBlock& block, int row) : params(block.params) {
#pragma unroll
    for (int i = 0; i < Params::kNumOperands; ++i) offsets[i] = block.bases[i];
    add_offsets(params.rows, static_cast<uint32>(row), offsets);
  }
  __device__ __forceinline__ long long at(Params::Operand operand, int column) const {
    return offsets[operand] + column_offset<kIsAligned>(column, params.element_strides[operand]);
  }
};

// 1 / sqrt(mean of squares + eps), as exact as float32 is.
__device__ __forceinline__ float inverse_norm(float sum_of_squares, const Sm80RmsNormParams& params) {
  return __frsqrt_rn(sum_of_squares / static_cast<float>(params.hidden) + params.eps);
}

}  // namespace heed::cuda
