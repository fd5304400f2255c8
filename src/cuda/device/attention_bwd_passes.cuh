// Attention backward: what comes before the main pass and after it. Both are limited by memory.
//
// Before: for each query row its statistics, lse and rowsum(dO * O) - dlse, and an empty sum for its dQ. After: dQ in
// its own type, and the gradients of sinks and ALiBi slopes, which are sums over the rows of a head and over what the
// main pass's blocks left.
#pragma once

#include "cuda/device/attention_work.cuh"
#include "cuda/device/element.cuh"
#include "cuda/device/score_math.cuh"
#include "cuda/device/shared_tile.cuh"
#include "cuda/sm80_attention_bwd_spec.h"

namespace heed::cuda {

struct AttentionBwdPassSpec {
  Element element = Element::kBFloat16;
  bool is_aligned = true;
};

// What both have in common: a block takes kRows rows of one query head, kThreadsPerRow threads each.
template <AttentionBwdPassSpec kSpec>
struct AttentionBwdPass {
  using Params = Sm80AttentionBwdParams;
  static constexpr int kNumThreads = 128;
  static constexpr int kMinBlocksPerSm = 8;
  static constexpr int kSharedBytes = 0;
  static constexpr int kThreadsPerRow = 8;
  static constexpr int kRows = kBwdPassRows;
  using Math = MathOf<kSpec.element>;
  static constexpr int kElementBytes = bytes_of(kSpec.element);
  static constexpr int kElementsPerChunk = 16 / kElementBytes;

  // Variable lengths: all rows of all sequences are those of one.
  struct Work : AttentionWork {
    int tile;
    float* workspace;  // of the head
    __device__ __forceinline__ explicit Work(const Params& params) : tile(0) {
      const uint32 num_tiles = max(static_cast<uint32>(params.q_len + kRows - 1) / kRows, 1u);
      tile = static_cast<int>(blockIdx.x % num_tiles);
      const uint32 index = blockIdx.x / num_tiles;
      const uint32 batch_rows = params.cu_seqlens_q.data != nullptr ? 1u : static_cast<uint32>(params.batch);
      head = static_cast<int>(index % static_cast<uint32>(params.num_q_heads));
      const uint32 sequence = index / static_cast<uint32>(params.num_q_heads);
      batch = static_cast<int>(sequence % batch_rows);
      problem = sequence / batch_rows;
      workspace = params.workspace + static_cast<long long>(index) * params.layout.floats;
    }
  };

  static __device__ __forceinline__ char* row_of(const Params& params, const DeviceOperand& operand, const Work& work,
                                                 int row) {
    return static_cast<char*>(operand.data) +
           (offset_of(params, operand, work, work.head) + row * operand.token) * kElementBytes;
  }

  // The sum over the block, in every thread; in an order that depends on nothing.
  static __device__ __forceinline__ float sum_over_block(float x) {
    __shared__ float warps[kNumThreads / 32];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kNumThreads / 32; ++warp) sum += warps[warp];
    return sum;
  }
};

template <AttentionBwdPassSpec kSpec>
struct AttentionBwdPrepare : AttentionBwdPass<kSpec> {
  using Base = AttentionBwdPass<kSpec>;
  using Params = Sm80AttentionBwdParams;
  using Work = typename Base::Work;
  using Math = typename Base::Math;

  static __device__ __forceinline__ uint4 load_chunk(const char* row, long long dim_stride_bytes, int column, int dim) {
    const char* from = row + column * dim_stride_bytes;
    if constexpr (kSpec.is_aligned) {
      return *reinterpret_cast<const uint4*>(from);
    } else {
      return gather_chunk<Base::kElementBytes>(from, dim_stride_bytes, dim - column);
    }
  }

