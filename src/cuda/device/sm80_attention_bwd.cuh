// Attention backward, the main pass, for every GPU since Ampere: mma.sync, cp.async, ldmatrix. What comes before it
// (statistics of rows) and after it (dQ in its own type) is in attention_bwd_passes.cuh.
//
// A block owns a tile of keys of one KV head, holds their dK and dV in registers and walks along the queries that see
// them, of all heads of the group: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ = dS K.
//
// Transposed scores. A warp's rows of S^T are keys: P^T and dS^T lie in its registers as dV and dK want their left
// operands, and only dS crosses warps, for dQ. Where that would leave a warp 16 keys (above head dim 64), warps share
// 32 keys instead: each has a share of the queries, then of the head dims, and P crosses too. That halves how often the
// same bytes are read from shared memory, which would be the limit otherwise.
//
// Delayed use. What needs other warps' scores is done in the next step: one barrier a step. Of the two warps of a
// scheduler one does that first, the other its own scores: one's softmax runs under the other's products.
//
// dQ. Blocks with other keys add to the same rows of dQ: float32 additions in L2, 16 bytes at a time (sm_90; 4 before),
// into a workspace whose rows are ordered as accumulators are. Deterministic, they take turns at each tile of queries:
// from the last keys that it sees to the first with a causal mask, so that a block's first tile is nobody else's turn,
// else from the first to the last. Blocks number themselves as they start: one only waits for others that run already.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/key_work.cuh"
#include "cuda/device/products.cuh"
#include "cuda/device/row_set.cuh"
#include "cuda/device/score_math.cuh"
#include "cuda/device/segment_range.cuh"
#include "cuda/device/shared_tile.cuh"
#include "cuda/device/turn.cuh"
#include "cuda/sm80_attention_bwd_spec.h"
#include "variants/alibi.h"
#include "variants/band.h"
#include "variants/segment_ids.h"

namespace heed::cuda {

template <Sm80AttentionBwdSpec kSpec>
struct Sm80AttentionBwd {
  using Params = Sm80AttentionBwdParams;
  static constexpr Sm80AttentionBwdTile kTile = sm80_attention_bwd_tile(kSpec, kDeviceArch);
  static constexpr Sm80AttentionBwdShared kShared = sm80_attention_bwd_shared(kSpec, kDeviceArch);
  static constexpr int kNumThreads = kTile.num_threads();
  static constexpr int kMinBlocksPerSm = kTile.min_blocks;
  static constexpr int kSharedBytes = kShared.bytes;

  static constexpr Element kElement = kSpec.element;
  static constexpr bool kIsFloat32 = kElement == Element::kFloat32;
  using Math = MathOf<kElement>;
  static constexpr int kElementBytes = bytes_of(kElement);
  static constexpr int kStepElements = 32 / kElementBytes;  // of the inner dimension of a product, per instruction step
  static constexpr int kKvRows = kTile.kv_rows();
  static constexpr int kQRows = kTile.q_rows;
  static constexpr bool kIsSplit = kTile.split > 1;
  static constexpr int kRowTiles = kTile.rows_per_warp / 16;  // of keys
  static constexpr int kChunkTiles = kTile.q_chunk / 8;       // of queries
  static constexpr int kNumChunks = kQRows / (kTile.split * kTile.q_chunk);
  // How many steps of K Q^T and of V dO^T the compiler may overlap: as many as there are registers for.
  static constexpr bool kIsPlain = kSpec.is_aligned && !kSpec.has_segment_ids && !kSpec.has_softcap && !kSpec.has_alibi;
  static constexpr bool kOverlapsMore = kIsPlain && (kDeviceArch == 90 || !kSpec.is_deterministic);
  static constexpr int kQkUnroll = kIsFloat32                                                       ? 1
                                   : kOverlapsMore && (kSpec.head_dim_qk > 64 || kDeviceArch == 90) ? 4
                                                                                                    : 2;
  static constexpr int kVUnroll = kIsFloat32 ? 1 : kOverlapsMore && kSpec.head_dim_v > 64 ? 4 : 2;
  // A warp's share of the head dims, in tiles of 8: pairs of them.
  static constexpr int kKDimTiles = round_up(kSpec.head_dim_qk, 16 * kTile.split) / 8 / kTile.split;
  static constexpr int kVDimTiles = round_up(kSpec.head_dim_v, 16 * kTile.split) / 8 / kTile.split;
  // dQ: the warps divide the step's queries, 32 each, or 16, then the head dims.
  static constexpr int kNumWarps = kNumThreads / 32;
  static constexpr int kDqRowTiles = kQRows >= 32 && !kIsFloat32 ? 2 : 1;
  static constexpr int kDqRows = 16 * kDqRowTiles;
  static constexpr int kDqParts = kNumWarps * kDqRows / kQRows > 0 ? kNumWarps* kDqRows / kQRows : 1;
  static constexpr int kDqRounds = kQRows / kDqRows * kDqParts / kNumWarps;
  static constexpr int kDqDimTiles = round_up(kSpec.head_dim_qk, 16 * kDqParts) / 8 / kDqParts;
  static_assert(kDqRounds * kNumWarps <= kTurnsPerTile);
  // Of the two warps that share a scheduler, one does first what the other does last: one's softmax then runs under the
  // other's products.
  static constexpr bool kAlternates = kNumWarps == 8 && kTile.is_delayed;

