// Attention forward for every GPU since Ampere: mma.sync, cp.async, ldmatrix. Serves every feature and every head dim.
//
// Where the time and the bytes go
// -------------------------------
// A block of 4 warps owns a tile of query rows of one head and walks along the keys that they see: S = Q K^T, online
// softmax, O += P V. S, P and O live in registers, Q, K and V in shared memory.
//
// Tensor cores. mma.sync is the limit to aim at. With 32 rows a warp, each 16-byte fragment of K or V read from shared
// memory feeds two products: at head dim 128 and 64 keys a step, a warp reads 16 KiB of K, 16 of V and 8 of Q for 256
// products, 320 cycles of the multiprocessor's shared memory for about 410 cycles of its tensor cores. With 16 rows a
// warp, shared memory would be the limit; there are not enough registers for 32 rows above head dim 128.
//
// Registers. O takes rows * dim / 32 of them (128 at 32 x 128), S another 64 and the operands of P V reuse S's. Two
// blocks share a multiprocessor, so that one warp's softmax runs under another's products.
//
// Softmax. Scores keep the units of the raw product; the scale and log2(e) are one factor, folded into the exponent's
// multiply-add. A row's reference is a maximum seen earlier, and moves only when a score exceeds it by 2^8: P then
// stays below 2^8, harmless in any type, and O is almost never rescaled.
//
// Copies. With two stages, K and V of the next step arrive by cp.async while this one is computed: one barrier a step.
// With one stage, V arrives during Q K^T and the next K during P V: two barriers. Rows past the end arrive as zeros,
// never as what lies behind (0 * NaN is NaN). Shared memory rows are swizzled: no bank conflicts.
//
// L2. Blocks that run at the same time share K and V: consecutive ones take tiles of the same head, or of as many heads
// as fit L2 where a causal mask makes the last tiles the longest and they must come first (attention_work.cuh).
#pragma once

#include "cuda/device/attention_work.cuh"
#include "cuda/device/element.cuh"
#include "cuda/device/products.cuh"
#include "cuda/device/row_set.cuh"
#include "cuda/device/score_math.cuh"
#include "cuda/device/segment_range.cuh"
#include "cuda/device/shared_tile.cuh"
#include "cuda/sm80_attention_fwd_spec.h"
#include "variants/alibi.h"
#include "variants/band.h"
#include "variants/segment_ids.h"
#include "variants/sinks.h"
#include "variants/softcap.h"

namespace heed::cuda {

template <Sm80AttentionFwdSpec kSpec>
struct Sm80AttentionFwd {
  using Params = Sm80AttentionFwdParams;
  static constexpr Sm80AttentionFwdTile kTile = sm80_attention_fwd_tile(kSpec);
  static constexpr int kNumThreads = kTile.num_threads();
  static constexpr int kMinBlocksPerSm = kTile.min_blocks;
  // With one stage, K of the next step is copied while V is in use, and V while K is.
  static constexpr bool kHasOneStage = kTile.num_stages == 1;
  static constexpr int kSharedBytes = sm80_attention_fwd_shared_bytes(kSpec);

  static constexpr Element kElement = kSpec.element;
  static constexpr bool kIsFloat32 = kElement == Element::kFloat32;
  using Math = MathOf<kElement>;
  static constexpr int kElementBytes = bytes_of(kElement);
  static constexpr int kQRows = kTile.q_rows();
  static constexpr int kKvRows = kTile.kv_rows;
  static constexpr int kWarpRowTiles = kTile.rows_per_warp / 16;  // 16 rows each
  static constexpr int kKeyTiles = kKvRows / 8;                   // of a step, 8 keys each
  static constexpr int kDimTiles = kSpec.head_dim_v / 8;
  static constexpr int kQkSteps = kSpec.head_dim_qk * kElementBytes / 32;
  // How many of these steps the compiler may overlap: as many as there are registers for, as each architecture's
  // compiler has it. Above head dim 128 there are half as many rows a warp, and registers to spare.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 10 != 90
  static constexpr int kUnroll = kIsFloat32 ? 1 : kSpec.has_segment_ids && __CUDA_ARCH__ < 900 ? 4 : 2;
#else
  static constexpr int kUnroll = kIsFloat32 ? 3 : 4;
#endif
  static constexpr int kQkUnroll = kIsFloat32 || kSpec.head_dim_v <= 128 ? kUnroll : 16;
  static constexpr float kSlack = 8.0f;     // how far, as a power of 2, scores may exceed their reference
  static constexpr float kSteep = 1024.0f;  // exponents beyond lose 2^-14 and more when a reference is rounded