  static __device__ __forceinline__ float dot(uint4 a, uint4 b) {
    const uint32 a_words[4] = {a.x, a.y, a.z, a.w}, b_words[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Base::kElementBytes == 4) {
        sum = fmaf(__uint_as_float(a_words[i]), __uint_as_float(b_words[i]), sum);
      } else {
        sum = fmaf(Math::to_float(a_words[i]), Math::to_float(b_words[i]), sum);
        sum = fmaf(Math::to_float(a_words[i] >> 16), Math::to_float(b_words[i] >> 16), sum);
      }
    }
    return sum;
  }

  // Whether the lse of a row of Q that is not finite may be finite: that of one that sees no key is its sink, and a
  // soft cap makes infinite scores finite. Otherwise the lse tells.
  static __device__ __forceinline__ bool hides_queries(const Params& params) {
    return params.sinks.data != nullptr || params.softcap > 0.0f;
  }

  static __device__ __forceinline__ void write_statistics(const Params& params, const Work& work, int row,
                                                          float product, bool is_finite) {
    const float lse = pointer_to<float>(params, params.lse, work, work.head)[row * params.lse.token];
    if (params.dlse.data != nullptr) {
      product -= pointer_to<float>(params, params.dlse, work, work.head)[row * params.dlse.token];
    }
    // What is not finite also says that the row of Q or dO may not be: the main pass keeps it out of its products.
    const bool is_plain = is_finite && fabsf(lse) < kInfinity;
    float* statistics = work.workspace + 2 * static_cast<long long>(row);
    statistics[0] = lse == -kInfinity ? kInfinity : is_plain ? lse * params.lse_factor : kNaN;
    statistics[1] = product;
  }

  // rowsum(dO * O) of 16-bit rows.
  static __device__ __forceinline__ void make_statistics(const Params& params, const Work& work) {
    const int thread = static_cast<int>(threadIdx.x), part = thread % Base::kThreadsPerRow;
#pragma unroll 1
    for (int inside = thread / Base::kThreadsPerRow; inside < Base::kRows;
         inside += Base::kNumThreads / Base::kThreadsPerRow) {
      const int row = work.tile * Base::kRows + inside;
      float product = 0.0f;
      int is_finite = 1;  // dO, and Q if need be
      if (row < params.q_len) {
        const char* out = Base::row_of(params, params.out, work, row);
        const char* dout = Base::row_of(params, params.dout, work, row);
        constexpr int kStep = Base::kThreadsPerRow * Base::kElementsPerChunk;
        for (int column = part * Base::kElementsPerChunk; column < params.head_dim_v; column += kStep) {
          const uint4 chunk = load_chunk(dout, params.dout.dim * Base::kElementBytes, column, params.head_dim_v);
          if (!Math::are_finite(chunk)) is_finite = 0;
          product += dot(load_chunk(out, params.out.dim * Base::kElementBytes, column, params.head_dim_v), chunk);
        }
        if (hides_queries(params)) {
          const char* q = Base::row_of(params, params.q, work, row);
          for (int column = part * Base::kElementsPerChunk; column < params.head_dim_qk; column += kStep) {
            const uint4 chunk = load_chunk(q, params.q.dim * Base::kElementBytes, column, params.head_dim_qk);
            if (!Math::are_finite(chunk)) is_finite = 0;
          }
        }
      }
#pragma unroll
      for (int distance = Base::kThreadsPerRow / 2; distance > 0; distance /= 2) {
        product += __shfl_xor_sync(0xffffffffu, product, distance);
        is_finite &= __shfl_xor_sync(0xffffffffu, is_finite, distance);
      }
      if (part == 0 && row < params.q_len) write_statistics(params, work, row, product, is_finite != 0);
    }
  }

  // rowsum(dO * O) of float32 rows, by the instructions that give V dO^T in the main pass: a row that sees one key only
  // has O = V, and the difference of both products is then exactly 0. A warp takes 16 rows; of the products of all with
  // all only the diagonal is used.
  static __device__ __forceinline__ void make_statistics_float32(const Params& params, const Work& work) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
    const int first_row = work.tile * Base::kRows + (thread >> 5) * 16 + (lane >> 2);
    const auto load = [&](const DeviceOperand& operand, int row, int column) {
      if (row >= params.q_len || column >= params.head_dim_v) return uint32{0};
      return *reinterpret_cast<const uint32*>(Base::row_of(params, operand, work, row) + column * operand.dim * 4);
    };
    typename Math::Sum sums[2];  // rows and columns up to 8, and from 8 on
    int is_finite[2] = {1, 1};
#pragma unroll 1
    for (int column = 0; column < params.head_dim_v; column += 8) {
      uint32 out[4], dout[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + i % 2 * 8, element = column + (lane & 3) + i / 2 * 4;
        out[i] = load(params.out, row, element);
        dout[i] = load(params.dout, row, element);
        if ((dout[i] & 0x7f800000u) == 0x7f800000u) is_finite[i % 2] = 0;
      }
      const typename Math::A a = Math::make_a(out);
#pragma unroll
      for (int half = 0; half < 2; ++half) sums[half].add_product(a, Math::make_b(dout[half], dout[2 + half]));
    }
    if (hides_queries(params)) {
#pragma unroll 1
      for (int column = lane & 3; column < params.head_dim_qk; column += 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + half * 8;
          if (row >= params.q_len) continue;
          const char* at = Base::row_of(params, params.q, work, row) + column * params.q.dim * 4;
          if ((*reinterpret_cast<const uint32*>(at) & 0x7f800000u) == 0x7f800000u) is_finite[half] = 0;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      is_finite[half] &= __shfl_xor_sync(0xffffffffu, is_finite[half], 1);
      is_finite[half] &= __shfl_xor_sync(0xffffffffu, is_finite[half], 2);
      const int row = first_row + half * 8, place = lane >> 2;
      if (place / 2 != (lane & 3) || row >= params.q_len) continue;  // not the lane that has the diagonal
      const float product = place % 2 == 0 ? sums[half].total(2 * half) : sums[half].total(2 * half + 1);
      write_statistics(params, work, row, product, is_finite[half] != 0);
    }
  }

  static __device__ __forceinline__ void run(const Params& params) {
    const Work work(params);
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (Base::kElementBytes == 4) {
      make_statistics_float32(params, work);
    } else {
      make_statistics(params, work);
    }
    const long long first = static_cast<long long>(work.tile) * Base::kRows * params.layout.dq_row;
    const long long last =
        min(first + Base::kRows * params.layout.dq_row, static_cast<long long>(params.q_len) * params.layout.dq_row);
    for (long long i = first + thread * 4; i < last; i += Base::kNumThreads * 4) {
      *reinterpret_cast<float4*>(work.workspace + params.layout.dq + i) = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
    if (work.tile != 0) return;
    const int num_others = params.layout.num_turns + params.layout.num_slopes;
    for (int i = thread; i < num_others; i += Base::kNumThreads) work.workspace[params.layout.turns + i] = 0.0f;
  }
};