  using KTile = SharedTile<kElement, kKvRows, kSpec.head_dim_qk>;
  using VTile = SharedTile<kElement, kKvRows, kSpec.head_dim_v>;
  using QTile = SharedTile<kElement, kQRows, kSpec.head_dim_qk>;
  using OTile = SharedTile<kElement, kQRows, kSpec.head_dim_v>;
  using ScoreTile = SharedTile<kElement, kKvRows, kQRows>;

  using Scores = Accumulator[kRowTiles][kChunkTiles];  // S^T: keys by queries
  using KSums = Accumulator[kRowTiles][kKDimTiles];
  using VSums = Accumulator[kRowTiles][kVDimTiles];
  using Steps = StepsOf<kQRows>;

  struct Lane {
    int lane, warp;
    int row, column;  // in its half row tile; the first of its two in an 8-column tile
    int key_row;      // the warp's first key, counted from the block's
    int part;         // of two warps that share their keys
    __device__ __forceinline__ Lane() : Lane(ptx::thread_index()) {}
    __device__ __forceinline__ explicit Lane(int thread)
        : lane(thread & 31),
          warp(thread >> 5),
          row(lane >> 2),
          column((lane & 3) * 2),
          key_row(warp / kTile.split * kTile.rows_per_warp),
          part(warp % kTile.split) {}
  };

  // A step of the loop over the group's heads and their queries.
  struct Position {
    int head, step;
  };

  // What the steps read again from shared memory, so that it takes no registers while the products run.
  struct Kept {
    KeyWork work;
    variants::Band band;
    variants::Range keys;     // that take part, counted from the sequence's first
    variants::Range queries;  // that see any of them
    Steps steps;              // of queries
    Position positions[4];
    const int* q_ids;
    const int* kv_ids;
    float slope_sums[kNumWarps];
    RowSet<kKvRows> taken;  // of K's tile
  };

  // Where the loop is at a step: those of four neighbouring steps are kept. Thread 0 writes the next but one, which
  // nobody reads before the next barrier.
  static __device__ __forceinline__ Position position_of(const Kept& kept, int index) {
    return kept.positions[index % 4];
  }
  static __device__ __forceinline__ void note_position(Kept& kept, int index) {
    if (ptx::thread_index() != 0) return;
    const Position before = kept.positions[(index + 3) % 4];
    const bool ends_head = before.step + 1 >= kept.steps.end;
    kept.positions[index % 4] = {ends_head ? before.head + 1 : before.head,
                                 ends_head ? kept.steps.begin : before.step + 1};
  }

  // Load.

  static __device__ __forceinline__ const char* rows_of(const Params& params, const DeviceOperand& operand,
                                                        const AttentionWork& work, int head, int token) {
    return static_cast<const char*>(operand.data) +
           (offset_of(params, operand, work, head) + token * operand.token) * kElementBytes;
  }

  template <class Tile>
  static __device__ __forceinline__ void copy(const Params& params, const DeviceOperand& operand,
                                              const AttentionWork& work, int head, int token, uint32 tile, int num_rows,
                                              int dim) {
    copy_rows<Tile, kNumThreads, kSpec.is_aligned>(tile, rows_of(params, operand, work, head, token),
                                                   operand.token * kElementBytes, operand.dim * kElementBytes, num_rows,
                                                   dim);
  }

  // An lse that leaves no weight to any score.
  static constexpr float kFarAbove = 3e38f;

  // The part of the workspace of one query head.
  static __device__ __forceinline__ float* workspace_of(const Params& params, const AttentionWork& work, int head) {
    const long long sequence =
        kSpec.is_varlen ? work.problem : work.problem * static_cast<long long>(params.batch) + work.batch;
    return params.workspace + (sequence * params.num_q_heads + head) * params.layout.floats;
  }

