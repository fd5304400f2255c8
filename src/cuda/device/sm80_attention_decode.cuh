// Attention of one query token over a KV cache, for every GPU since Ampere: mma.sync, cp.async, ldmatrix; from Hopper
// on, clusters of blocks that merge their parts inside the one launch. Serves every feature and every head dim.
//
// Where the time and the bytes go
// -------------------------------
// K and V are read once, and nothing else is large: the kernel is as fast as bytes can be kept on their way. All query
// heads of a KV head (its group) are rows of the same products, so that they share the read. The keys of a KV head are
// divided among as many blocks as it takes to fill the GPU, and among the warps of each.
//
// Loads. A warp owns a ring of tiles of 16 keys, K and V in turn, and waits for nobody but its own copies: it starts
// them before anything else, refills a tile as soon as it has read it, and meets the other warps once at the end. What
// is on its way is all of the ring but one tile. Warps take tiles round robin over the whole GPU, which reads the cache
// from its beginning to its end: heads that lie next to each other in memory are read at about the same time.
//
// Products. The query heads are the 16 rows of Q K^T (the upper half unused by groups up to 8). Its accumulators are,
// as they lie, the operand P^T of O^T = V^T P^T, which has the query heads as its 8 columns: half the registers and
// products of O = P V. Tensor cores are busy for a sixth of the time that memory takes.
//
// Softmax. A warp keeps its own reference, the largest score so far; scores are in natural units, as their order of
// operations is the definition's.
//
// Merging. Warps leave their parts in their rings; a block's threads merge them, four columns each, and send each
// result to the block of the cluster that owns these columns: stores to its shared memory, then one barrier of the
// cluster. Every block writes its share of the output. Nothing is counted or awaited in global memory, so that nothing
// there needs a defined value and no block waits for one that may not run. Where a cluster is not enough, or where
// there are none, pieces go to the workspace, and a second kernel merges them (attention_decode_merge.cuh).
#pragma once

#include "cuda/device/decode_parts.cuh"
#include "cuda/device/decode_products.cuh"
#include "cuda/device/element.cuh"
#include "cuda/device/products.cuh"
#include "cuda/device/rotation.cuh"
#include "cuda/device/rows.cuh"
#include "cuda/device/score_math.cuh"
#include "cuda/device/shared_tile.cuh"
#include "cuda/sm80_attention_decode_spec.h"
#include "variants/alibi.h"
#include "variants/softcap.h"

namespace heed::cuda {

template <bool kHasRope>
struct DecodeParamsOf {
  using Type = Sm80AttentionDecodeParams;
};
template <>
struct DecodeParamsOf<true> {
  using Type = Sm80AttentionDecodeRopeParams;
};

template <Sm80AttentionDecodeSpec kSpec>
struct Sm80AttentionDecode {
  using Params = typename DecodeParamsOf<kSpec.has_rope>::Type;
  static constexpr Sm80AttentionDecodeTile kTile = sm80_attention_decode_tile(kSpec, kDeviceArch);
  static constexpr Sm80AttentionDecodeShared kShared = sm80_attention_decode_shared(kSpec, kDeviceArch);
  static constexpr int kNumThreads = kTile.num_threads();
  static constexpr int kMinBlocksPerSm = 2;
  static constexpr int kSharedBytes = kShared.bytes;

  static constexpr Element kElement = kSpec.element;
  static constexpr bool kIsFloat32 = kElement == Element::kFloat32;
  static constexpr bool kHasClusters = kDeviceArch >= 90;
  static constexpr int kElementBytes = bytes_of(kElement);
  using Math = MathOf<kElement>;
  static constexpr int kWarps = kTile.num_warps;
  static constexpr int kKeys = kTile.keys;        // of a tile
  static constexpr int kKeyTiles = kKeys / 8;     // operands of 8 keys
  static constexpr int kSlots = kTile.num_slots;  // tiles of a ring
  static constexpr int kRows = kSpec.query_rows;
  static constexpr int kHalves = kRows / 8;
  static constexpr int kQkSteps = kSpec.head_dim_qk * kElementBytes / 32;
  static constexpr int kDimTiles = kSpec.head_dim_v / 16;
  static constexpr bool kKeepsQuery = !kIsFloat32 && kSpec.head_dim_qk <= 128;  // in registers
  static constexpr int kSlotBytes = sm80_attention_decode_slot_bytes(kSpec, kKeys);
  static constexpr int kPartRow = decode_part_row(kSpec.head_dim_v);  // floats
  static constexpr int kRowChunks = kSpec.head_dim_v / 4;             // of four columns each
  static_assert(kSharedBytes <= most_shared_bytes(kDeviceArch));
  static_assert(kRows == 8 || kRows == 16);
  static_assert(kKeys % 16 == 0 && kSlots >= 2);
  static_assert(kSpec.head_dim_qk % 16 == 0 && kSpec.head_dim_v % 16 == 0);