template <AttentionBwdPassSpec kSpec>
struct AttentionBwdFinish : AttentionBwdPass<kSpec> {
  using Base = AttentionBwdPass<kSpec>;
  using Params = Sm80AttentionBwdParams;
  using Work = typename Base::Work;
  using Math = typename Base::Math;

  // The gradients of a head's sink and slope.
  static __device__ __forceinline__ void write_head_sums(const Params& params, const Work& work) {
    const int thread = static_cast<int>(threadIdx.x);
    if (params.dsinks.data != nullptr) {
      const float sink = *pointer_to<float>(params, params.sinks, work, work.head);
      const float* lse = pointer_to<float>(params, params.lse, work, work.head);
      float sum = 0.0f;
      for (int row = thread; row < params.q_len; row += Base::kNumThreads) {
        const float row_lse = lse[row * params.lse.token];
        if (row_lse != -kInfinity)
          sum -= exp_accurate(sink - row_lse) * work.workspace[2 * static_cast<long long>(row) + 1];
      }
      sum = Base::sum_over_block(sum);
      if (thread == 0) *const_cast<float*>(pointer_to<float>(params, params.dsinks, work, work.head)) = sum;
    }
    if (params.dalibi_slopes.data != nullptr) {
      float sum = 0.0f;
      for (int i = thread; i < params.layout.num_slopes; i += Base::kNumThreads) {
        sum += work.workspace[params.layout.slopes + i];
      }
      sum = Base::sum_over_block(sum);
      if (thread == 0) *const_cast<float*>(pointer_to<float>(params, params.dalibi_slopes, work, work.head)) = sum;
    }
  }

  static __device__ __forceinline__ void run(const Params& params) {
    const Work work(params);
    const int thread = static_cast<int>(threadIdx.x);
    const int part = thread % Base::kThreadsPerRow;
#pragma unroll 1
    for (int inside = thread / Base::kThreadsPerRow; inside < Base::kRows;
         inside += Base::kNumThreads / Base::kThreadsPerRow) {
      const int row = work.tile * Base::kRows + inside;
      if (row >= params.q_len) break;
      const float* dq = work.workspace + params.layout.dq + static_cast<long long>(row) * params.layout.dq_row;
      char* to = Base::row_of(params, params.dq, work, row);
      const long long dim_stride_bytes = params.dq.dim * Base::kElementBytes;
      for (int first = part * 16; first < params.head_dim_qk; first += Base::kThreadsPerRow * 16) {
        // 16 columns as the accumulators of two tiles have them: columns 2t, 2t + 1 of the left, then of the right one.
        float left[8], right[8];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const float4 four = *reinterpret_cast<const float4*>(dq + first + t * 4);
          left[2 * t] = four.x * params.scale;
          left[2 * t + 1] = four.y * params.scale;
          right[2 * t] = four.z * params.scale;
          right[2 * t + 1] = four.w * params.scale;
        }
        write_eight(to, dim_stride_bytes, first, params.head_dim_qk, left);
        write_eight(to, dim_stride_bytes, first + 8, params.head_dim_qk, right);
      }
    }
    if (work.tile == 0) write_head_sums(params, work);
  }

  static __device__ __forceinline__ void write_eight(char* row, long long dim_stride_bytes, int column, int dim,
                                                     const float (&x)[8]) {
    if constexpr (Base::kElementBytes == 4) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        if (column + i >= dim) return;
        const uint4 bits = {__float_as_uint(x[i]), __float_as_uint(x[i + 1]), __float_as_uint(x[i + 2]),
                            __float_as_uint(x[i + 3])};
        write_chunk<4, kSpec.is_aligned>(row, dim_stride_bytes, column + i, dim, bits);
      }
    } else {
      if (column >= dim) return;
      const uint4 bits = {Math::pack(x[0], x[1]), Math::pack(x[2], x[3]), Math::pack(x[4], x[5]),
                          Math::pack(x[6], x[7])};
      write_chunk<2, kSpec.is_aligned>(row, dim_stride_bytes, column, dim, bits);
    }
  }
};

}  // namespace heed::cuda