  // Q, dO and the statistics of a step's rows.
  static __device__ __forceinline__ void copy_step(const Params& params, const Kept& kept, Position at, uint32 stage) {
    const int head = at.head, first_row = at.step * kQRows, token = kept.work.q_token + first_row;
    const int num_rows = static_cast<int>(kept.queries.end) - first_row;
    copy<QTile>(params, params.q, kept.work, head, token, stage, num_rows, params.head_dim_qk);
    copy<OTile>(params, params.dout, kept.work, head, token, stage + kShared.out_grad, num_rows, params.head_dim_v);
    const float* statistics = workspace_of(params, kept.work, head) + 2 * token;
    for (int row = ptx::thread_index(); row < kQRows; row += kNumThreads) {
      const uint32 to = stage + kShared.statistics + row * 8;
      if (row < num_rows) {
        ptx::cp_async_8(to, statistics + 2 * row);
      } else {  // weights of 0, whatever K and V hold
        ptx::store_shared_8(to, __float_as_uint(kFarAbove), 0);
      }
      if constexpr (kSpec.has_segment_ids) {
        const int id = row < num_rows ? kept.q_ids[(first_row + row) * params.q_segment_ids.token] : 0;
        ptx::store_shared_4(stage + kShared.ids + row * 4, static_cast<uint32>(id));
      }
    }
  }

  // Scores.