  using QTile = SharedTile<kElement, kRows, kSpec.head_dim_qk>;
  using KTile = SharedTile<kElement, kKeys, kSpec.head_dim_qk>;
  using VTile = SharedTile<kElement, kKeys, kSpec.head_dim_v>;

  using Scores = Accumulator[1][kKeyTiles];        // rows are query heads
  using Output = Accumulator[kHalves][kDimTiles];  // rows are columns of V, 16 each; columns are query heads

  // A thread's rows of the scores: lane / 4, and 8 further on.
  struct Rows {
    float top[kHalves], sum[kHalves];  // the sum is over this thread's keys only, until the end
    float slope[kHalves];
  };

  struct Lane {
    int lane, warp;
    int row, column;  // lane / 4, and twice lane % 4: of accumulators
    __device__ __forceinline__ Lane() : Lane(ptx::thread_index()) {}
    __device__ __forceinline__ explicit Lane(int thread)
        : lane(thread & 31), warp(thread >> 5), row(lane >> 2), column((lane & 3) * 2) {}
  };

  // What a block works on.
  struct Work {
    uint32 problem;                     // index over the leading axes
    int kv_head, first_head, num_rows;  // query heads [first_head, first_head + num_rows)
    int piece;
    uint32 rank;  // in the cluster

    __device__ __forceinline__ explicit Work(const Params& params) {
      uint32 rest = blockIdx.x;
      rank = rest & ((1u << params.cluster_log2) - 1);
      rest >>= params.cluster_log2;
      const auto take = [&](const Divisor& count) {
        const uint32 quotient = divide(rest, count), remainder = rest - quotient * count.divisor;
        rest = quotient;
        return static_cast<int>(remainder);
      };
      kv_head = take(params.num_kv_heads);
      piece = take(params.num_pieces);
      const int first_row = take(params.row_tiles) * kRows;
      first_head = kv_head * params.group + first_row;
      num_rows = min(params.group - first_row, kRows);
      problem = rest;
    }
  };

  // The tiles of keys that a warp takes: first, first + stride, ..., below end.
  struct Tiles {
    int first, stride, end;

    __device__ __forceinline__ Tiles(const Params& params, const Work& work, int warp) {
      const int share = (work.piece << params.cluster_log2) + static_cast<int>(work.rank);
      first = share * kWarps + warp;
      stride = static_cast<int>(params.num_pieces.divisor << params.cluster_log2) * kWarps;
      end = (params.num_keys + kKeys - 1) / kKeys;
    }
  };

  // -------------------------------------------------------------------------------------------------------------------
  // Load.

  // Chunk number `index` of a tile, by rows. Rows past `num_rows` and columns past `dim` become zero.
  template <class Tile>
  static __device__ __forceinline__ void copy_chunk(uint32 tile, uint32 index, const char* rows, long long row_bytes,
                                                    long long dim_bytes, int num_rows, int dim,
                                                    ptx::CachePolicy policy) {
    const int row = static_cast<int>(index / Tile::kChunks), chunk = static_cast<int>(index % Tile::kChunks);
    const int columns = row < num_rows ? dim - chunk * Tile::kElementsPerChunk : 0;
    const uint32 to = tile + Tile::offset(row, chunk);
    rows += row * row_bytes;
    if constexpr (kSpec.is_aligned) {
      ptx::cp_async_16_once(to, rows + chunk * 16, columns > 0 ? 16 : 0, policy);
    } else {
      rows += chunk * Tile::kElementsPerChunk * dim_bytes;
      ptx::store_shared_16(to, gather_chunk<kElementBytes>(rows, dim_bytes, columns));
    }
  }