  static constexpr int kQkRowBytes = sm80_row_bytes(kElement, kSpec.head_dim_qk);
  static constexpr int kVRowBytes = sm80_row_bytes(kElement, kSpec.head_dim_v);
  using QTile = SharedTile<kElement, kQRows, kSpec.head_dim_qk>;
  using KTile = SharedTile<kElement, kKvRows, kSpec.head_dim_qk>;
  using VTile = SharedTile<kElement, kKvRows, kSpec.head_dim_v>;
  using OutTile = SharedTile<kElement, kQRows, kSpec.head_dim_v>;
  static constexpr int kQBytes = QTile::kBytes > OutTile::kBytes ? QTile::kBytes : OutTile::kBytes;
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes;
  static_assert(kTile.num_stages == 1 || kTile.num_stages == 2);
  static_assert(kQBytes + kTile.num_stages * kStageBytes == kSharedBytes);

  // A warp's share of a step, for kRowTiles times 16 rows.
  template <int kRowTiles>
  using Scores = Accumulator[kRowTiles][kKeyTiles];
  template <int kRowTiles>
  using Output = Accumulator[kRowTiles][kDimTiles];

  // Rows of a thread: lane / 4 + 8 * half of each row tile.
  template <int kRowTiles>
  struct Rows {
    float top[kRowTiles][2];  // the score that probabilities refer to; -inf until a key is seen
    float sum[kRowTiles][2];  // this thread's columns only, until the end
    bool is_steep;            // whether any `top` of the warp is
  };

  struct Lane {
    int lane, warp;
    int row, column;  // in its half row tile; the first of its two in an 8-column tile
    __device__ __forceinline__ Lane() : Lane(ptx::thread_index()) {}
    __device__ __forceinline__ explicit Lane(int thread)
        : lane(thread & 31), warp(thread >> 5), row(lane >> 2), column((lane & 3) * 2) {}
  };

  // -------------------------------------------------------------------------------------------------------------------
  // Load.

  // The rows of one operand that a block may copy.
  struct Source {
    const char* rows;
    __device__ __forceinline__ Source(const Params& params, const DeviceOperand& operand, const AttentionWork& work,
                                      int head, int token)
        : rows(static_cast<const char*>(operand.data) +
               (offset_of(params, operand, work, head) + token * operand.token) * kElementBytes) {}

    template <class Tile>
    __device__ __forceinline__ void copy(const DeviceOperand& operand, uint32 tile, int row, int num_rows,
                                         int dim) const {
      const long long token_stride_bytes = operand.token * kElementBytes;
      copy_rows<Tile, kNumThreads, kSpec.is_aligned>(tile, rows + row * token_stride_bytes, token_stride_bytes,
                                                     operand.dim * kElementBytes, num_rows - row, dim);
    }
  };

  // -------------------------------------------------------------------------------------------------------------------
  // Compute.

  template <int kRowTiles>
  static __device__ __forceinline__ void multiply_qk(uint32 q, int row, uint32 k, const Lane& lane,
                                                     Scores<kRowTiles>& scores) {
    const LaneReader<QTile> rows(q, row + (lane.lane & 15), lane.lane >> 4);
    const LaneReader<KTile> keys(k, (lane.lane & 7) + (lane.lane >> 4) * 8, lane.lane >> 3 & 1);
    if constexpr (kIsFloat32) {
      multiply_transposed_float32<Math, kQkSteps, kQkUnroll>(rows, keys, scores);
    } else {
      multiply_transposed<Math, kQkSteps, kQkUnroll>(rows, keys, scores);
    }
  }

