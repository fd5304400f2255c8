// Matrix products of the CPU attention backward kernel: register tiles, and the five products of a row block with a
// chunk of keys as loops over them.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ATTENTION_BWD_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ATTENTION_BWD_TILES_INL_H_
#undef HEED_CPU_ATTENTION_BWD_TILES_INL_H_
#else
#define HEED_CPU_ATTENTION_BWD_TILES_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "cpu/attention_bwd_plan.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;

constexpr int kLanes = hn::MaxLanes(DF());
// The register tile: kTile rows of the left operand, broadcast element by element, by up to kVectors vectors of the
// right one. 24 accumulators + 4 + 1 of AVX-512's 32 registers; 12 + 2 + 1 of the 16 that others have.
constexpr int kTile = 6;
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_NEON
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// Floats between packed rows of Q, K, V and their gradients, for every head dim, and between rows of scores: tiles
// address memory by constant displacements, and the odd numbers of cache lines spread a column over all cache sets.
constexpr int kRowStride = kMaxHeadDim + 16;
constexpr int kScoreStride = kMaxChunkKeys + 16;
static_assert(kChunkStep % kTile == 0 && kChunkStep % kLanes == 0 && kMaxChunkKeys % (2 * kChunkStep) == 0);
static_assert(kBlockRows % kTile == 0 && kMaxHeadDim % kLanes == 0);

// Products added up in one go, along the head dim. Sums of longer dot products are formed run by run: their rounding
// errors then grow with the square root of the run.
constexpr int kDotRun = 16;
// The same along keys, where 96 rows of the right operand's columns stay in the L1 cache.
constexpr int kKeyRun = 96;

constexpr int kMaxBlockTiles = kBlockRows / kTile;
constexpr int kMaxChunkTiles = kMaxChunkKeys / kTile;

struct IntRange {
  int begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};

// tile [kTile][kVecs vectors] = or += the sum over `count` (at least 1) steps c of left[j * kLeftRow + c * kLeftStep]
// times right[c * right_stride + ..].
template <int kVecs, int kLeftRow, int kLeftStep, bool kAdds>
HWY_INLINE void multiply_tile(const float* HWY_RESTRICT left, const float* HWY_RESTRICT right, size_t right_stride,
                              int count, float* HWY_RESTRICT tile, size_t tile_stride) {
  const DF d;
  VF acc[kTile][kVecs];
  HEED_UNROLL for (int j = 0; j < kTile; ++j) { HEED_UNROLL for (int m = 0; m < kVecs; ++m) acc[j][m] = hn::Zero(d); }
  do {
    VF row[kVecs];
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) row[m] = hn::LoadU(d, right + m * kLanes);
    HEED_UNROLL for (int j = 0; j < kTile; ++j) {
      const VF value = hn::Set(d, left[j * kLeftRow]);
      HEED_UNROLL for (int m = 0; m < kVecs; ++m) acc[j][m] = hn::MulAdd(value, row[m], acc[j][m]);
    }
    right += right_stride;
    left += kLeftStep;
  } while (--count > 0);
  HEED_UNROLL for (int j = 0; j < kTile; ++j) {
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
      float* at = tile + static_cast<size_t>(j) * tile_stride + m * kLanes;
      hn::StoreU(kAdds ? hn::Add(hn::LoadU(d, at), acc[j][m]) : acc[j][m], d, at);
    }
  }
}

// Calls body(first vector, number of vectors as a constant) on parts of `num_vectors` vectors that are at most kVectors
// wide and as equal as can be.
template <class Body>
HWY_INLINE void for_column_tiles(int num_vectors, const Body& body) {
  int tiles = (num_vectors + kVectors - 1) / kVectors;
  for (int first = 0; first < num_vectors; --tiles) {
    const int width = (num_vectors - first + tiles - 1) / tiles;
    if (width == 1) body(first, std::integral_constant<int, 1>());
    if (width == 2) body(first, std::integral_constant<int, 2>());
    if constexpr (kVectors > 2) {
      if (width == 3) body(first, std::integral_constant<int, 3>());
      if (width == 4) body(first, std::integral_constant<int, 4>());
    }
    first += width;
  }
}

inline int vectors_of(int count) { return (count + kLanes - 1) / kLanes; }

// Asks for the rows of Q and dO of the next row block, a few per register tile, so that packing them finds them in the
// caches. Rows lie a whole token apart, which is too far for hardware prefetchers.
class RowPrefetcher {
 public:
  struct Rows {
    const char* data = nullptr;  // row r is head r % group at query r / group
    int64_t token_bytes = 0, head_bytes = 0, row_bytes = 0;

    HWY_INLINE void fetch(int64_t query, int64_t head) const {
      const char* row = data + query * token_bytes + head * head_bytes;
      for (int64_t x = 0; x < row_bytes; x += 64) __builtin_prefetch(row + x);
    }
  };
  // `num_steps`: calls of step() in which to be done.
  RowPrefetcher(Rows q, Rows dout, int64_t group, variants::Range rows, int num_steps)
      : q_(q), dout_(dout), group_(group), rows_(rows) {
    if (num_steps > 0 && !rows.empty()) per_step_ = (rows.end - rows.begin + num_steps - 1) / num_steps;
  }
  HWY_INLINE void step() {
    for (int64_t i = 0; i < per_step_ && rows_.begin < rows_.end; ++i, ++rows_.begin) {
      const int64_t query = rows_.begin / group_;
      const int64_t head = rows_.begin % group_;
      q_.fetch(query, head);
      dout_.fetch(query, head);
    }
  }