  // Calls f(score, row tile, half, query tile, which of the thread's two columns).
  template <class F>
  static __device__ __forceinline__ void for_all(Scores& scores, const F& f) {
#pragma unroll
    for (int tile = 0; tile < kChunkTiles; ++tile) {
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 0; e < 2; ++e) f(scores[row_tile][tile][2 * half + e], row_tile, half, tile, e);
        }
      }
    }
  }

  // e^x.
  static __device__ __forceinline__ float exp(float x) {
    return kIsFloat32 ? exp_accurate(x) : ptx::exp2_approx(x * kLog2E);
  }

  struct Statistics {
    float lse[2], delta[2];  // of the thread's two columns
  };
  static __device__ __forceinline__ Statistics load_statistics(uint32 statistics, int tile, const Lane& lane) {
    const uint4 bits = ptx::load_shared_16(statistics + (tile * 8 + lane.column) * 8);
    return {{__uint_as_float(bits.x), __uint_as_float(bits.z)}, {__uint_as_float(bits.y), __uint_as_float(bits.w)}};
  }

  // The distance of a score's key from its query's diagonal, but for what differs between scores of one thread.
  static __device__ __forceinline__ float distance_of(const Kept& kept, int first_key, int first_query,
                                                      const Lane& lane) {
    return static_cast<float>(first_query + lane.column + kept.band.offset - first_key - lane.row);
  }
  static __device__ __forceinline__ float distance_step(int row_tile, int half, int tile, int e) {
    return static_cast<float>(tile * 8 + e - row_tile * 16 - half * 8);
  }

  // Raw products become probabilities. `slopes` gets the derivative of the soft cap.
  static __device__ __forceinline__ void make_probabilities(const Params& params, const Kept& kept, float slope,
                                                            int first_key, int first_query, uint32 statistics,
                                                            const Lane& lane, Scores& scores, Scores& cap_slopes) {
    const float distance = kSpec.has_alibi ? distance_of(kept, first_key, first_query, lane) : 0.0f;
#pragma unroll
    for (int tile = 0; tile < kChunkTiles; ++tile) {
      const Statistics rows = load_statistics(statistics, tile, lane);
#pragma unroll
      for (int i = 0; i < kRowTiles * 4; ++i) {
        const int row_tile = i / 4, half = i / 2 % 2, e = i % 2;
        float& score = scores[row_tile][tile][2 * half + e];
        if constexpr (kSpec.has_softcap) {
          const float t = tanhf(score * params.scale_over_cap);
          cap_slopes[row_tile][tile][2 * half + e] = 1.0f - t * t;
          score = params.softcap * t;
        } else if constexpr (kSpec.has_alibi) {
          score *= params.scale;
        }
        if constexpr (kSpec.has_alibi) {
          score = variants::alibi_biased(ScoreMath(), score, slope, distance + distance_step(row_tile, half, tile, e));
        }
        if constexpr (kSpec.has_softcap || kSpec.has_alibi) {
          score = exp(score - rows.lse[e]);
        } else if constexpr (kIsFloat32) {
          score = exp(fmaf(score, params.scale, -rows.lse[e]));
        } else {
          score = ptx::exp2_approx(fmaf(score, params.scale_log2, -rows.lse[e]));
        }
      }
    }
  }

  // Those of the warp's keys that were taken out, a bit each.
  static __device__ __forceinline__ uint32 taken_keys(const Kept& kept, const Lane& lane) {
    const uint32 keys = kept.taken.words[lane.key_row >> 5] >> (lane.key_row & 31);
    return kTile.rows_per_warp == 32 ? keys : keys & 0xffffu;
  }

  // Probabilities of keys that a query does not see become 0.
  static __device__ __forceinline__ void mask(const Params& params, const Kept& kept, int first_key, int first_query,
                                              uint32 ids, const Lane& lane, Scores& p) {
    const variants::Index key = first_key + lane.row, origin = first_query + lane.column;
    const variants::Range queries = kept.band.queries_of(key);
    constexpr variants::Index kFar = 1 << 20;
    const int begin = static_cast<int>(min(max(queries.begin - origin, -kFar), kFar));
    const int end = static_cast<int>(min(max(queries.end - origin, -kFar), kFar));
    const int num_keys = static_cast<int>(kept.keys.end) - first_key - lane.row;
    for_all(p, [&](float& x, int row_tile, int half, int tile, int e) {
      const int shift = row_tile * 16 + half * 8, query = tile * 8 + e;
      if (query < begin + shift || query >= end + shift || shift >= num_keys) x = 0.0f;
    });
    if constexpr (kSpec.has_segment_ids) {
      int kv_ids[kRowTiles * 2];
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        const variants::Index row = min(key + i * 8, kept.keys.end - 1);
        kv_ids[i] = kept.kv_ids[row * params.kv_segment_ids.token];
      }
      for_all(p, [&](float& x, int row_tile, int half, int tile, int e) {
        const int id = static_cast<int>(ptx::load_shared_4(ids + (tile * 8 + lane.column + e) * 4));
        if (!variants::same_segment(id, kv_ids[row_tile * 2 + half])) x = 0.0f;
      });
    }
    const uint32 taken = taken_keys(kept, lane) >> lane.row;
    if (taken != 0) {
      for_all(p, [&](float& x, int row_tile, int half, int, int) {
        if ((taken >> (row_tile * 16 + half * 8) & 1) != 0 && x != 0.0f) x = kNaN;
      });
    }
  }

  // dP^T becomes dS^T, by the raw products' derivative; masked pairs give 0 whatever dP holds. Returns what the
  // thread's pairs add to the gradient of the ALiBi slope.
  static __device__ __forceinline__ float make_score_gradients(const Kept& kept, int first_key, int first_query,
                                                               uint32 statistics, const Lane& lane, const Scores& p,
                                                               const Scores& cap_slopes, Scores& dp) {
    float slope_sum = 0.0f;
    const float distance = kSpec.has_alibi ? distance_of(kept, first_key, first_query, lane) : 0.0f;
#pragma unroll
    for (int tile = 0; tile < kChunkTiles; ++tile) {
      const Statistics rows = load_statistics(statistics, tile, lane);
#pragma unroll
      for (int i = 0; i < kRowTiles * 4; ++i) {
        const int row_tile = i / 4, half = i / 2 % 2, e = i % 2, at = 2 * half + e;
        const float weight = p[row_tile][tile][at];
        float ds = weight == 0.0f ? 0.0f : weight * (dp[row_tile][tile][at] - rows.delta[e]);
        if constexpr (kSpec.has_alibi) {
          slope_sum = fmaf(-fabsf(distance + distance_step(row_tile, half, tile, e)), ds, slope_sum);
        }
        if constexpr (kSpec.has_softcap) ds *= cap_slopes[row_tile][tile][at];
        dp[row_tile][tile][at] = ds;
      }
    }
    return slope_sum;
  }

  // Products.

  // scores = rows of A times rows of B, both in shared memory: keys by queries.
  template <class ATile, class BTile, int kSteps, int kUnroll>
  static __device__ __forceinline__ void multiply_rows(uint32 a, int row, uint32 b, const Lane& lane, Scores& scores) {
    const LaneReader<ATile> rows(a, row + (lane.lane & 15), lane.lane >> 4);
    // Of 8 queries there is only the left half of what an instruction reads: both halves read that one.
    const int column = (lane.lane & 7) + (kChunkTiles > 1 ? (lane.lane >> 4) * 8 : 0);
    const LaneReader<BTile> columns(b, column, lane.lane >> 3 & 1);
    if constexpr (kIsFloat32) {
      multiply_transposed_float32<Math, kSteps, kUnroll>(rows, columns, scores);
    } else {
      multiply_transposed<Math, kSteps, kUnroll>(rows, columns, scores);
    }
  }

  // sums += scores times the rows of B.
  template <class BTile, int kDimTiles>
  static __device__ __forceinline__ void multiply_scores(const Scores& scores, uint32 b, const Lane& lane,
                                                         Accumulator (&sums)[kRowTiles][kDimTiles]) {
    if constexpr (kIsFloat32) {
      multiply_float32<Math>(scores, LaneReader<BTile>(b, lane.column, lane.row >> 2),
                             LaneReader<BTile>(b, lane.column + 1, lane.row >> 2), (lane.row & 3) * 4, sums);
    } else {
      multiply<Math>(scores, LaneReader<BTile>(b, lane.lane & 15, lane.lane >> 4), sums);
    }
  }

  // sums += rows of the score tile, or its columns, times the rows of B.
  template <class BTile, bool kIsTransposed, int kTiles, int kDimTiles>
  static __device__ __forceinline__ void multiply_tile(uint32 scores, int first_row, uint32 b, int first_pair,
                                                       const Lane& lane, Accumulator (&sums)[kTiles][kDimTiles]) {
    constexpr int kSteps = (kIsTransposed ? kKvRows : kQRows) / kStepElements;
    if constexpr (kIsFloat32) {
      multiply_tiles_float32<Math, ScoreTile, BTile, kIsTransposed, kSteps>(scores, first_row, b, first_pair, lane.lane,
                                                                            sums);
    } else {
      multiply_tiles<Math, ScoreTile, BTile, kIsTransposed, kSteps, 4>(scores, first_row, b, first_pair, lane.lane,
                                                                       sums);
    }
  }

  static __device__ __forceinline__ void store_pair(uint32 tile, int row, int column, float low, float high) {
    if constexpr (kIsFloat32) {
      ptx::store_shared_8(tile + ScoreTile::offset(row, column / 4) + column % 4 * 4, __float_as_uint(low),
                          __float_as_uint(high));
    } else {
      ptx::store_shared_4(tile + ScoreTile::offset(row, column / 8) + column % 8 * 2, Math::pack(low, high));
    }
  }
  static __device__ __forceinline__ void store_scores(uint32 tile, int first_query, const Lane& lane,
                                                      const Scores& scores) {
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
#pragma unroll
      for (int column_tile = 0; column_tile < kChunkTiles; ++column_tile) {
        const Accumulator& pair = scores[i / 2][column_tile];
        store_pair(tile, lane.key_row + i * 8 + lane.row, first_query + column_tile * 8 + lane.column, pair[i % 2 * 2],
                   pair[i % 2 * 2 + 1]);
      }
    }
  }

  // A step.

  // What a warp's keys and the step's queries give to dK and dV; dS^T, and P^T if warps share keys, go to shared
  // memory.
  static __device__ __forceinline__ void add_pairs(const Params& params, const Kept& kept, Position at, uint32 stage,
                                                   uint32 score_tiles, float& slope_sum, KSums& dk, VSums& dv) {
    const Lane lane;
    const uint32 memory = ptx::shared_address(tight_shared_memory);
    const float slope = kSpec.has_alibi ? *pointer_to<float>(params, params.alibi_slopes, kept.work, at.head) : 0.0f;
    const int first_key = kept.work.k_begin + lane.key_row;
    const variants::Range keys = variants::intersect({first_key, first_key + kTile.rows_per_warp}, kept.keys);
#pragma unroll 1
    for (int chunk = 0; chunk < kNumChunks; ++chunk) {
      const int column = (lane.part * kNumChunks + chunk) * kTile.q_chunk;  // of the tile
      const int first_query = at.step * kQRows + column;
      const variants::Range queries = {first_query, first_query + kTile.q_chunk};
      Scores p, dp;
      if (keys.empty() || variants::intersect(kept.band.queries_of_any(keys), queries).empty()) {
        clear(p);
        store_scores(score_tiles, column, lane, p);
        if (kIsSplit) store_scores(score_tiles + kShared.weights, column, lane, p);
        continue;
      }
      const uint32 statistics = stage + kShared.statistics + column * 8;
      const uint32 q = stage + column * QTile::kRowBytes,
                   out_grad = stage + kShared.out_grad + column * OTile::kRowBytes;
      multiply_rows<KTile, QTile, kSpec.head_dim_qk / kStepElements, kQkUnroll>(memory, lane.key_row, q, lane, p);
      Scores cap_slopes;  // with a soft cap only
      make_probabilities(params, kept, slope, first_key, first_query, statistics, lane, p, cap_slopes);
      const variants::Range all = kept.band.queries_of_all({first_key, first_key + kTile.rows_per_warp});
      if (kSpec.has_segment_ids || keys.end - keys.begin < kTile.rows_per_warp || queries.begin < all.begin ||
          queries.end > all.end || taken_keys(kept, lane) != 0) {
        mask(params, kept, first_key, first_query, stage + kShared.ids + column * 4, lane, p);
      }
      multiply_rows<VTile, OTile, kSpec.head_dim_v / kStepElements, kVUnroll>(memory + kShared.v, lane.key_row,
                                                                              out_grad, lane, dp);
      slope_sum += make_score_gradients(kept, first_key, first_query, statistics, lane, p, cap_slopes, dp);
      store_scores(score_tiles, column, lane, dp);
      if constexpr (kIsSplit) {
        store_scores(score_tiles + kShared.weights, column, lane, p);
      } else {
        multiply_scores<OTile>(p, out_grad, lane, dv);
        multiply_scores<QTile>(dp, q, lane, dk);
      }
    }
  }

  // Turns: a deterministic order of the additions to dQ. The same warp of every block adds to the same part of a tile
  // of queries, and each part has a counter of the tiles of keys that have added to it.

  static __device__ __forceinline__ bool is_last_first(const Params& params) {
    return kSpec.is_deterministic && params.window_right >= 0;
  }

  // A sequence's counters come after those of the sequences before it: as many as whole tiles of rows, and one more for
  // each sequence.
  static __device__ __forceinline__ void begin_turn(const Params& params, const Kept& kept, Position at, int item,
                                                    Turn& turn) {
    const int first = kSpec.is_varlen ? kept.work.q_token / kQRows + kept.work.batch : 0;
    const variants::Range queries = {at.step * kQRows, min((at.step + 1) * kQRows, kept.work.q_len)};
    const variants::Range keys =
        variants::intersect(kept.band.keys_of_any(queries), {0, static_cast<variants::Index>(kept.work.kv_len)});
    const int tile = kept.work.k_begin / kKvRows;
    const int num_before = is_last_first(params) ? static_cast<int>((keys.end - 1) / kKvRows) - tile
                                                 : tile - static_cast<int>(keys.begin / kKvRows);
    int* counters = reinterpret_cast<int*>(workspace_of(params, kept.work, at.head) + params.layout.turns) + 1;
    turn.begin(counters + (first + at.step) * kTurnsPerTile + item, num_before);
  }

  // What needs the scores of other warps.

  // What the warps that share keys do with the scores that all of them have made.
  static __device__ __forceinline__ void add_shared_pairs(uint32 stage, uint32 score_tiles, KSums& dk, VSums& dv) {
    const Lane lane;
    multiply_tile<OTile, false>(score_tiles + kShared.weights, lane.key_row, stage + kShared.out_grad,
                                lane.part * (kVDimTiles / 2), lane, dv);
    multiply_tile<QTile, false>(score_tiles, lane.key_row, stage, lane.part * (kKDimTiles / 2), lane, dk);
  }

  // dQ of a step's queries from the block's keys, added to what other blocks add.
  static __device__ __forceinline__ void add_dq(const Params& params, const Kept& kept, Position at, uint32 score_tiles,
                                                Turn& turn) {
    const Lane lane;
#pragma unroll 1
    for (int round = 0; round < kDqRounds; ++round) {
      const int item = round * kNumWarps + lane.warp;
      if constexpr (kSpec.is_deterministic) {
        if (round > 0) turn.end();
        begin_turn(params, kept, at, item, turn);
      }
      const int row = item / kDqParts * kDqRows, first_pair = item % kDqParts * (kDqDimTiles / 2);
      Accumulator dq[kDqRowTiles][kDqDimTiles];
      clear(dq);
      multiply_tile<KTile, true>(score_tiles, row, ptx::shared_address(tight_shared_memory), first_pair, lane, dq);
      const int query = at.step * kQRows + row + lane.row;
      float* to = workspace_of(params, kept.work, at.head) + params.layout.dq +
                  static_cast<long long>(kept.work.q_token + query) * params.layout.dq_row + first_pair * 16 +
                  lane.column * 2;
      if constexpr (kSpec.is_deterministic) turn.wait();
#pragma unroll
      for (int half = 0; half < 2 * kDqRowTiles; ++half) {
        if (query + half * 8 >= kept.queries.end) break;
#pragma unroll
        for (int pair = 0; pair < kDqDimTiles / 2; ++pair) {
          if ((first_pair + pair) * 16 >= params.layout.dq_row) break;
          const Accumulator &left = dq[half / 2][2 * pair], &right = dq[half / 2][2 * pair + 1];
          ptx::add_global_4(to + half * 8 * static_cast<long long>(params.layout.dq_row) + pair * 16,
                            left[half % 2 * 2], left[half % 2 * 2 + 1], right[half % 2 * 2], right[half % 2 * 2 + 1]);
        }
      }
    }
  }

  // Finish.

  // One gradient of the block's keys: accumulators -> shared memory -> the rows that exist.
  template <class Tile, int kDimTiles>
  static __device__ __forceinline__ void write_gradient(const Params& params, const KeyWork& work,
                                                        const DeviceOperand& operand, int dim, uint32 tile,
                                                        float factor, const Accumulator (&sums)[kRowTiles][kDimTiles]) {
    const Lane lane;
    constexpr int kAll = Tile::kChunks * Tile::kElementsPerChunk / 8;  // tiles of 8
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
#pragma unroll
      for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
        const int place = lane.part * kDimTiles + dim_tile;
        if (kDimTiles * kTile.split > kAll && place >= kAll) break;
        const int row = lane.key_row + i * 8 + lane.row;
        const float low = sums[i / 2][dim_tile][i % 2 * 2] * factor,
                    high = sums[i / 2][dim_tile][i % 2 * 2 + 1] * factor;
        if constexpr (kIsFloat32) {
          ptx::store_shared_8(tile + Tile::offset(row, place * 2 + lane.column / 4) + lane.column % 4 * 4,
                              __float_as_uint(low), __float_as_uint(high));
        } else {
          ptx::store_shared_4(tile + Tile::offset(row, place) + lane.column * 2, Math::pack(low, high));
        }
      }
    }
    __syncthreads();
    char* to = const_cast<char*>(rows_of(params, operand, work, work.kv_head, work.k_token + work.k_begin));
