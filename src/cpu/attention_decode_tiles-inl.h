// The inner loops of the CPU kernel of attention of one query, for one instruction set.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ATTENTION_DECODE_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ATTENTION_DECODE_TILES_INL_H_
#undef HEED_CPU_ATTENTION_DECODE_TILES_INL_H_
#else
#define HEED_CPU_ATTENTION_DECODE_TILES_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "cpu/convert-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace decode {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

constexpr int kLanes = hn::MaxLanes(DF());
// Query heads of a tile, and vectors of V's columns. With 4 keys a tile of scores has 16 accumulators of AVX-512's 32
// registers, or 8 of 16.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
constexpr int kTileHeads = 4;
constexpr int kTileVectors = 4;
#else
constexpr int kTileHeads = 2;
constexpr int kTileVectors = 4;
#endif
constexpr int kTileKeys = 4;
constexpr int kBlockKeys = 32;
static_assert(kBlockKeys % kTileKeys == 0 && kBlockKeys % kLanes == 0);
// Floats between rows of a block of K or V, for every head dim; an odd number of cache lines.
constexpr int kRowStride = 256 + 16;

// [count][stride] elements, adjacent within a row.
template <class Stored>
struct Rows {
  const Stored* data;
  int64_t stride;
};

// Rows that are needed next. Rows of K and V may lie a whole token apart, too far for hardware prefetchers.
class NextRows {
 public:
  NextRows() = default;
  NextRows(const void* data, int64_t stride_bytes, int row_bytes, int num_rows)
      : next_(static_cast<const char*>(data)),
        stride_bytes_(stride_bytes),
        row_bytes_(row_bytes),
        rows_left_(num_rows) {}
  // Asks for the next row, if one is left.
  HWY_INLINE void fetch() {
    if (rows_left_ == 0) return;
    --rows_left_;
    for (int x = 0; x < row_bytes_; x += kCacheLineBytes) __builtin_prefetch(next_ + x, 0, 2);
    next_ += stride_bytes_;
  }

 private:
  static constexpr int kCacheLineBytes = 64;
  const char* next_ = nullptr;
  int64_t stride_bytes_ = 0;
  int row_bytes_ = 0, rows_left_ = 0;
};

#if HWY_TARGET != HWY_SCALAR
// Adds up groups of 4 lanes.
template <class D>
HWY_INLINE void store_folded(D d, hn::Vec<D> v, float* HWY_RESTRICT to) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    hn::StoreU(v, d, to);
  } else {
    const hn::Half<D> half;
    store_folded(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to);
  }
}
#endif

// to[i] is the sum of all lanes of v[i].
HWY_INLINE void sum_four(const VF* HWY_RESTRICT v, float* HWY_RESTRICT to) {
#if HWY_TARGET == HWY_SCALAR
  for (int i = 0; i < 4; ++i) to[i] = hn::GetLane(v[i]);
#else
  const DF d;
  const hn::Repartition<double, DF> pairs;
  const VF sum01 = hn::Add(hn::InterleaveLower(d, v[0], v[1]), hn::InterleaveUpper(d, v[0], v[1]));
  const VF sum23 = hn::Add(hn::InterleaveLower(d, v[2], v[3]), hn::InterleaveUpper(d, v[2], v[3]));
  const auto low = hn::BitCast(pairs, sum01);
  const auto high = hn::BitCast(pairs, sum23);
  const VF sum = hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, low, high)),
                         hn::BitCast(d, hn::InterleaveUpper(pairs, low, high)));
  // Every 4 lanes now hold a share of the four sums.
  store_folded(d, sum, to);
#endif
}