  // How a warp copies a tile: each lane always the same chunk, of a row in each pass, if rows divide that way.
  template <class Tile>
  struct WarpCopy {
    static constexpr bool kIsRegular = 32 % Tile::kChunks == 0;
    static constexpr int kRowsPerPass = kIsRegular ? 32 / Tile::kChunks : 1;
    static constexpr int kPasses = Tile::kRows * Tile::kChunks / 32;
    static_assert(Tile::kRows * Tile::kChunks % 32 == 0);
  };

  // The visible keys of one head of K or of V.
  struct Source {
    const char* rows;
    long long row_bytes;
    int dim;

    __device__ __forceinline__ Source(const DecodeOperand& operand, long long lead, const Work& work, int head_dim)
        : rows(operand.data + lead + work.kv_head * operand.head_bytes),
          row_bytes(operand.token_bytes),
          dim(head_dim) {}

    // By a warp. Keys past the end and columns past the head dim become zero.
    template <class Tile>
    __device__ __forceinline__ void copy(const Params& params, const DecodeOperand& operand, uint32 to, int tile,
                                         uint32 lane, ptx::CachePolicy policy) const {
      using Shape = WarpCopy<Tile>;
      const int left = params.num_keys - tile * kKeys;
      const char* from = rows + static_cast<long long>(tile) * (kKeys * row_bytes);
      if constexpr (kSpec.is_aligned && Shape::kIsRegular) {
        const int row = static_cast<int>(lane / Tile::kChunks), chunk = static_cast<int>(lane % Tile::kChunks);
        const int rows_left = chunk * Tile::kElementsPerChunk < dim ? left - row : 0;
        const uint32 first = to + Tile::offset(row, chunk);
        from += row * row_bytes + chunk * 16;
#pragma unroll
        for (int pass = 0; pass < Shape::kPasses; ++pass) {
          // Rows further on by less than the 8 of the swizzle only flip bits of it.
          constexpr int kRowsPerPass = Shape::kRowsPerPass;
          const uint32 at = (first ^ (pass * kRowsPerPass % 8 << 4)) + pass * kRowsPerPass * Tile::kRowBytes;
          ptx::cp_async_16_once(at, from, rows_left > pass * kRowsPerPass ? 16 : 0, policy);
          from += kRowsPerPass * row_bytes;
        }
      } else {
#pragma unroll(kSpec.is_aligned ? 4 : 1)
        for (int pass = 0; pass < Shape::kPasses; ++pass) {
          copy_chunk<Tile>(to, lane + pass * 32, from, row_bytes, operand.dim_bytes, left, dim, policy);
        }
      }
    }
  };

  // A warp's ring. Slots are filled with K and V of its tiles in turn, and freed in that order.
  struct Ring {
    const Params& params;
    Source k, v;
    Tiles tiles;
    uint32 lane, slots;
    int current;  // slot
    ptx::CachePolicy policy;

    __device__ __forceinline__ Ring(const Params& all, const Source& k_source, const Source& v_source,
                                    const Tiles& warp_tiles, const Lane& of)
        : params(all),
          k(k_source),
          v(v_source),
          tiles(warp_tiles),
          lane(static_cast<uint32>(of.lane)),
          slots(ptx::shared_address(shared_memory) + kShared.rings + of.warp * kShared.ring_bytes),
          current(0),
          policy(ptx::evict_first_policy()) {}

    __device__ __forceinline__ uint32 slot() const { return slots + current * kSlotBytes; }

    // Starts to fill the current slot with K or V of a tile, if there is that tile.
    __device__ __forceinline__ void fill(bool is_v, int tile) const {
      if (tile < tiles.end) {
        if constexpr (kSpec.head_dim_qk == kSpec.head_dim_v) {  // one code for both
          Source source = is_v ? v : k;
          source.template copy<KTile>(params, is_v ? params.v : params.k, slot(), tile, lane, policy);
        } else if (is_v) {
          v.template copy<VTile>(params, params.v, slot(), tile, lane, policy);
        } else {
          k.template copy<KTile>(params, params.k, slot(), tile, lane, policy);
        }
      }
    }
    // Goes on to the next slot. Every slot is a group of copies, if an empty one: their number tells how far they are.
    __device__ __forceinline__ void advance() {
      ptx::cp_async_commit();
      current = current + 1 == kSlots ? 0 : current + 1;
    }

    // `start_more` starts what arrives together with the first tile.
    template <class F>
    __device__ __forceinline__ void fill_all(const F& start_more) {
      int tile = tiles.first;
#pragma unroll 1
      for (int item = 0; item < kSlots; ++item) {
        fill(item % 2 == 1, tile);
        if (item == 0) start_more();
        if (item % 2 == 1) tile += tiles.stride;
        advance();
      }
    }