  template <int kRowTiles>
  static __device__ __forceinline__ void multiply_pv(const Scores<kRowTiles>& p, uint32 v, const Lane& lane,
                                                     Output<kRowTiles>& out) {
    if constexpr (kIsFloat32) {
      multiply_float32<Math>(p, LaneReader<VTile>(v, lane.column, lane.row >> 2),
                             LaneReader<VTile>(v, lane.column + 1, lane.row >> 2), (lane.row & 3) * 4, out);
    } else {
      multiply<Math>(p, LaneReader<VTile>(v, lane.lane & 15, lane.lane >> 4), out);
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Scores.

  // What the scores of one head depend on, besides the parameters.
  struct Head {
    int q_len, kv_len;
    float slope;                // of ALiBi
    const int* kv_segment_ids;  // [kv_len]

    __device__ __forceinline__ variants::Band band(const Params& params) const {
      return variants::make_band(q_len, kv_len, params.window_left, params.window_right, params.is_bottom_right);
    }
  };

  // Calls f(score, key tile, which of the thread's two columns) for one row's scores.
  template <class F>
  static __device__ __forceinline__ void for_row(Accumulator (&scores)[kKeyTiles], int half, const F& f) {
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
#pragma unroll
      for (int e = 0; e < 2; ++e) f(scores[key_tile][2 * half + e], key_tile, e);
    }
  }

  // Raw products become scores: scale, soft cap, ALiBi.
  template <int kRowTiles>
  static __device__ __forceinline__ void transform(const Params& params, const Head& head, int first_row, int first_key,
                                                   const Lane& lane, Scores<kRowTiles>& scores) {
    const ScoreMath math;
    const variants::Index offset = head.band(params).offset;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const variants::Index row = first_row + row_tile * 16 + half * 8 + lane.row;
        const float distance = static_cast<float>(row + offset - first_key - lane.column);
        for_row(scores[row_tile], half, [&](float& score, int key_tile, int e) {
          if constexpr (kSpec.has_softcap) {
            score = variants::soft_capped(math, score, params.scale_over_cap, params.softcap);
          } else {
            score *= params.scale;
          }
          if constexpr (kSpec.has_alibi) {
            score = variants::alibi_biased(math, score, head.slope, distance - static_cast<float>(key_tile * 8 + e));
          }
        });
      }
    }
  }

  // Scores of keys that a row does not see become -inf.
  template <int kRowTiles>
  static __device__ __forceinline__ void mask(const Params& params, const Head& head, int first_row, int first_key,
                                              const Lane& lane, Scores<kRowTiles>& scores) {
    // Keys are counted from this lane's first column. A row further down sees as many keys further on; far limits are
    // moved nearer, but not into the step, so that they fit 32 bits.
    const variants::Index row = first_row + lane.row, origin = first_key + lane.column;
    const variants::Range keys = head.band(params).keys_of_any({row, row + 1});
    constexpr variants::Index kFar = 1 << 20;
    const int begin = static_cast<int>(min(max(keys.begin - origin, -kFar), kFar));
    const int end = static_cast<int>(min(max(keys.end - origin, -kFar), kFar));
    const int last = static_cast<int>(min(head.kv_len - origin, kFar));
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int shift = row_tile * 16 + half * 8;
        const int row_begin = begin + shift, row_end = min(end + shift, last);
        for_row(scores[row_tile], half, [&](float& score, int key_tile, int e) {
          const int key = key_tile * 8 + e;
          if (key < row_begin || key >= row_end) score = -kInfinity;
        });
      }
    }
  }

  template <int kRowTiles>
  static __device__ __forceinline__ void mask_segments(const Params& params, const Head& head,
                                                       const int (&q_ids)[kRowTiles][2], int first_key,
                                                       const Lane& lane, Scores<kRowTiles>& scores) {
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = min(first_key + key_tile * 8 + lane.column + e, head.kv_len - 1);
        const int id = head.kv_segment_ids[key * params.kv_segment_ids.token];
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (!variants::same_segment(q_ids[row_tile][half], id))
              scores[row_tile][key_tile][2 * half + e] = -kInfinity;
          }
        }
      }
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Softmax.

  // For float32 the fast exponential is too coarse.
  static __device__ __forceinline__ float exp2(float x) { return kIsFloat32 ? exp2_accurate(x) : ptx::exp2_approx(x); }

  // What a score is multiplied with to become an exponent of 2: raw products take the scale here too.
  static __device__ __forceinline__ float exponent_scale(const Params& params) {
    return kSpec.has_score_transform() ? kLog2E : params.scale_log2;
  }

  // Where no key has been seen yet: -inf - 0 is right, -inf - (-inf) is not.
  static __device__ __forceinline__ float finite_or_zero(float top) { return top == -kInfinity ? 0.0f : top; }

  // By how much x * scale is off when it is rounded.
  static __device__ __forceinline__ float rounding_of(float x, float scale) { return -fmaf(x, scale, -(x * scale)); }

  // Every row's reference becomes its largest score, and what was summed up relative to the one before shrinks.
  template <int kRowTiles>
  static __device__ __forceinline__ void move_references(float scale, const float (&largest)[kRowTiles][2],
                                                         Rows<kRowTiles>& rows, Output<kRowTiles>& out) {
    bool is_steep = false;
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
      const float top = fmaxf(rows.top[i / 2][i % 2], largest[i / 2][i % 2]);
      is_steep = is_steep || (fabsf(top * scale) > kSteep && top > -kInfinity);
    }
    is_steep = __any_sync(0xffffffffu, is_steep) != 0;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = rows.top[row_tile][half];
        const float top = fmaxf(before, largest[row_tile][half]);
        // References that are not steep were, or will be, rounded.
        float exponent = (before - top) * scale;
        if (!rows.is_steep) exponent += rounding_of(before, scale);
        if (!is_steep) exponent -= rounding_of(top, scale);
        const float shrink = before == -kInfinity                         ? 0.0f
                             : top == before && is_steep == rows.is_steep ? 1.0f
                                                                          : exp2(exponent);
        rows.top[row_tile][half] = top;
        rows.sum[row_tile][half] *= shrink;