// Raw products of kHeads query heads and the block's keys: `q` [kHeads][q_stride], `scores` [kHeads][kBlockKeys].
// `head_dim` is a multiple of kLanes. Scores of keys from num_keys on are anything.
template <class Storage, int kHeads>
HWY_NOINLINE void scores(const Rows<typename Storage::Stored>& k, int num_keys, const float* HWY_RESTRICT q,
                         int q_stride, int head_dim, float* HWY_RESTRICT to, NextRows& next) {
  const DF d;
  for (int t = 0; t < num_keys; t += kTileKeys) {
    HEED_UNROLL for (int j = 0; j < kTileKeys; ++j) next.fetch();
    const typename Storage::Stored* rows[kTileKeys];
    HEED_UNROLL for (int j = 0; j < kTileKeys; ++j) rows[j] = k.data + std::min(t + j, num_keys - 1) * k.stride;
    VF acc[kHeads][kTileKeys];
    HEED_UNROLL for (int h = 0; h < kHeads; ++h) {
      HEED_UNROLL for (int j = 0; j < kTileKeys; ++j) acc[h][j] = hn::Zero(d);
    }
    for (int x = 0; x < head_dim; x += kLanes) {
      VF keys[kTileKeys];
      HEED_UNROLL for (int j = 0; j < kTileKeys; ++j) keys[j] = Storage::load(d, rows[j] + x);
      HEED_UNROLL for (int h = 0; h < kHeads; ++h) {
        const VF query = hn::Load(d, q + h * q_stride + x);
        HEED_UNROLL for (int j = 0; j < kTileKeys; ++j) acc[h][j] = hn::MulAdd(query, keys[j], acc[h][j]);
      }
    }
    HEED_UNROLL for (int h = 0; h < kHeads; ++h) sum_four(acc[h], to + h * kBlockKeys + t);
  }
}

// kVecs vectors of columns: o = o * rescale + sum of weights times rows of V. `weights` [kHeads][kBlockKeys], `o`
// [kHeads][o_stride].
template <class Storage, int kHeads, int kVecs>
HWY_INLINE void add_columns(const Rows<typename Storage::Stored>& v, int num_keys, const float* HWY_RESTRICT weights,
                            const float* HWY_RESTRICT rescale, float* HWY_RESTRICT o, int o_stride, NextRows& next) {
  const DF d;
  VF acc[kHeads][kVecs];
  HEED_UNROLL for (int h = 0; h < kHeads; ++h) { HEED_UNROLL for (int c = 0; c < kVecs; ++c) acc[h][c] = hn::Zero(d); }
  const typename Storage::Stored* row = v.data;
  for (int t = 0; t < num_keys; ++t, row += v.stride) {
    next.fetch();
    VF values[kVecs];
    HEED_UNROLL for (int c = 0; c < kVecs; ++c) values[c] = Storage::load(d, row + c * kLanes);
    HEED_UNROLL for (int h = 0; h < kHeads; ++h) {
      const VF weight = hn::Set(d, weights[h * kBlockKeys + t]);
      HEED_UNROLL for (int c = 0; c < kVecs; ++c) acc[h][c] = hn::MulAdd(weight, values[c], acc[h][c]);
    }
  }
  HEED_UNROLL for (int h = 0; h < kHeads; ++h) {
    HEED_UNROLL for (int c = 0; c < kVecs; ++c) {
      float* at = o + h * o_stride + c * kLanes;
      hn::Store(hn::MulAdd(hn::Load(d, at), hn::Set(d, rescale[h]), acc[h][c]), d, at);
    }
  }
}

// The same for all columns; `head_dim` is a multiple of kLanes.
template <class Storage, int kHeads>
HWY_NOINLINE void add_values(const Rows<typename Storage::Stored>& v, int num_keys, const float* HWY_RESTRICT weights,
                             const float* HWY_RESTRICT rescale, float* HWY_RESTRICT o, int o_stride, int head_dim,
                             NextRows& next) {
  int x = 0;
  for (; x + kTileVectors * kLanes <= head_dim; x += kTileVectors * kLanes) {
    add_columns<Storage, kHeads, kTileVectors>({v.data + x, v.stride}, num_keys, weights, rescale, o + x, o_stride,
                                               next);
  }
  for (; x < head_dim; x += kLanes) {
    add_columns<Storage, kHeads, 1>({v.data + x, v.stride}, num_keys, weights, rescale, o + x, o_stride, next);
  }
}

}  // namespace decode
}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ATTENTION_DECODE_TILES_INL_H_