    // Until the current slot holds its item, for all lanes.
    __device__ __forceinline__ void wait() const {
      ptx::cp_async_wait<kSlots - 1>();
      __syncwarp();
    }

    // The current slot has been read by all lanes: it gets item kItem, counted from K of this tile.
    template <int kItem>
    __device__ __forceinline__ void refill(int tile) {
      __syncwarp();
      fill(kItem % 2 == 1, tile + kItem / 2 * tiles.stride);
      advance();
    }
  };

  // -------------------------------------------------------------------------------------------------------------------
  // Query and rotary embedding.

  static __device__ __forceinline__ float load_element(uint32 from) {
    return Math::load(static_cast<const char*>(shared_memory) + (from - ptx::shared_address(shared_memory)));
  }
  static __device__ __forceinline__ void store_element(uint32 to, float value) {
    char* const at = static_cast<char*>(shared_memory) + (to - ptx::shared_address(shared_memory));
    if constexpr (kIsFloat32) {
      *reinterpret_cast<float*>(at) = value;
    } else {
      *reinterpret_cast<unsigned short*>(at) = static_cast<unsigned short>(Math::pack(value, 0.0f));
    }
  }

  // Rotates rows [0, num_rows) of a tile, row r by the angles of position first + r * step: the pairs that start at
  // `pair`, pair + stride, ...
  template <class Tile>
  static __device__ __forceinline__ void rotate(uint32 tile, int num_rows, long long first, int step, int head_dim,
                                                int pair, int stride) {
    const auto* const turns = reinterpret_cast<const unsigned long long*>(shared_memory + kShared.turns);
    const auto at = [&](int row, int column) {
      return tile + Tile::offset(row, column / Tile::kElementsPerChunk) +
             column % Tile::kElementsPerChunk * kElementBytes;
    };
    const int num_pairs = head_dim / 2;
    for (; pair < num_pairs; pair += stride) {
      const unsigned long long pair_turns = turns[pair];
#pragma unroll 2
      for (int row = 0; row < num_rows; ++row) {
        float sine, cosine;
        sine_and_cosine(pair_turns * static_cast<unsigned long long>(first + row * step), sine, cosine);
        const uint32 left_at = at(row, pair), right_at = at(row, pair + num_pairs);
        const float left = load_element(left_at), right = load_element(right_at);
        store_element(left_at, left * cosine - right * sine);
        store_element(right_at, left * sine + right * cosine);
      }
    }
  }

  // Starts the copy of the query's rows into shared memory; rows past the group's become zero.
  static __device__ __forceinline__ void copy_query(const Params& params, const Work& work, long long lead,
                                                    ptx::CachePolicy policy) {
    const char* const rows = params.q.data + lead + work.first_head * params.q.head_bytes;
#pragma unroll 1
    for (int index = ptx::thread_index(); index < kRows * QTile::kChunks; index += kNumThreads) {
      copy_chunk<QTile>(ptx::shared_address(shared_memory), static_cast<uint32>(index), rows, params.q.head_bytes,
                        params.q.dim_bytes, work.num_rows, params.head_dim_qk, policy);
    }
  }

  // The query is at the last key's position.
  static __device__ __forceinline__ void rotate_query(const Params& params, const Work& work) {
    auto* const turns = reinterpret_cast<unsigned long long*>(shared_memory + kShared.turns);
    const int thread = ptx::thread_index();
    for (int pair = thread; pair < params.head_dim_qk / 2; pair += kNumThreads) turns[pair] = params.turns[pair];
    __syncthreads();
    rotate<QTile>(ptx::shared_address(shared_memory), work.num_rows, params.first_key + params.num_keys - 1, 0,
                  params.head_dim_qk, thread, kNumThreads);
  }

  // The query as operand A: rows past the 8 of a small group repeat them.
  struct Query {
    typename Math::A steps[kKeepsQuery ? kQkSteps : 1];

    static __device__ __forceinline__ LaneReader<QTile> reader(const Lane& lane) {
      return {ptx::shared_address(shared_memory), lane.lane & (kRows - 1), lane.lane >> 4};
    }
    __device__ __forceinline__ explicit Query(const Lane& lane) {
      if constexpr (kKeepsQuery) {
        const LaneReader<QTile> rows = reader(lane);
#pragma unroll
        for (int step = 0; step < kQkSteps; ++step) {
          uint32 bits[4];
          ptx::ldmatrix_x4(bits, rows.of_step(step));
          steps[step] = Math::make_a(bits);
        }
      }
    }
  };