#pragma unroll
        for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
          out[row_tile][dim_tile][2 * half] *= shrink;
          out[row_tile][dim_tile][2 * half + 1] *= shrink;
        }
      }
    }
    rows.is_steep = is_steep;
  }

  // Scores become probabilities relative to the rows' references, which move first if a score is far above one.
  template <int kRowTiles>
  static __device__ __forceinline__ void softmax(float scale, Rows<kRowTiles>& rows, Output<kRowTiles>& out,
                                                 Scores<kRowTiles>& scores) {
    float largest[kRowTiles][2];
    bool moves = false;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -kInfinity;
        for_row(scores[row_tile], half, [&](float& score, int, int) { top = fmaxf(top, score); });
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        largest[row_tile][half] = top;
        // Also true of the first score seen: inf - (-inf) is inf, and -inf - (-inf) is NaN and compares false.
        moves = moves || (top - rows.top[row_tile][half]) * scale > kSlack;
      }
    }
    // One branch for all that is rare: what lies on its two sides is scheduled apart.
    if (__any_sync(0xffffffffu, moves || rows.is_steep)) {
      move_references(scale, largest, rows, out);
      if (rows.is_steep) {
        // The product of scale and reference is rounded, which would matter; the difference of two large scores is
        // exact.
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float top = finite_or_zero(rows.top[row_tile][half]);
            for_row(scores[row_tile], half, [&](float& score, int, int) { score -= top; });
          }
        }
      }
    }
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float reference = rows.is_steep ? 0.0f : finite_or_zero(rows.top[row_tile][half]) * scale;
        float sum = 0.0f;
        for_row(scores[row_tile], half, [&](float& score, int, int) {
          score = exp2(fmaf(score, scale, -reference));
          sum += score;
        });
        rows.sum[row_tile][half] += sum;
      }
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Values that are not finite. A key that a row does not see must not reach it, and 0 * NaN is NaN: where an output is
  // not finite, the block starts again, and then takes such rows of V out of the products and adds them one by one, to
  // the rows that see them.

  // O += P V for the rows of V that were taken out.
  template <int kRowTiles>
  static __device__ __forceinline__ void add_rows(const Params& params, const Head& head, const Source& v,
                                                  const RowSet<kKvRows>& taken, const int (&q_ids)[kRowTiles][2],
                                                  int first_row, int first_key, const Lane& lane,
                                                  const Scores<kRowTiles>& p, Output<kRowTiles>& out) {
    const variants::Band band = head.band(params);
#pragma unroll 1
    for (int key = 0; key < kKvRows; ++key) {
      if (!taken.contains(key)) continue;
      // This lane's row from the lane of its four that has the key; 0 and `is_seen` false where the row does not see
      // it.
      float weight[kRowTiles][2];
      bool is_seen[kRowTiles][2];
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float own = 0.0f;
#pragma unroll
          for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
            const Accumulator& pair = p[row_tile][key_tile];
            if (key >> 3 == key_tile) own = (key & 1) != 0 ? pair[2 * half + 1] : pair[2 * half];
          }
          weight[row_tile][half] = __shfl_sync(0xffffffffu, own, (lane.lane & ~3) | (key >> 1 & 3));
          is_seen[row_tile][half] = band.keep(first_row + row_tile * 16 + half * 8 + lane.row, first_key + key);
          if constexpr (kSpec.has_segment_ids) {
            const int id = head.kv_segment_ids[(first_key + key) * params.kv_segment_ids.token];
            is_seen[row_tile][half] = is_seen[row_tile][half] && variants::same_segment(q_ids[row_tile][half], id);
          }
        }
      }
      const char* row = v.rows + (first_key + key) * params.v.token * kElementBytes;
      const long long dim_stride_bytes = kSpec.is_aligned ? kElementBytes : params.v.dim * kElementBytes;
