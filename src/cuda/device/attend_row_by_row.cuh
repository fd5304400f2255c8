// Attention of a few rows by one warp, key by key and from global memory: for rows whose output is not finite. A key
// that a row does not see must not reach it, and in a product with zeros for weights it would: 0 * NaN is NaN. Rows
// come here too where scores are too steep, or accumulators too large, for the usual way. Small rather than fast.
#pragma once

#include "cuda/device/attention_work.cuh"
#include "cuda/device/element.cuh"
#include "cuda/device/ptx_sm90.cuh"
#include "cuda/device/score_math.cuh"
#include "cuda/device/score_transform.cuh"
#include "cuda/sm90_attention_fwd_spec.h"
#include "variants/band.h"
#include "variants/segment_ids.h"

namespace heed::cuda {

// Rows start at multiples of 16 bytes, and their elements are adjacent: as tensor maps demand.
template <Element kElement>
__device__ __forceinline__ float dot_product(const unsigned short* a, const unsigned short* b, int dim) {
  using Math = MathOf<kElement>;
  float sum = 0.0f;
  int i = 0;
#pragma unroll 1
  for (; i + 8 <= dim; i += 8) {
    const uint4 a_chunk = *reinterpret_cast<const uint4*>(a + i), b_chunk = *reinterpret_cast<const uint4*>(b + i);
    const uint32 a_words[4] = {a_chunk.x, a_chunk.y, a_chunk.z, a_chunk.w};
    const uint32 b_words[4] = {b_chunk.x, b_chunk.y, b_chunk.z, b_chunk.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      sum = fmaf(Math::to_float(a_words[word] & 0xffffu), Math::to_float(b_words[word] & 0xffffu), sum);
      sum = fmaf(Math::to_float(a_words[word] >> 16), Math::to_float(b_words[word] >> 16), sum);
    }
  }
#pragma unroll 1
  for (; i < dim; ++i) sum = fmaf(Math::to_float(a[i]), Math::to_float(b[i]), sum);
  return sum;
}

// Columns of the output that are computed at once; a lane has each 32nd.
template <Sm90AttentionFwdSpec kSpec>
inline constexpr int kColumnsAtOnce = kSpec.head_dim_v < 128 ? (kSpec.head_dim_v + 31) / 32 * 32 : 128;

// Writes some columns of a row's output, and its LSE. Called by a whole warp. Of a pack of heads, whose first one is
// that of `work`, rows are counted as in its tiles.
template <Sm90AttentionFwdSpec kSpec>
__device__ __forceinline__ void attend_row(const Sm90AttentionFwdParams& params, const AttentionWork& work, int row,
                                           int first_column) {
  using Math = MathOf<kSpec.element>;
  constexpr int kColumnsPerLane = kColumnsAtOnce<kSpec> / 32;
  constexpr float kSmallestExponent = -745.0f;  // of e, that float64 tells from 0
  const int lane = ptx::thread_index() & 31;
  // Computed where it is needed: registers are few.
  const auto head_of_row = [&, in_pack = row] {
    return work.head + (kSpec.packs_heads ? in_pack & ((1 << params.head_shift) - 1) : 0);
  };
  if constexpr (kSpec.packs_heads) row >>= params.head_shift;
  const long long token = static_cast<long long>(work.q_token) + row;
  const unsigned short* q = pointer_to<unsigned short>(params, params.q, work, head_of_row()) + token * params.q.token;
  const unsigned short* k =
      pointer_to<unsigned short>(params, params.k, work, work.kv_head) + work.k_token * params.k.token;
  const unsigned short* v =
      pointer_to<unsigned short>(params, params.v, work, work.kv_head) + work.k_token * params.v.token;
  const int* kv_ids = nullptr;
  int id = 0;
  if constexpr (kSpec.has_segment_ids) {
    kv_ids = pointer_to<int>(params, params.kv_segment_ids, work, 0);
    id = pointer_to<int>(params, params.q_segment_ids, work, 0)[row * params.q_segment_ids.token];
  }
  float slope = 0.0f;
  if constexpr (kSpec.has_alibi) slope = *pointer_to<float>(params, params.alibi_slopes, work, head_of_row());
  const variants::Band band =
      variants::make_band(work.q_len, work.kv_len, params.window_left, params.window_right, params.is_bottom_right);
  const variants::Range keys = variants::intersect(band.keys_of_any({row, row + 1}), {0, work.kv_len});
  const int begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
  const float scale = kSpec.has_score_transform() ? 1.0f : params.scale;
  const auto read_sink = [&] {
    return params.sinks.data == nullptr ? -kInfinity : *pointer_to<float>(params, params.sinks, work, head_of_row());
  };

  float top = -kInfinity;  // the largest score; 0 where there is none
  float rest = 0.0f;       // of top * scale, which is rounded
  float shift = 0.0f;      // by how much the sink is above it, if it is
  bool is_sink_larger = false;
  float total = 0.0f;  // NaN before anything is summed up: the whole row is
  float out[kColumnsPerLane] = {};
  // Once to find the largest score, and once more to sum up.
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int first = begin; first < end; first += 32) {
      const int key = first + lane;
      bool is_seen = key < end;
      if constexpr (kSpec.has_segment_ids) {
        is_seen = is_seen && variants::same_segment(id, kv_ids[key * params.kv_segment_ids.token]);
      }
      float score = -kInfinity;
      if (is_seen) {
        const float product = dot_product<kSpec.element>(q, k + key * params.k.token, params.head_dim_qk);
        score = score_of<kSpec>(params, slope, product, static_cast<float>(row + band.offset - key));
      }
      if (pass == 0) {
        if (__any_sync(0xffffffffu, !(score < kInfinity))) {
          total = kNaN;
          break;
        }
        top = fmaxf(top, score);
        continue;
      }
      const float exponent = (score - top) * scale - shift;
      const float weight = exp_accurate(exponent);
      total += weight;
      // An infinite value counts however small its weight is.
      const uint32 counting = __ballot_sync(0xffffffffu, exponent > kSmallestExponent);
      uint32 seen = __ballot_sync(0xffffffffu, is_seen);
#pragma unroll 1
      while (seen != 0) {
        const int owner = __ffs(static_cast<int>(seen)) - 1;
        seen &= seen - 1;
        const float factor = __shfl_sync(0xffffffffu, weight, owner);
        const bool counts = (counting >> owner & 1) != 0;
        const unsigned short* values = v + (first + owner) * params.v.token;
#pragma unroll
        for (int i = 0; i < kColumnsPerLane; ++i) {
          const int column = first_column + i * 32 + lane;
          const float value = column < params.head_dim_v ? Math::to_float(values[column]) : 0.0f;
          out[i] = fmaf(counts && fabsf(value) == kInfinity ? 1.0f : factor, value, out[i]);
        }
      }
    }
    if (pass == 1 || !(total == 0.0f)) break;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    const bool is_empty = top == -kInfinity;
    if (is_empty) top = 0.0f;
    rest = fmaf(top, scale, -(top * scale));
    const float sink = read_sink();
    const float above = (sink - top * scale) - rest;
    is_sink_larger = above > 0.0f || (is_empty && sink > -kInfinity);
    if (is_sink_larger) shift = above;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  const float sink = read_sink();
  const float base = is_sink_larger ? sink : top * scale, base_rest = is_sink_larger ? 0.0f : rest;
  if (params.sinks.data != nullptr) total += exp_accurate((sink - base) - base_rest);
  unsigned short* to =
      const_cast<unsigned short*>(pointer_to<unsigned short>(params, params.out, work, head_of_row())) +
      token * params.out.token;
  const float factor = total == 0.0f ? 1.0f : ptx::reciprocal_approx(total);
#pragma unroll
  for (int i = 0; i < kColumnsPerLane; ++i) {
    const int column = first_column + i * 32 + lane;
    if (column < params.head_dim_v) to[column] = static_cast<unsigned short>(Math::pack(out[i] * factor, 0.0f));
  }
  if (params.lse.data != nullptr && lane == 0) {
    const_cast<float*>(pointer_to<float>(params, params.lse, work, head_of_row()))[token * params.lse.token] =
        total == 0.0f ? -kInfinity : base + (base_rest + logf(total));
  }
}