  // -------------------------------------------------------------------------------------------------------------------
  // Compute.

  static __device__ __forceinline__ void multiply_qk(const Query& query, uint32 k, const Lane& lane, Scores& scores) {
    const LaneReader<KTile> keys(k, (lane.lane & 7) + (lane.lane >> 4) * 8, lane.lane >> 3 & 1);
    if constexpr (kIsFloat32) {
      multiply_transposed_float32<Math, kQkSteps, 2>(Query::reader(lane), keys, scores);
    } else if constexpr (kKeepsQuery) {
      // Two sums, so that half as many products wait for one another.
      Scores sums[2];
      clear(sums[0]);
      clear(sums[1]);
#pragma unroll
      for (int step = 0; step < kQkSteps; ++step) {
#pragma unroll
        for (int key_tile = 0; key_tile < kKeyTiles; key_tile += 2) {
          uint32 bits[4];
          ptx::ldmatrix_x4(bits, keys.of_step(step) + key_tile * 8 * KTile::kRowBytes);
          Math::mma(sums[step % 2][0][key_tile], query.steps[step], Math::make_b(bits[0], bits[1]));
          Math::mma(sums[step % 2][0][key_tile + 1], query.steps[step], Math::make_b(bits[2], bits[3]));
        }
      }
#pragma unroll
      for (int i = 0; i < kKeyTiles * 4; ++i)
        scores[0][i / 4][i % 4] = sums[0][0][i / 4][i % 4] + sums[1][0][i / 4][i % 4];
    } else {
      multiply_transposed<Math, kQkSteps, 4>(Query::reader(lane), keys, scores);
    }
  }

  static __device__ __forceinline__ void multiply_pv(const Scores& weights, uint32 v, const Lane& lane, Output& out) {
    if constexpr (kIsFloat32) {
      multiply_values_float32<Math, VTile>(weights[0], v, lane.lane, out);
    } else {
      multiply_values<Math, VTile>(weights[0], v, lane.lane, out);
    }
  }

  // Calls f(score, row half, key of the tile) for each score of a thread.
  template <class F>
  static __device__ __forceinline__ void for_scores(const Lane& lane, Scores& scores, const F& f) {
#pragma unroll
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) f(scores[0][key_tile][i], i / 2, key_tile * 8 + lane.column + i % 2);
    }
  }

  // Raw products become scores: scale, soft cap, ALiBi, and -inf past the last key. `left`: keys from the tile's first.
  static __device__ __forceinline__ void make_scores(const Params& params, const Rows& rows, int left, const Lane& lane,
                                                     Scores& scores) {
    const ScoreMath math;
    if (params.softcap > 0.0f) {
      for_scores(lane, scores, [&](float& score, int /*half*/, int /*key*/) {
        score = variants::soft_capped(math, score, params.scale_over_cap, params.softcap);
      });
    } else {
      for_scores(lane, scores, [&](float& score, int /*half*/, int /*key*/) { score *= params.scale; });
    }
    if (params.alibi_slopes.data != nullptr) {
      for_scores(lane, scores, [&](float& score, int half, int key) {
        score = variants::alibi_biased(math, score, rows.slope[half], static_cast<float>(left - 1 - key));
      });
    }
    if (left < kKeys) {
      for_scores(lane, scores, [&](float& score, int /*half*/, int key) {
        if (key >= left) score = -kInfinity;
      });
    }
  }

  // Scores become weights; what was summed up relative to another reference shrinks.
  static __device__ __forceinline__ void softmax(const Lane& lane, Rows& rows, Output& out, Scores& scores) {
    float largest[kHalves];
    bool moves = false;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      largest[half] = rows.top[half];
#pragma unroll
      for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
        const Accumulator& pair = scores[0][key_tile];
        largest[half] = fmaxf(largest[half], fmaxf(pair[2 * half], pair[2 * half + 1]));
      }
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 1));
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], 2));
      moves = moves || largest[half] > rows.top[half];
    }
    if (__any_sync(0xffffffffu, moves) != 0) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const float shrink = decode_exp<kElement>(rows.top[half] - finite_or_zero(largest[half]));
        rows.top[half] = largest[half];
        rows.sum[half] *= shrink;
        // A thread's columns of the output are two other rows of the scores.
        const float shrink_of[2] = {__shfl_sync(0xffffffffu, shrink, lane.column * 4),
                                    __shfl_sync(0xffffffffu, shrink, lane.column * 4 + 4)};