#pragma unroll
      for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int dim = dim_tile * 8 + lane.column + e;
          const float value = dim < params.head_dim_v ? Math::load(row + dim * dim_stride_bytes) : 0.0f;
#pragma unroll
          for (int i = 0; i < kRowTiles * 2; ++i) {
            float& acc = out[i / 2][dim_tile][2 * (i % 2) + e];
            if (is_seen[i / 2][i % 2]) acc = fmaf(weight[i / 2][i % 2], value, acc);
          }
        }
        __syncwarp();  // as above: registers
      }
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Finish.

  template <int kRowTiles>
  static __device__ __forceinline__ void finish(const Params& params, const AttentionWork& work, const Lane& lane,
                                                int warp_row, uint32 shared_out, const Rows<kRowTiles>& rows,
                                                const Output<kRowTiles>& out) {
    const bool has_sink = params.sinks.data != nullptr && !work.is_outside;
    const float sink = has_sink ? *pointer_to<float>(params, params.sinks, work, work.head) : 0.0f;
    float* lse = params.lse.data == nullptr
                     ? nullptr
                     : const_cast<float*>(pointer_to<float>(params, params.lse, work, work.head)) +
                           work.q_token * params.lse.token;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = rows.sum[row_tile][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        // The reference in natural units, and how far the probabilities' own is from what was rounded to it.
        const float top = rows.top[row_tile][half], natural_scale = kSpec.has_score_transform() ? 1.0f : params.scale;
        float rest = rows.is_steep ? 0.0f : rounding_of(top, exponent_scale(params)) * kLn2;
        rest = fabsf(top) < kInfinity ? rest - rounding_of(top, natural_scale) : 0.0f;
        const auto end = variants::finish_row(top * natural_scale, rest, sum, has_sink, sink,
                                              [](float x) { return exp_accurate(x); });
        const int row = warp_row + row_tile * 16 + half * 8 + lane.row;
        if (lse != nullptr && lane.column == 0 && work.q_begin + row < work.q_len) {
          lse[(work.q_begin + row) * params.lse.token] = end.top + (end.rest + logf(end.total));
        }
        // A reciprocal would cost float32 its last bit.
        const auto divided = [&](float x) { return kIsFloat32 ? x / end.divisor : x * (1.0f / end.divisor); };
#pragma unroll
        for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
          const float low = divided(out[row_tile][dim_tile][2 * half]);
          const float high = divided(out[row_tile][dim_tile][2 * half + 1]);
          if constexpr (kIsFloat32) {
            const uint32 to = shared_out + OutTile::offset(row, dim_tile * 2 + lane.column / 4) + lane.column % 4 * 4;
            ptx::store_shared_8(to, __float_as_uint(low), __float_as_uint(high));
          } else {
            ptx::store_shared_4(shared_out + OutTile::offset(row, dim_tile) + lane.column * 2, Math::pack(low, high));
          }
        }
      }
    }
    __syncwarp();
    // Each warp copies its own rows, whole rows at a time.
    char* to = static_cast<char*>(params.out.data) +
               (offset_of(params, params.out, work, work.head) + work.q_token * params.out.token) * kElementBytes;
    constexpr int kChunks = OutTile::kChunks;