// The same in few registers, where `has_tall_tile`: lanes have two columns each, and the warp takes key after key.
template <Sm90AttentionFwdSpec kSpec>
__device__ __forceinline__ void attend_row_in_pairs(const Sm90AttentionFwdParams& params, const AttentionWork& work,
                                                    int row) {
  static_assert(kSpec.has_tall_tile());
  using Math = MathOf<kSpec.element>;
  constexpr float kSmallestExponent = -745.0f;
  const int column = (ptx::thread_index() & 31) * 2;
  const auto find = [&](const DeviceOperand& operand, int head, int token) {
    return pointer_to<unsigned short>(params, operand, work, head) + token * operand.token + column;
  };
  const auto read = [&](const unsigned short* from, int dim, float(&pair)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) pair[e] = column + e < dim ? Math::to_float(from[e]) : 0.0f;
  };
  // Found again where it is needed: the compiler does not keep what it has read of memory beyond a barrier.
  const auto find_keys = [&] {
    __syncwarp();
    const variants::Band band =
        variants::make_band(work.q_len, work.kv_len, params.window_left, params.window_right, params.is_bottom_right);
    return variants::intersect(band.keys_of_any({row, row + 1}), {0, work.kv_len});
  };
  const auto [begin, end] = find_keys();
  const int num_keys = static_cast<int>(end - begin);
  // To the last key for the largest score, and back to sum up.
  const unsigned short* k = find(params.k, work.kv_head, work.k_token + static_cast<int>(begin));
  float q[2];
  read(find(params.q, work.head, work.q_token + row), params.head_dim_qk, q);
  const auto score_of_key = [&] {
    float pair[2];
    read(k, params.head_dim_qk, pair);
    float sum = fmaf(q[0], pair[0], q[1] * pair[1]);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  };
  float top = -kInfinity, total = 0.0f;