#pragma unroll 1
    for (int index = ptx::thread_index(); index < kKvRows * Tile::kChunks; index += kNumThreads) {
      const int row = index / Tile::kChunks, chunk = index % Tile::kChunks;
      const int column = chunk * Tile::kElementsPerChunk;
      if (work.k_begin + row >= work.k_rows || column >= dim) continue;
      write_chunk<kElementBytes, kSpec.is_aligned>(to + row * operand.token * kElementBytes,
                                                   operand.dim * kElementBytes, column, dim,
                                                   ptx::load_shared_16(tile + Tile::offset(row, chunk)));
    }
  }

  // What the block adds to the gradient of one head's ALiBi slope.
  static __device__ __forceinline__ void write_slope_sum(const Params& params, Kept& kept, int head, float sum) {
    const Lane lane;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane.lane == 0) kept.slope_sums[lane.warp] = sum;
    __syncthreads();
    if (ptx::thread_index() == 0) {
      float all = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kNumWarps; ++warp) all += kept.slope_sums[warp];
      workspace_of(params, kept.work, head)[params.layout.slopes + kept.work.tile] = all;
    }
    __syncthreads();
  }

  // Finds the block's work. Returns false if there is none.
  static __device__ __forceinline__ bool find_work(const Params& params, Kept& kept) {
    uint32 index = blockIdx.x;
    if constexpr (kSpec.is_deterministic) {
      __shared__ uint32 number;
      if (threadIdx.x == 0) {
        number = static_cast<uint32>(atomicAdd(reinterpret_cast<int*>(params.workspace + params.layout.turns), 1));
      }
      __syncthreads();
      index = number;
    }
    KeyWork work;
    if constexpr (kSpec.is_varlen) {
      if (!varlen_key_work<kKvRows>(params, index, is_last_first(params), work)) return false;
    } else {
      work = dense_key_work<kKvRows>(params, index, is_last_first(params));
    }
    work.head = work.kv_head * params.group;
    if (threadIdx.x != 0) return true;
    kept.work = work;
    kept.band =
        variants::make_band(work.q_len, work.kv_len, params.window_left, params.window_right, params.is_bottom_right);
    kept.keys = {work.k_begin, min(work.k_begin + kKvRows, work.kv_len)};
    kept.queries = {0, 0};
    if (!work.is_outside && !kept.keys.empty()) {
      kept.queries =
          variants::intersect(kept.band.queries_of_any(kept.keys), {0, static_cast<variants::Index>(work.q_len)});
    }
    if constexpr (kSpec.has_segment_ids) {
      kept.q_ids = pointer_to<int>(params, params.q_segment_ids, work, 0);
      kept.kv_ids = pointer_to<int>(params, params.kv_segment_ids, work, 0);
    }
    return true;
  }

  static __device__ __forceinline__ uint32 stage_of(int index) {
    return ptx::shared_address(tight_shared_memory) + kShared.stages + index % kTile.num_stages * kShared.stage_bytes;
  }
  static __device__ __forceinline__ uint32 scores_of(int index) {
    return ptx::shared_address(tight_shared_memory) + kShared.scores +
           (kTile.is_delayed ? index % 2 * kShared.score_bytes : 0);
  }

  static __device__ __forceinline__ void run(const Params& params) {
    __shared__ __align__(16) char kept_memory[sizeof(Kept)];
    Kept& kept = *reinterpret_cast<Kept*>(kept_memory);
    if (!find_work(params, kept)) return;
    __syncthreads();
    variants::Range seen = kept.queries;
    if constexpr (kSpec.has_segment_ids && !kSpec.is_deterministic) {
      if (!seen.empty()) {
        seen = segment_range<kNumThreads>(kept.kv_ids, params.kv_segment_ids.token, kept.keys, kept.q_ids,
                                          params.q_segment_ids.token, seen);
      }
    }
    if (threadIdx.x == 0) {
      kept.steps = Steps::touching(seen);
      kept.positions[0] = {kept.work.head, kept.steps.begin};
      note_position(kept, 1);
    }
    __syncthreads();
    const uint32 memory = ptx::shared_address(tight_shared_memory);
    const int num_keys = static_cast<int>(kept.keys.end - kept.keys.begin);
    copy<KTile>(params, params.k, kept.work, kept.work.kv_head, kept.work.k_token + kept.work.k_begin, memory, num_keys,
                params.head_dim_qk);
    copy<VTile>(params, params.v, kept.work, kept.work.kv_head, kept.work.k_token + kept.work.k_begin,
                memory + kShared.v, num_keys, params.head_dim_v);
    KSums dk;
    VSums dv;
    clear(dk);
    clear(dv);
    const int num_steps = (kept.steps.end - kept.steps.begin) * params.group;
    if (num_steps > 0) copy_step(params, kept, position_of(kept, 0), stage_of(0));
    ptx::cp_async_commit();
    Turn turn;
    float slope_sum = 0.0f;
    const bool is_other = kAlternates && (ptx::thread_index() >> 7) != 0;
    // What is done with the scores of a step: dK and dV if warps share keys, and dQ. Where all warps do that at once,
    // half of them begin with dQ: its additions to L2 run under the others' products.
    const auto use_scores = [&](int index) {
      constexpr bool kSwaps = kIsSplit && !kTile.is_delayed && kNumWarps == 8;
      const bool is_dq_first = kSwaps && (ptx::thread_index() >> 7) != 0;
#pragma unroll 1
      for (int round = 0; round < (kSwaps ? 2 : 1); ++round) {
        const bool is_dq = (round == 0) == is_dq_first;
        if (kIsSplit && (!kSwaps || !is_dq)) add_shared_pairs(stage_of(index), scores_of(index), dk, dv);
        if (!kSwaps || is_dq) add_dq(params, kept, position_of(kept, index), scores_of(index), turn);
      }
    };
#pragma unroll 1
    for (int index = 0; index < num_steps; ++index) {
      ptx::cp_async_wait<0>();
      // A pair that is masked has weight 0, and 0 * NaN is NaN: rows that are not finite are kept out of the products,
      // and what is visible of them has the weight NaN. For K they are found when its tile is there; for Q and dO the
      // statistics tell.
      const uint32 stage = stage_of(index), statistics = stage + kShared.statistics;
      if (__syncthreads_or(has_special_row<kQRows, kNumThreads>(statistics)) != 0) {
        take_out_special_rows<QTile, OTile, kNumThreads>(stage, stage + kShared.out_grad, statistics);
      }
      if (index == 0) take_out_rows<KTile, Math, kNumThreads>(memory, kept.taken);
      note_position(kept, index + 2);
      if (kTile.num_stages > 1) {
        if (index + 1 < num_steps) copy_step(params, kept, position_of(kept, index + 1), stage_of(index + 1));
        ptx::cp_async_commit();
      }
      constexpr int kRounds = kAlternates ? 2 : 1;
#pragma unroll 1
      for (int round = 0; round < kRounds; ++round) {
        if (kTile.is_delayed && index > 0 && (kRounds == 1 || (round == 0) != is_other)) use_scores(index - 1);
        if (kRounds == 1 || (round == 0) == is_other) {
          add_pairs(params, kept, position_of(kept, index), stage_of(index), scores_of(index), slope_sum, dk, dv);
          if constexpr (kSpec.is_deterministic) turn.end();
        }
      }
      if constexpr (!kTile.is_delayed) {
        __syncthreads();
        if constexpr (kTile.num_stages > 1) {
          use_scores(index);
        } else {
          if constexpr (kIsSplit) {
            add_shared_pairs(stage_of(index), scores_of(index), dk, dv);
            __syncthreads();
          }
          if (index + 1 < num_steps) copy_step(params, kept, position_of(kept, index + 1), stage_of(0));
          ptx::cp_async_commit();
          add_dq(params, kept, position_of(kept, index), scores_of(index), turn);
        }
      }
      if (kSpec.has_alibi && position_of(kept, index).step + 1 == kept.steps.end) {
        write_slope_sum(params, kept, position_of(kept, index).head, slope_sum);
        slope_sum = 0.0f;
      }
    }
    if (kTile.is_delayed && num_steps > 0) {
      __syncthreads();
      if constexpr (kSpec.is_deterministic) turn.end();
      use_scores(num_steps - 1);
    }
    if constexpr (kSpec.is_deterministic) turn.end();
    ptx::cp_async_wait<0>();
    __syncthreads();
    write_gradient<KTile>(params, kept.work, params.dk, params.head_dim_qk, memory, params.scale, dk);
    write_gradient<VTile>(params, kept.work, params.dv, params.head_dim_v, memory + kShared.v, 1.0f, dv);
  }
};

}  // namespace heed::cuda