#pragma unroll 4
    for (int index = lane.lane; index < kRowTiles * 16 * kChunks; index += 32) {
      const int row = warp_row + index / kChunks, chunk = index % kChunks;
      const int column = chunk * OutTile::kElementsPerChunk;
      if (work.q_begin + row >= work.q_len || column >= params.head_dim_v) continue;
      write_chunk<kElementBytes, kSpec.is_aligned>(to + (work.q_begin + row) * params.out.token * kElementBytes,
                                                   params.out.dim * kElementBytes, column, params.head_dim_v,
                                                   ptx::load_shared_16(shared_out + OutTile::offset(row, chunk)));
    }
  }

  // -------------------------------------------------------------------------------------------------------------------

  using Steps = StepsOf<kKvRows>;

  // What a warp does not see it skips, what all its rows see it does not mask.
  struct alignas(16) WarpSteps {
    Steps seen, seen_in_full;
  };

  template <int kRowTiles>
  static __device__ __forceinline__ void reset(Rows<kRowTiles>& rows, Output<kRowTiles>& out) {
    rows.is_steep = false;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows.top[row_tile][half] = -kInfinity;
        rows.sum[row_tile][half] = 0.0f;
      }
    }
    clear(out);
  }

  // What each step reads again from shared memory, so that it takes no registers while the products run.
  struct Kept {
    AttentionWork work;
    Head head;
    Source q, k, v;
    Steps steps;
    WarpSteps warp_steps[kTile.num_warps];
    RowSet<kKvRows> taken;  // of V's tile
  };

  // Where K of a step lies in shared memory; V follows it.
  static __device__ __forceinline__ uint32 stage_of(int step) {
    return ptx::shared_address(shared_memory) + kQBytes + (kHasOneStage ? 0 : (step & 1) * kStageBytes);
  }

  static __device__ __forceinline__ void copy_k(const Params& params, const Source& k, int kv_len, int step) {
    k.template copy<KTile>(params.k, stage_of(step), step * kKvRows, kv_len, params.head_dim_qk);
  }
  static __device__ __forceinline__ void copy_v(const Params& params, const Source& v, int kv_len, int step) {
    v.template copy<VTile>(params.v, stage_of(step) + KTile::kBytes, step * kKvRows, kv_len, params.head_dim_v);
  }

  static __device__ __forceinline__ void copy_first_step(const Params& params, const Source& k, const Source& v,
                                                         int kv_len, int step) {
    copy_k(params, k, kv_len, step);
    if (!kHasOneStage) copy_v(params, v, kv_len, step);
    ptx::cp_async_commit();
  }

  // Load, compute and finish kRowTiles times 16 rows of each warp, from `first_row` of the warp on. Returns false, and
  // writes nothing, if an output is not finite and `kIsCareful` is not set.
  template <int kRowTiles, bool kIsCareful>
  static __device__ __forceinline__ bool attend(const Params& params, Kept& kept, int first_row) {
    const Lane lane;
    const int warp_row = lane.warp * kTile.rows_per_warp + first_row;  // counted from the block's first
    const uint32 shared_q = ptx::shared_address(shared_memory);
    int q_ids[kRowTiles][2];
    if constexpr (kSpec.has_segment_ids) {
      const int* ids = pointer_to<int>(params, params.q_segment_ids, kept.work, 0);
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        const int row = min(kept.work.q_begin + warp_row + i * 8 + lane.row, kept.work.q_len - 1);
        q_ids[i / 2][i % 2] = ids[row * params.q_segment_ids.token];
      }
    }
    Rows<kRowTiles> rows;
    Output<kRowTiles> out;
    reset(rows, out);
    if (kIsCareful && kept.steps.begin < kept.steps.end) {  // else `run` has done it
      kept.q.template copy<QTile>(params.q, shared_q, kept.work.q_begin, kept.work.q_len, params.head_dim_qk);
      copy_first_step(params, kept.k, kept.v, kept.head.kv_len, kept.steps.begin);
    }