#pragma unroll 1
  for (int i = 0; i < num_keys; ++i) {
    const float score = score_of_key();
    if (!(score < kInfinity)) {
      total = kNaN;
      break;
    }
    top = fmaxf(top, score);
    k += params.k.token;
  }
  const auto read_sink = [&] { return *pointer_to<float>(params, params.sinks, work, work.head); };
  const bool is_empty = top == -kInfinity;
  if (is_empty) top = 0.0f;
  float shift = 0.0f;  // by how much the sink is above the largest score, if it is
  if (params.sinks.data != nullptr) {
    const float above = (read_sink() - top * params.scale) - fmaf(top, params.scale, -(top * params.scale));
    if (above > 0.0f || (is_empty && above > -kInfinity)) shift = above;
  }
  float out[2] = {};
  if (total == 0.0f) {
    const unsigned short* v = find(params.v, work.kv_head, work.k_token + static_cast<int>(find_keys().end));
#pragma unroll 1
    for (int left = num_keys; left > 0; --left) {
      k -= params.k.token;
      v -= params.v.token;
      const float exponent = (score_of_key() - top) * params.scale - shift;
      const float weight = exp_accurate(exponent);
      total += weight;
      float pair[2];
      read(v, params.head_dim_v, pair);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool counts = exponent > kSmallestExponent && fabsf(pair[e]) == kInfinity;
        out[e] = fmaf(counts ? 1.0f : weight, pair[e], out[e]);
      }
    }
  }
  __syncwarp();
  float base = top * params.scale, rest = fmaf(top, params.scale, -(top * params.scale));
  if (params.sinks.data != nullptr) {
    const float sink = read_sink();
    if (shift != 0.0f) {
      base = sink;
      rest = 0.0f;
    }
    total += exp_accurate((sink - base) - rest);
  }
  const float factor = total == 0.0f ? 1.0f : ptx::reciprocal_approx(total);
  unsigned short* to = const_cast<unsigned short*>(find(params.out, work.head, work.q_token + row));
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (column + e < params.head_dim_v) to[e] = static_cast<unsigned short>(Math::pack(out[e] * factor, 0.0f));
  }
  if (params.lse.data != nullptr && column == 0) {
    const_cast<float*>(
        pointer_to<float>(params, params.lse, work, work.head))[(work.q_token + row) * params.lse.token] =
        total == 0.0f ? -kInfinity : base + (rest + logf(total));
  }
}

}  // namespace heed::cuda
