// Parts of one query's attention, each over some of the keys: how they become one, and the end of it, out and lse.
#pragma once

#include "cuda/attention_spec.h"
#include "cuda/device/element.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/device/score_math.cuh"
#include "cuda/sm80_attention_decode_spec.h"
#include "variants/sinks.h"

namespace heed::cuda {

// What a part knows of a row besides its output: the largest score, -inf without keys, and the sum of exp(score - top).
struct alignas(8) RowStatistics {
  float top, sum;
};

// Four neighbouring columns of a row's output, not yet divided, and the row's statistics.
struct PartOfRow {
  float out[4];
  RowStatistics row;
};

// Where no key has been seen: -inf - 0 is right, -inf - (-inf) is not.
__device__ __forceinline__ float finite_or_zero(float top) { return top == -kInfinity ? 0.0f : top; }

// e^x for x <= 0. The fast exponential is too coarse for float32.
template <Element kElement>
__device__ __forceinline__ float decode_exp(float x) {
  return kElement == Element::kFloat32 ? exp_accurate(x) : ptx::exp2_approx(x * kLog2E);
}

// Where the parts of a row lie: four columns of each, and its statistics.
struct Parts {
  int count;
  const float* outs;
  int out_stride;  // floats
  const RowStatistics* rows;
  int row_stride;
};

// In their order. Four are on their way at a time; little code, because it runs once and comes from far.
template <Element kElement>
__device__ __forceinline__ PartOfRow merge_parts(const Parts& parts) {
  constexpr int kAtOnce = 4;
  float top = -kInfinity;
#pragma unroll 1
  for (int first = 0; first < parts.count; first += kAtOnce) {
#pragma unroll
    for (int i = first; i < first + kAtOnce; ++i) {
      if (i < parts.count) top = fmaxf(top, parts.rows[i * parts.row_stride].top);
    }
  }
  PartOfRow merged{{0.0f, 0.0f, 0.0f, 0.0f}, {top, 0.0f}};
  const float reference = finite_or_zero(top);
#pragma unroll 1
  for (int first = 0; first < parts.count; first += kAtOnce) {
    RowStatistics rows[kAtOnce];
    float4 outs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      rows[i] = {-kInfinity, 0.0f};
      outs[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (first + i >= parts.count) continue;
      rows[i] = parts.rows[(first + i) * parts.row_stride];
      outs[i] = *reinterpret_cast<const float4*>(parts.outs + (first + i) * parts.out_stride);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = decode_exp<kElement>(rows[i].top - reference);
      merged.row.sum = fmaf(rows[i].sum, weight, merged.row.sum);
      merged.out[0] = fmaf(outs[i].x, weight, merged.out[0]);
      merged.out[1] = fmaf(outs[i].y, weight, merged.out[1]);
      merged.out[2] = fmaf(outs[i].z, weight, merged.out[2]);
      merged.out[3] = fmaf(outs[i].w, weight, merged.out[3]);
    }
  }
  return merged;
}

// Where the parts of the operands lie that belong to one index over the leading axes.
__device__ __forceinline__ void add_lead_offsets(const Sm80AttentionDecodeParams& params, uint32 problem,
                                                 long long (&offsets)[kNumDecodeOperands]) {
  if (params.has_lead != 0) add_offsets(params.lead, problem, offsets);
}

// Divides and writes columns [column, column + 4) of a query head; the lse too where column is 0.
template <Element kElement, bool kIsAligned>
__device__ __forceinline__ void finish_part(const Sm80AttentionDecodeParams& params, uint32 problem, int head,
                                            int column, const PartOfRow& part) {
  long long offsets[kNumDecodeOperands] = {};
  add_lead_offsets(params, problem, offsets);
  const bool has_sink = params.sinks.data != nullptr;
  float sink = 0.0f;
  if (has_sink)
    sink = *reinterpret_cast<const float*>(params.sinks.data + offsets[kDecodeSinks] + head * params.sinks.head_bytes);
  const auto exp = [](float x) { return exp_accurate(x); };
  const variants::RowEnd<float> end = variants::finish_row(part.row.top, 0.0f, part.row.sum, has_sink, sink, exp);
  if (column == 0 && params.lse.data != nullptr) {
    *reinterpret_cast<float*>(params.lse.data + offsets[kDecodeLse] + head * params.lse.head_bytes) =
        end.top + (end.rest + logf(end.total));
  }
  const int num_columns = params.head_dim_v - column;
  if (num_columns <= 0) return;
  const float factor = 1.0f / end.divisor;
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = part.out[i] * factor;
  char* const to = params.out.data + offsets[kDecodeOut] + head * params.out.head_bytes + column * params.out.dim_bytes;
  if constexpr (kElement == Element::kFloat32) {
    if (kIsAligned && num_columns >= 4) {
      *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < num_columns) *reinterpret_cast<float*>(to + i * params.out.dim_bytes) = values[i];
    }
  } else {
    const uint32 low = MathOf<kElement>::pack(values[0], values[1]),
                 high = MathOf<kElement>::pack(values[2], values[3]);
    if (kIsAligned && num_columns >= 4) {
      *reinterpret_cast<uint2*>(to) = {low, high};
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32 bits = (i < 2 ? low : high) >> (16 * (i % 2));
      if (i < num_columns) {
        *reinterpret_cast<unsigned short*>(to + i * params.out.dim_bytes) = static_cast<unsigned short>(bits);
      }
    }
  }
}

// A query head's part of the workspace.
struct DecodePieces {
  float* outs;          // [pieces][row]
  RowStatistics* rows;  // [pieces]
  int row;

  __device__ __forceinline__ DecodePieces(const Sm80AttentionDecodeParams& params, uint32 problem, int head) {
    const int num_pieces = static_cast<int>(params.num_pieces.divisor);
    const DecodeWorkspace layout = decode_workspace(num_pieces, params.head_dim_v);
    const long long num_q_heads = static_cast<long long>(params.num_kv_heads.divisor) * params.group;
    row = layout.row;
    outs = params.workspace + (problem * num_q_heads + head) * layout.floats;
    rows = reinterpret_cast<RowStatistics*>(outs + static_cast<long long>(num_pieces) * row);
  }
};

}  // namespace heed::cuda