#pragma unroll 1
    for (int step = kept.steps.begin; step < kept.steps.end; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const bool has_next = step + 1 < kept.steps.end;
      if (kHasOneStage) {
        copy_v(params, kept.v, kept.head.kv_len, step);
      } else if (has_next) {
        copy_k(params, kept.k, kept.head.kv_len, step + 1);
        copy_v(params, kept.v, kept.head.kv_len, step + 1);
      }
      ptx::cp_async_commit();

      const int row = kept.work.q_begin + warp_row, first_key = step * kKvRows;
      const uint32 stage = stage_of(step);
      const bool is_seen = kept.warp_steps[lane.warp].seen.contains(step);
      Scores<kRowTiles> scores;
      if (is_seen) {
        multiply_qk<kRowTiles>(shared_q, warp_row, stage, lane, scores);
        if constexpr (kSpec.has_score_transform()) {
          transform<kRowTiles>(params, kept.head, row, first_key, lane, scores);
        }
        if (!kept.warp_steps[lane.warp].seen_in_full.contains(step)) {
          mask<kRowTiles>(params, kept.head, row, first_key, lane, scores);
        }
        if constexpr (kSpec.has_segment_ids) {
          mask_segments<kRowTiles>(params, kept.head, q_ids, first_key, lane, scores);
        }
      }
      if constexpr (kHasOneStage) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (has_next) copy_k(params, kept.k, kept.head.kv_len, step + 1);
        ptx::cp_async_commit();
      }
      if constexpr (kIsCareful) take_out_rows<VTile, Math, kNumThreads>(stage + KTile::kBytes, kept.taken);
      if (is_seen) {
        softmax<kRowTiles>(exponent_scale(params), rows, out, scores);
        multiply_pv<kRowTiles>(scores, stage + KTile::kBytes, lane, out);
        if constexpr (kIsCareful) {
          add_rows<kRowTiles>(params, kept.head, kept.v, kept.taken, q_ids, row, first_key, lane, scores, out);
        }
      }
    }
    if (__syncthreads_or(!kIsCareful && !is_finite(out)) != 0) return false;
    finish<kRowTiles>(params, kept.work, lane, warp_row, shared_q, rows, out);
    return true;
  }

  // A function of its own, so that it takes no registers from the usual case; 16 rows of each warp at a time, because
  // it needs some itself.
  static __device__ __noinline__ void attend_carefully(const Params& params, Kept& kept) {
#pragma unroll 1
    for (int row = 0; row < kTile.rows_per_warp; row += 16) {
      __syncthreads();  // the output tile of the round before lies in Q's memory
      attend<1, true>(params, kept, row);
    }
  }

  static __device__ __forceinline__ void run(const Params& params) {
    __shared__ __align__(16) char kept_memory[sizeof(Kept)];
    Kept& kept = *reinterpret_cast<Kept*>(kept_memory);
    AttentionWork work;
    if constexpr (kSpec.is_varlen) {
      if (!varlen_work<kQRows>(params, blockIdx.x, work)) return;
    } else {
      work = dense_work<kQRows>(params, blockIdx.x);
    }
    const Lane lane;
    Head head = {work.q_len, work.kv_len, 0.0f, nullptr};
    if constexpr (kSpec.has_alibi) head.slope = *pointer_to<float>(params, params.alibi_slopes, work, work.head);

    const variants::Band band = head.band(params);
    const variants::Range all_keys = {0, work.kv_len};
    const int q_end = min(work.q_begin + kQRows, work.q_len);
    variants::Range keys = variants::intersect(band.keys_of_any({work.q_begin, q_end}), all_keys);
    if constexpr (kSpec.has_segment_ids) {
      head.kv_segment_ids = pointer_to<int>(params, params.kv_segment_ids, work, 0);
      keys =
          segment_range<kNumThreads>(pointer_to<int>(params, params.q_segment_ids, work, 0), params.q_segment_ids.token,
                                     {work.q_begin, q_end}, head.kv_segment_ids, params.kv_segment_ids.token, keys);
    }
    const Steps steps = Steps::touching(keys);

    const int warp_row = work.q_begin + lane.warp * kTile.rows_per_warp;
    const variants::Range warp_rows = {warp_row, min(warp_row + kTile.rows_per_warp, q_end)};
    if (lane.lane == 0) {
      WarpSteps own = {{0, 0}, {0, 0}};
      if (!warp_rows.empty()) {
        own.seen = Steps::touching(variants::intersect(band.keys_of_any(warp_rows), keys));
        own.seen_in_full = Steps::inside(variants::intersect(band.keys_of_all(warp_rows), all_keys));
      }
      kept.warp_steps[lane.warp] = own;
    }

    const Source q(params, params.q, work, work.head, work.q_token);
    const Source k(params, params.k, work, work.kv_head, work.k_token);
    const Source v(params, params.v, work, work.kv_head, work.k_token);
    if (steps.begin < steps.end) {
      q.template copy<QTile>(params.q, ptx::shared_address(shared_memory), work.q_begin, work.q_len,
                             params.head_dim_qk);
      copy_first_step(params, k, v, work.kv_len, steps.begin);
    }
    if (threadIdx.x == 0) {
      kept.work = work;
      kept.head = head;
      kept.q = q;
      kept.k = k;
      kept.v = v;
      kept.steps = steps;
    }
    __syncthreads();
    if (!attend<kWarpRowTiles, false>(params, kept, 0)) attend_carefully(params, kept);
  }
};

}  // namespace heed::cuda