#pragma unroll
        for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[half][dim_tile][i] *= shrink_of[i % 2];
        }
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const float reference = finite_or_zero(rows.top[half]);
#pragma unroll
      for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = scores[0][key_tile][2 * half + e];
          weight = decode_exp<kElement>(weight - reference);
          rows.sum[half] += weight;
        }
      }
    }
  }

  // The tiles of a warp.
  static __device__ __forceinline__ void attend(const Params& params, Ring& ring, const Query& query, const Lane& lane,
                                                Rows& rows, Output& out) {
#pragma unroll 1
    for (int tile = ring.tiles.first; tile < ring.tiles.end; tile += ring.tiles.stride) {
      const int left = params.num_keys - tile * kKeys;
      Scores scores;
      ring.wait();
      if constexpr (kSpec.has_rope) {
        rotate<KTile>(ring.slot(), min(left, kKeys), params.first_key + static_cast<long long>(tile) * kKeys, 1,
                      params.head_dim_qk, lane.lane, 32);
        __syncwarp();
      }
      multiply_qk(query, ring.slot(), lane, scores);
      ring.template refill<kSlots>(tile);
      make_scores(params, rows, left, lane, scores);
      softmax(lane, rows, out, scores);
      ring.wait();
      multiply_pv(scores, ring.slot(), lane, out);
      ring.template refill<kSlots + 1>(tile);
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Merge.

  static __device__ __forceinline__ RowStatistics* statistics_of(int part_offset) {
    return reinterpret_cast<RowStatistics*>(shared_memory + part_offset);
  }
  static __device__ __forceinline__ float* part_of(int warp) {
    return reinterpret_cast<float*>(shared_memory + kShared.rings + warp * kShared.ring_bytes);
  }

  // Into the warp's own ring, whose copies have all been used.
  static __device__ __forceinline__ void leave_part(const Lane& lane, const Rows& rows, const Output& out) {
    ptx::cp_async_wait<0>();
    __syncwarp();
    float* const part = part_of(lane.warp);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float sum = rows.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane.column == 0) {
        statistics_of(kShared.statistics)[lane.warp * kRows + half * 8 + lane.row] = {rows.top[half], sum};
      }
#pragma unroll
      for (int dim_tile = 0; dim_tile < kDimTiles; ++dim_tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          part[(half * 8 + lane.column + i % 2) * kPartRow + dim_tile * 16 + i / 2 * 8 + lane.row] =
              out[half][dim_tile][i];
        }
      }
    }
  }

  // What the warps of the block left of a chunk: four columns of a row.
  static __device__ __forceinline__ Parts parts_of_warps(int chunk) {
    const int row = chunk / kRowChunks, column = chunk % kRowChunks * 4;
    return {kWarps, part_of(0) + row * kPartRow + column, kShared.ring_bytes / 4,
            statistics_of(kShared.statistics) + row, kRows};
  }

  // Each block of the cluster owns as many chunks as the others and gets, from every block, what its warps have of
  // them.
  struct ClusterShare {
    int num_ranks, rank, num_chunks;  // of the owner

    __device__ __forceinline__ ClusterShare(const Params& params, const Work& work)
        : num_ranks(1 << params.cluster_log2), rank(static_cast<int>(work.rank)) {
      num_chunks = (work.num_rows * kRowChunks + num_ranks - 1) >> params.cluster_log2;
    }
    __device__ __forceinline__ int out_offset(int from, int index) const {
      return kShared.sent + (from * num_chunks + index) * 16;
    }
    static __device__ __forceinline__ int statistics_offset(int from, int row) {
      return kShared.sent_statistics + (from * kRows + row) * 8;
    }
    // What the blocks sent of this block's chunk number `index`, which is of that row.
    __device__ __forceinline__ Parts parts(int index, int row) const {
      return {num_ranks, reinterpret_cast<const float*>(shared_memory + out_offset(0, index)), num_chunks * 4,
              statistics_of(statistics_offset(0, row)), kRows};
    }
  };

  static __device__ __forceinline__ void send(const ClusterShare& share, int num_chunks) {
    const uint32 shared = ptx::shared_address(shared_memory);
    ptx::cluster_wait();  // for all blocks to have started
#pragma unroll 1
    for (int chunk = ptx::thread_index(); chunk < num_chunks; chunk += kNumThreads) {
      const PartOfRow part = merge_parts<kElement>(parts_of_warps(chunk));
      const int owner = chunk / share.num_chunks;
      ptx::store_cluster_16(shared + share.out_offset(share.rank, chunk - owner * share.num_chunks), owner, part.out);
      if (chunk % kRowChunks != 0) continue;
#pragma unroll 1
      for (int to = 0; to < share.num_ranks; ++to) {
        ptx::store_cluster_8(shared + share.statistics_offset(share.rank, chunk / kRowChunks), to, part.row.top,
                             part.row.sum);
      }
    }
    __syncwarp();  // barriers of clusters are for whole warps
    ptx::cluster_arrive_release();
    ptx::cluster_wait();
  }

  static __device__ __forceinline__ void write(const Params& params, const Work& work, int row, int column,
                                               const PartOfRow& part) {
    const int head = work.first_head + row;
    if (params.num_pieces.divisor == 1) {
      finish_part<kElement, kSpec.is_aligned>(params, work.problem, head, column, part);
      return;
    }
    const DecodePieces pieces(params, work.problem, head);
    *reinterpret_cast<float4*>(pieces.outs + static_cast<long long>(work.piece) * pieces.row + column) = {
        part.out[0], part.out[1], part.out[2], part.out[3]};
    if (column == 0) pieces.rows[work.piece] = part.row;
  }

  static __device__ __forceinline__ void merge(const Params& params, const Work& work, bool is_cluster) {
    const ClusterShare share(params, work);
    const int num_chunks = work.num_rows * kRowChunks;
    const int first_chunk = is_cluster ? share.rank * share.num_chunks : 0;
    const int num_own_chunks = min(share.num_chunks, num_chunks - first_chunk);
    if (is_cluster) send(share, num_chunks);
#pragma unroll 1
    for (int index = ptx::thread_index(); index < num_own_chunks; index += kNumThreads) {
      const int chunk = first_chunk + index, row = chunk / kRowChunks;
      const Parts parts = is_cluster ? share.parts(index, row) : parts_of_warps(chunk);
      write(params, work, row, chunk % kRowChunks * 4, merge_parts<kElement>(parts));
    }
  }

  // -------------------------------------------------------------------------------------------------------------------

  static __device__ __forceinline__ void reset(const Params& params, const Work& work, long long lead, const Lane& lane,
                                               Rows& rows, Output& out) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      rows.top[half] = -kInfinity;
      rows.sum[half] = 0.0f;
      rows.slope[half] = 0.0f;
      const int row = half * 8 + lane.row;
      if (params.alibi_slopes.data != nullptr && row < work.num_rows) {
        rows.slope[half] = *reinterpret_cast<const float*>(params.alibi_slopes.data + lead +
                                                           (work.first_head + row) * params.alibi_slopes.head_bytes);
      }
    }
    clear(out);
  }

  static __device__ __forceinline__ void run(const Params& params) {
    const Lane lane;
    const Work work(params);
    const bool is_cluster = kHasClusters && params.cluster_log2 > 0;
    if (is_cluster) ptx::cluster_arrive();
    if (params.num_pieces.divisor > 1) ptx::let_next_kernel_start();
    long long offsets[kNumDecodeOperands] = {};
    add_lead_offsets(params, work.problem, offsets);
    Ring ring(params, Source(params.k, offsets[kDecodeK], work, params.head_dim_qk),
              Source(params.v, offsets[kDecodeV], work, params.head_dim_v), Tiles(params, work, lane.warp), lane);
    ring.fill_all([&] { copy_query(params, work, offsets[kDecodeQ], ring.policy); });
    Rows rows;
    Output out;
    reset(params, work, offsets[kDecodeSlopes], lane, rows, out);
    ring.wait();
    __syncthreads();  // the query is there, too
    if constexpr (kSpec.has_rope) {
      rotate_query(params, work);
      __syncthreads();
    }
    const Query query(lane);
    attend(params, ring, query, lane, rows, out);
    leave_part(lane, rows, out);
    __syncthreads();
    merge(params, work, is_cluster);
  }
};

}  // namespace heed::cuda