 private:
  Rows q_, dout_;
  int64_t group_;
  variants::Range rows_;
  int64_t per_step_ = 0;
};

// scores [kBlockRows][kScoreStride] = rows [kBlockRows][kRowStride] times keys^T, where a row tile sees keys of a
// panel. `panels`: per column tile of the chunk [head_dim][its keys], one after the other.
template <int kVecs>
HWY_NOINLINE void score_panel(const float* HWY_RESTRICT rows, const float* HWY_RESTRICT panel, int head_dim,
                              IntRange keys, const IntRange* keys_of_tile, int num_tiles, RowPrefetcher& prefetcher,
                              float* HWY_RESTRICT scores) {
  constexpr int kWidth = kVecs * kLanes;
  for (int i = 0; i < num_tiles; ++i) {
    prefetcher.step();
    if (keys_of_tile[i].begin >= keys.end || keys_of_tile[i].end <= keys.begin) continue;
    const float* left = rows + i * kTile * kRowStride;
    float* tile = scores + i * kTile * kScoreStride + keys.begin;
    multiply_tile<kVecs, kRowStride, 1, false>(left, panel, kWidth, std::min(head_dim, kDotRun), tile, kScoreStride);
    for (int x = kDotRun; x < head_dim; x += kDotRun) {
      multiply_tile<kVecs, kRowStride, 1, true>(left + x, panel + static_cast<size_t>(x) * kWidth, kWidth,
                                                std::min(head_dim - x, kDotRun), tile, kScoreStride);
    }
  }
}

inline void multiply_scores(const float* rows, const float* panels, int head_dim, int num_keys,
                            const IntRange* keys_of_tile, int num_tiles, RowPrefetcher& prefetcher, float* scores) {
  for_column_tiles(vectors_of(num_keys), [&](int first, auto vecs) HWY_ATTR {
    const IntRange keys = {first * kLanes, (first + vecs()) * kLanes};
    score_panel<vecs()>(rows, panels + static_cast<size_t>(keys.begin) * static_cast<size_t>(head_dim), head_dim, keys,
                        keys_of_tile, num_tiles, prefetcher, scores);
  });
}

// gradient [keys][kRowStride] += weights^T rows, `weights` [kBlockRows][kScoreStride]; per tile of keys over the rows
// that see any of them.
template <int kVecs>
HWY_NOINLINE void add_key_columns(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT rows,
                                  const IntRange* rows_of_tile, IntRange tiles, float* HWY_RESTRICT gradient) {
  for (int i = tiles.begin; i < tiles.end; ++i) {
    const IntRange seen_by = rows_of_tile[i];
    if (seen_by.empty()) continue;
    multiply_tile<kVecs, 1, kScoreStride, true>(
        weights + seen_by.begin * kScoreStride + i * kTile, rows + seen_by.begin * kRowStride, kRowStride,
        seen_by.end - seen_by.begin, gradient + i * kTile * kRowStride, kRowStride);
  }
}

inline void add_to_keys(const float* weights, const float* rows, int head_dim, const IntRange* rows_of_tile,
                        IntRange tiles, float* gradient) {
  for_column_tiles(vectors_of(head_dim), [&](int first, auto vecs) HWY_ATTR {
    add_key_columns<vecs()>(weights, rows + first * kLanes, rows_of_tile, tiles, gradient + first * kLanes);
  });
}

// gradient [kBlockRows][kRowStride] = weights keys, `keys` [..][kRowStride]; per row tile over the keys that it sees.
template <int kVecs>
HWY_NOINLINE void set_row_columns(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT keys, int num_keys,
                                  const IntRange* keys_of_tile, int num_tiles, float* HWY_RESTRICT gradient) {
  for (int run = 0; run < num_keys; run += kKeyRun) {
    for (int i = 0; i < num_tiles; ++i) {
      const int begin = std::max(keys_of_tile[i].begin, run);
      const int end = std::min(keys_of_tile[i].end, run + kKeyRun);
      const float* left = weights + i * kTile * kScoreStride + begin;
      const float* right = keys + begin * kRowStride;
      float* tile = gradient + i * kTile * kRowStride;
      if (begin >= end) {
        for (int j = 0; j < kTile && run == 0; ++j) std::fill_n(tile + j * kRowStride, kVecs * kLanes, 0.0f);
      } else if (run == 0) {
        multiply_tile<kVecs, kScoreStride, 1, false>(left, right, kRowStride, end - begin, tile, kRowStride);
      } else {
        multiply_tile<kVecs, kScoreStride, 1, true>(left, right, kRowStride, end - begin, tile, kRowStride);
      }
    }
  }
}

inline void set_rows(const float* weights, const float* keys, int num_keys, int head_dim, const IntRange* keys_of_tile,
                     int num_tiles, float* gradient) {
  for_column_tiles(vectors_of(head_dim), [&](int first, auto vecs) HWY_ATTR {
    set_row_columns<vecs()>(weights, keys + first * kLanes, num_keys, keys_of_tile, num_tiles,
                            gradient + first * kLanes);
  });
}

}  // namespace
}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ATTENTION_BWD_TILES_INL_H_
