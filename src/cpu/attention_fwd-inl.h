// The CPU attention forward kernel for one instruction set. See attention_fwd.cc for the plan of attack.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ATTENTION_FWD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ATTENTION_FWD_INL_H_
#undef HEED_CPU_ATTENTION_FWD_INL_H_
#else
#define HEED_CPU_ATTENTION_FWD_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/attention_fwd_plan.h"
#include "cpu/attention_fwd_schedule.h"
#include "cpu/convert-inl.h"
#include "cpu/math-inl.h"
#include "cpu/parallel.h"
#include "variants/alibi.h"
#include "variants/segment_ids.h"
#include "variants/sinks.h"
#include "variants/softcap.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace score = variants::HWY_NAMESPACE;
using variants::Range;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using VF = hn::Vec<DF>;

constexpr int kLanes = hn::MaxLanes(DF());
// The register tile: kTile keys (or columns of V) by kVectors vectors of query rows, plus kVectors + 1 operands. 24 + 4
// of AVX-512's 32 registers; 12 + 4 of AVX2's 16; narrower sets need one more register for the product before the
// addition.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
constexpr int kTile = 8;
constexpr int kVectors = 3;
#elif HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_NEON
constexpr int kTile = 4;
constexpr int kVectors = 3;
#else
constexpr int kTile = 4;
constexpr int kVectors = 2;
#endif
constexpr int kPanelRows = kVectors * kLanes;

constexpr int kCacheLineBytes = 64;
// Keys per block. A panel's P^T (kBlockKeys x kPanelRows floats, 24 KB with AVX-512) stays in L1 while V streams by.
constexpr int kBlockKeys = 128;
// Floats between packed rows of K or V, for every head dim: tiles then address memory by constant displacements from
// one pointer, and the odd number of cache lines spreads a column over all cache sets.
constexpr int kRowStride = kMaxHeadDim + 16;
static_assert(kMaxHeadDim <= kMaxRow && kMaxHeadDim % kTile == 0 && kBlockKeys % kTile == 0 &&
              kPanelRows <= kBlockKeys);
constexpr int kMaxPanels = 8;
// Bound of packed Q and the accumulators of O together, over all panels of an item.
constexpr size_t kMaxPanelFloats = size_t{512} * 1024 / sizeof(float);

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Up to kPanelRows query rows, a lane each. Row r of a KV head is head r % group of the group at query r / group.
struct Panel {
  int num_vectors;  // of rows; the last may be padded
  int num_rows;
  int64_t first_row;
  Range queries;
  int id_min, id_max;  // segment ids present
  float* q;            // [D][num_vectors * kLanes]
  float* o;            // [Dv rounded up to kTile][num_vectors * kLanes]
  float* row_max;      // [kPanelRows] of scores, in the units of the score tile
  float* row_sum;      // [kPanelRows]
  float* slope;        // [kPanelRows] ALiBi
  float* query;        // [kPanelRows] query of the row, relative to queries.begin
  int32_t* id;         // [kPanelRows] segment
};

// One work item: some panels of one KV head of one sequence. Queries and keys count from the sequence's first.
struct Item {
  // `data` at the item's problem, head and first token.
  Operand q, k, v, sinks, alibi_slopes, q_segment_ids, kv_segment_ids, out, lse;
  variants::Band band;
  int64_t kv_len;
  int num_panels;
  Panel panels[kMaxPanels];
  float* k_block;  // [kBlockKeys][kRowStride]
  float* v_block;  // [kBlockKeys][kRowStride]
  float* scores;   // [kBlockKeys][kPanelRows]: S^T, then P^T
};

// The keys of a block that a panel works on, relative to the block; outside [full_begin, full_end) a mask applies.
struct BlockKeys {
  int begin = 0, end = 0, full_begin = 0, full_end = 0;
  bool has_segments = false;
  bool empty() const { return begin >= end; }
  bool needs_mask() const { return full_begin > begin || full_end < end; }
};

// Asks for the next block's rows of K and V, a row of each per register tile, so that packing them finds them in the
// caches. Rows lie a whole token apart, which is too far for hardware prefetchers.
class Prefetcher {
 public:
  // Starts over with the keys `rows`; `size_bytes` of a stored element.
  void start(const ForwardPlan& plan, const Operand& k, const Operand& v, Range rows, int64_t size_bytes) {
    rows_left_ = rows.empty() || k.dim != 1 || v.dim != 1 ? 0 : static_cast<int>(rows.end - rows.begin);
    k_ = {static_cast<const char*>(k.data) + rows.begin * k.token * size_bytes, k.token * size_bytes,
          plan.head_dim_qk * size_bytes};
    v_ = {static_cast<const char*>(v.data) + rows.begin * v.token * size_bytes, v.token * size_bytes,
          plan.head_dim_v * size_bytes};
  }
  HWY_INLINE void step() {
    if (rows_left_ == 0) return;
    --rows_left_;
    k_.fetch_row();
    v_.fetch_row();
  }

 private:
  struct Rows {
    const char* next;
    int64_t stride_bytes, row_bytes;
    HWY_INLINE void fetch_row() {
      for (int64_t x = 0; x < row_bytes; x += kCacheLineBytes) __builtin_prefetch(next + x);
      next += stride_bytes;
    }
  };
  int rows_left_ = 0;
  Rows k_{}, v_{};
};

// ---------------------------------------------------------------------------------------------------------------------
// Products.

// Products added up in one go. Sums of longer dot products are formed run by run: their rounding errors then grow with
// the square root of the run, not of the head dim, for 2% more instructions.
constexpr int kDotRun = 16;

// S^T tile (+)= K Q^T over at most kDotRun elements of the head dim: `k` [kTile][kRowStride], `q` [count][rows], `s`
// [kTile][rows].
template <int kVecs, bool kIsFirstRun>
HWY_INLINE void qk_run(const float* HWY_RESTRICT k, const float* HWY_RESTRICT q, int count, float* HWY_RESTRICT s) {
  const DF d;
  VF acc[kTile][kVecs];
  HEED_UNROLL for (int j = 0; j < kTile; ++j) { HEED_UNROLL for (int m = 0; m < kVecs; ++m) acc[j][m] = hn::Zero(d); }
  for (int x = 0; x < count; ++x) {
    VF rows[kVecs];
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) rows[m] = hn::Load(d, q + m * kLanes);
    HEED_UNROLL for (int j = 0; j < kTile; ++j) {
      const VF key = hn::Set(d, k[j * kRowStride]);
      HEED_UNROLL for (int m = 0; m < kVecs; ++m) acc[j][m] = hn::MulAdd(key, rows[m], acc[j][m]);
    }
    q += kVecs * kLanes;
    ++k;
  }
  HEED_UNROLL for (int j = 0; j < kTile; ++j) {
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
      float* at = s + (j * kVecs + m) * kLanes;
      hn::Store(kIsFirstRun ? acc[j][m] : hn::Add(hn::Load(d, at), acc[j][m]), d, at);
    }
  }
}

// S^T tile = K Q^T.
template <int kVecs>
HWY_INLINE void qk_tile(const float* HWY_RESTRICT k, const float* HWY_RESTRICT q, int head_dim, float* HWY_RESTRICT s) {
  qk_run<kVecs, true>(k, q, std::min(head_dim, kDotRun), s);
  for (int x = kDotRun; x < head_dim; x += kDotRun) {
    qk_run<kVecs, false>(k + x, q + x * kVecs * kLanes, std::min(head_dim - x, kDotRun), s);
  }
}

// O^T tile = O^T * rescale + V^T P^T: `v` [num_keys][kRowStride], of which kTile columns; `p` [num_keys][rows];
// `rescale` [rows]; `o` [kTile][rows].
template <int kVecs>
HWY_INLINE void pv_tile(const float* HWY_RESTRICT v, const float* HWY_RESTRICT p, int num_keys,
                        const float* HWY_RESTRICT rescale, float* HWY_RESTRICT o) {
  const DF d;
  VF acc[kTile][kVecs];
  HEED_UNROLL for (int j = 0; j < kTile; ++j) { HEED_UNROLL for (int m = 0; m < kVecs; ++m) acc[j][m] = hn::Zero(d); }
  for (int t = 0; t < num_keys; ++t) {
    VF rows[kVecs];
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) rows[m] = hn::Load(d, p + m * kLanes);
    HEED_UNROLL for (int j = 0; j < kTile; ++j) {
      const VF value = hn::Set(d, v[j]);
      HEED_UNROLL for (int m = 0; m < kVecs; ++m) acc[j][m] = hn::MulAdd(value, rows[m], acc[j][m]);
    }
    p += kVecs * kLanes;
    v += kRowStride;
  }
  // The block's sum first, then one addition to what came before: rounding errors grow with the block, not with kv_len.
  HEED_UNROLL for (int j = 0; j < kTile; ++j) {
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
      float* at = o + (j * kVecs + m) * kLanes;
      hn::Store(hn::MulAdd(hn::Load(d, at), hn::Load(d, rescale + m * kLanes), acc[j][m]), d, at);
    }
  }
}

// O^T += V^T P^T over kept (query, key) pairs only: where a block of V holds inf or NaN, a weight of 0 is not enough to
// keep masked keys out. Slow, and only ever runs in blocks that are both masked and not finite.
template <int kVecs>
HWY_NOINLINE void pv_kept_pairs(const ForwardPlan& plan, const Item& item, const Panel& panel, Range block,
                                const BlockKeys& keys, const float* HWY_RESTRICT rescale) {
  constexpr int kRows = kVecs * kLanes;
  const auto* kv_ids = static_cast<const int32_t*>(item.kv_segment_ids.data);
  for (int r = 0; r < panel.num_rows; ++r) {
    const int64_t query = (panel.first_row + r) / plan.group;
    for (int x = 0; x < plan.head_dim_v; ++x) panel.o[x * kRows + r] *= rescale[r];
    for (int t = keys.begin; t < keys.end; ++t) {
      const int64_t key = block.begin + t;
      if (!item.band.keep(query, key)) continue;
      if (kv_ids != nullptr && !variants::same_segment(panel.id[r], kv_ids[key * item.kv_segment_ids.token])) continue;
      const float weight = item.scores[t * kRows + r];
      for (int x = 0; x < plan.head_dim_v; ++x) panel.o[x * kRows + r] += weight * item.v_block[t * kRowStride + x];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores and softmax, one query row per lane.

// Raw products -> scores in natural units.
template <int kVecs>
HWY_NOINLINE void transform_scores(const ForwardPlan& plan, const Item& item, const Panel& panel, Range block,
                                   const BlockKeys& keys) {
  const DF d;
  const VectorMath<DF> math{d};
  const bool has_alibi = plan.alibi_slopes.data != nullptr;
  for (int t = keys.begin; t < keys.end; ++t) {
    // Exact below 2^24: the distance of the panel's first query, plus a small offset per row.
    const VF distance = hn::Set(d, static_cast<float>(panel.queries.begin + item.band.offset - (block.begin + t)));
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
      float* at = item.scores + (t * kVecs + m) * kLanes;
      VF s = hn::Load(d, at);
      s = plan.has_softcap ? score::soft_capped(math, s, plan.scale_over_cap, plan.softcap)
                           : math.mul(s, math.set(static_cast<float>(plan.scale)));
      if (has_alibi) {
        s = score::alibi_biased(math, s, hn::Load(d, panel.slope + m * kLanes),
                                hn::Add(hn::Load(d, panel.query + m * kLanes), distance));
      }
      hn::Store(s, d, at);
    }
  }
}

// Writes -inf over masked scores.
template <int kVecs>
HWY_NOINLINE void mask_scores(const ForwardPlan& plan, const Item& item, const Panel& panel, Range block,
                              const BlockKeys& keys) {
  const DF d;
  const DI di;
  const auto* kv_ids = static_cast<const int32_t*>(item.kv_segment_ids.data);
  const VF minus_infinity = hn::Set(d, -kInfinity);
  for (int t = keys.begin; t < keys.end; ++t) {
    if (t == keys.full_begin && t < keys.full_end) t = keys.full_end;
    if (t >= keys.end) break;
    const int64_t key = block.begin + t;
    // The rows that see this key are consecutive.
    const Range queries = intersect(item.band.queries_of(key), panel.queries);
    const auto first =
        static_cast<int32_t>(std::clamp<int64_t>(queries.begin * plan.group - panel.first_row, 0, kPanelRows));
    const auto last =
        static_cast<int32_t>(std::clamp<int64_t>(queries.end * plan.group - panel.first_row, 0, kPanelRows));
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
      const auto row = hn::Iota(di, m * kLanes);
      auto keep = hn::AndNot(hn::Lt(row, hn::Set(di, first)), hn::Lt(row, hn::Set(di, last)));
      if (keys.has_segments) {
        keep = hn::And(
            keep, hn::Eq(hn::Load(di, panel.id + m * kLanes), hn::Set(di, kv_ids[key * item.kv_segment_ids.token])));
      }
      float* at = item.scores + (t * kVecs + m) * kLanes;
      hn::Store(hn::IfThenElse(hn::RebindMask(d, keep), hn::Load(d, at), minus_infinity), d, at);
    }
  }
}

// Online softmax: scores -> weights exp2((score - max) * exponent_scale), row statistics updated; `rescale` [rows] is
// what the accumulators so far must be multiplied with.
template <int kVecs>
HWY_NOINLINE void softmax(float* HWY_RESTRICT scores, int begin, int end, float exponent_scale,
                          float* HWY_RESTRICT row_max, float* HWY_RESTRICT row_sum, float* HWY_RESTRICT rescale) {
  const DF d;
  VF max[kVecs];
  HEED_UNROLL for (int m = 0; m < kVecs; ++m) max[m] = hn::Load(d, row_max + m * kLanes);
  for (int t = begin; t < end; ++t) {
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
      max[m] = hn::Max(max[m], hn::Load(d, scores + (t * kVecs + m) * kLanes));
    }
  }
  const VF factor = hn::Set(d, exponent_scale);
  VF shift[kVecs];
  VF sum[kVecs];
  HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
    // A row that has seen no key yet must not calculate -inf - -inf.
    shift[m] = hn::IfThenZeroElse(hn::Eq(max[m], hn::Set(d, -kInfinity)), max[m]);
    const VF shrink = exp2_nonpositive(d, hn::Sub(hn::Load(d, row_max + m * kLanes), shift[m]), factor);
    hn::Store(max[m], d, row_max + m * kLanes);
    hn::Store(shrink, d, rescale + m * kLanes);
    hn::Store(hn::Mul(hn::Load(d, row_sum + m * kLanes), shrink), d, row_sum + m * kLanes);
    sum[m] = hn::Zero(d);
  }
  // Summed in runs of kTile keys, then over the block, then over all: rounding errors do not grow with kv_len. Runs
  // start at multiples of kTile, so that a row's sum does not depend on where its panel begins.
  while (begin < end) {
    VF run[kVecs];
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) run[m] = hn::Zero(d);
    for (const int run_end = std::min((begin / kTile + 1) * kTile, end); begin < run_end; ++begin) {
      HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
        float* at = scores + (begin * kVecs + m) * kLanes;
        const VF weight = exp2_nonpositive(d, hn::Sub(hn::Load(d, at), shift[m]), factor);
        hn::Store(weight, d, at);
        run[m] = hn::Add(run[m], weight);
      }
    }
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) sum[m] = hn::Add(sum[m], run[m]);
  }
  HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
    hn::Store(hn::Add(hn::Load(d, row_sum + m * kLanes), sum[m]), d, row_sum + m * kLanes);
  }
}

// One panel against the packed block.
template <int kVecs>
HWY_NOINLINE void attend_block(const ForwardPlan& plan, const Item& item, const Panel& panel, Range block,
                               const BlockKeys& keys, bool is_v_finite, Prefetcher& prefetcher) {
  constexpr int kRows = kVecs * kLanes;
  HWY_ALIGN float rescale[kRows];
  for (int t = keys.begin / kTile * kTile; t < keys.end; t += kTile) {
    qk_tile<kVecs>(item.k_block + t * kRowStride, panel.q, plan.head_dim_qk, item.scores + t * kRows);
    prefetcher.step();
  }
  constexpr double kLog2E = 1.4426950408889634;
  double exponent_scale = plan.scale * kLog2E;
  if (plan.has_score_transform) {
    transform_scores<kVecs>(plan, item, panel, block, keys);
    exponent_scale = kLog2E;
  }
  if (keys.needs_mask()) mask_scores<kVecs>(plan, item, panel, block, keys);
  softmax<kVecs>(item.scores, keys.begin, keys.end, static_cast<float>(exponent_scale), panel.row_max, panel.row_sum,
                 rescale);
  if (keys.needs_mask() && !is_v_finite) {
    pv_kept_pairs<kVecs>(plan, item, panel, block, keys, rescale);
    return;
  }
  for (int x = 0; x < plan.head_dim_v; x += kTile) {
    pv_tile<kVecs>(item.v_block + keys.begin * kRowStride + x, item.scores + keys.begin * kRows, keys.end - keys.begin,
                   rescale, panel.o + x * kRows);
    prefetcher.step();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing.

// Rows [begin, end) of K or V -> `packed` [..][kRowStride]. Rows and columns that only pad a tile keep what they held:
// their products are never read.
template <class Storage>
HWY_NOINLINE void pack_block(const Operand& operand, Range rows, int head_dim, float* HWY_RESTRICT packed) {
  const auto* data = static_cast<const typename Storage::Stored*>(operand.data);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    load_row<Storage>(data + row * operand.token, operand.dim, head_dim, packed);
    packed += kRowStride;
  }
}

template <class Storage>
HWY_NOINLINE void pack_panel(const ForwardPlan& plan, const Item& item, Panel& panel, Prefetcher& prefetcher) {
  const int rows = panel.num_vectors * kLanes;
  std::fill_n(panel.row_max, kPanelRows, -kInfinity);
  std::fill_n(panel.row_sum, kPanelRows, 0.0f);
  std::fill_n(panel.o, static_cast<size_t>(rows) * ((plan.head_dim_v + kTile - 1) / kTile * kTile), 0.0f);
  const auto* q = static_cast<const typename Storage::Stored*>(item.q.data);
  const auto* slopes = static_cast<const float*>(item.alibi_slopes.data);
  const auto* ids = static_cast<const int32_t*>(item.q_segment_ids.data);
  float* const by_row = item.k_block;  // [rows][kRowStride]; free until the first block is packed
  for (int r = 0; r < rows; ++r) {
    // Padding lanes repeat the last row: they calculate something harmless that is never stored.
    const int64_t index = panel.first_row + std::min(r, panel.num_rows - 1);
    const int64_t query = index / plan.group;
    const int64_t head = index % plan.group;
    float* row = by_row + r * kRowStride;
    prefetcher.step();
    load_row<Storage>(q + query * item.q.token + head * item.q.head, item.q.dim, plan.head_dim_qk, row);
    if (plan.negates_q) {
      for (int x = 0; x < plan.head_dim_qk; ++x) row[x] = -row[x];
    }
    panel.query[r] = static_cast<float>(query - panel.queries.begin);
    panel.slope[r] = slopes == nullptr ? 0.0f : slopes[head * item.alibi_slopes.head];
    panel.id[r] = ids == nullptr ? 0 : ids[query * item.q_segment_ids.token];
    panel.id_min = r == 0 ? panel.id[r] : std::min(panel.id_min, panel.id[r]);
    panel.id_max = r == 0 ? panel.id[r] : std::max(panel.id_max, panel.id[r]);
  }
  transpose(by_row, kRowStride, rows, plan.head_dim_qk, panel.q, static_cast<size_t>(rows));
}

template <class Storage>
HWY_NOINLINE void store_panel(const ForwardPlan& plan, const Item& item, const Panel& panel) {
  const int rows = panel.num_vectors * kLanes;
  const auto* sinks = static_cast<const float*>(item.sinks.data);
  auto* out = static_cast<typename Storage::Stored*>(item.out.data);
  auto* lse = static_cast<float*>(item.lse.data);
  const double natural = plan.has_score_transform ? 1.0 : plan.scale;
  float* const by_row = item.v_block;  // [rows][kRowStride]; the last block is done with it
  transpose(panel.o, static_cast<size_t>(rows), plan.head_dim_v, rows, by_row, kRowStride);
  for (int r = 0; r < panel.num_rows; ++r) {
    const int64_t query = (panel.first_row + r) / plan.group;
    const int64_t head = (panel.first_row + r) % plan.group;
    const double sink = sinks == nullptr ? 0.0 : sinks[head * item.sinks.head];
    const auto end = variants::finish_row<double>(panel.row_max[r] * natural, 0.0, panel.row_sum[r], sinks != nullptr,
                                                  sink, [](double x) { return std::exp(x); });
    const auto divisor = static_cast<float>(end.divisor);
    store_row<Storage>(by_row + r * kRowStride, plan.head_dim_v, out + query * item.out.token + head * item.out.head,
                       item.out.dim, [=](auto d, auto x) HWY_ATTR { return hn::Div(x, hn::Set(d, divisor)); });
    if (lse != nullptr) {
      lse[head * item.lse.head + query * item.lse.token] = static_cast<float>(end.top + std::log(end.total));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Work items.

inline int max_panels(const ForwardPlan& plan) {
  const size_t floats = static_cast<size_t>(plan.head_dim_qk + plan.head_dim_v + kTile) * kPanelRows;
  return static_cast<int>(std::clamp<size_t>(kMaxPanelFloats / floats, 1, kMaxPanels));
}

// Points the item's operands at its problem, KV head and first token.
template <class Stored>
void locate(const ForwardPlan& plan, const WorkItem& work, Item& item) {
  item.q = plan.q, item.k = plan.k, item.v = plan.v, item.out = plan.out, item.lse = plan.lse;
  item.sinks = plan.sinks, item.alibi_slopes = plan.alibi_slopes;
  item.q_segment_ids = plan.q_segment_ids, item.kv_segment_ids = plan.kv_segment_ids;
  if (work.is_outside) item.sinks.data = nullptr;
  const ProblemIndex index = split_problem(plan, work.problem);
  const auto offset = [&](const Operand& operand, int64_t head, int64_t token) {
    return offset_of(plan, operand, index) + head * operand.head + token * operand.token;
  };
  const int64_t q_head = work.kv_head * plan.group;
  const int64_t query = work.queries.begin;
  const int64_t key = work.keys.begin;
  advance<Stored>(item.q, offset(item.q, q_head, query));
  advance<Stored>(item.k, offset(item.k, work.kv_head, key));
  advance<Stored>(item.v, offset(item.v, work.kv_head, key));
  advance<Stored>(item.out, offset(item.out, q_head, query));
  advance<float>(item.lse, offset(item.lse, q_head, query));
  advance<float>(item.sinks, offset(item.sinks, q_head, 0));
  advance<float>(item.alibi_slopes, offset(item.alibi_slopes, q_head, 0));
  advance<int32_t>(item.q_segment_ids, offset(item.q_segment_ids, 0, query));
  advance<int32_t>(item.kv_segment_ids, offset(item.kv_segment_ids, 0, key));
  item.kv_len = work.keys.end - work.keys.begin;
  item.band = plan.band(work.queries.end - work.queries.begin, item.kv_len);
}

// Cuts this thread's scratch into the item's buffers, each on a cache line.
inline size_t carve_scratch(const ForwardPlan& plan, int num_panels, char* base, Item* item) {
  size_t used = 0;
  const auto take = [&](size_t count) {
    void* at = base == nullptr ? nullptr : base + used;
    used += (count * sizeof(float) + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
    return at;
  };
  Item unused;
  if (item == nullptr) item = &unused;
  item->k_block = static_cast<float*>(take(size_t{kBlockKeys} * kRowStride));
  item->v_block = static_cast<float*>(take(size_t{kBlockKeys} * kRowStride));
  item->scores = static_cast<float*>(take(size_t{kBlockKeys} * kPanelRows));
  for (int p = 0; p < num_panels; ++p) {
    Panel& panel = item->panels[p];
    panel.q = static_cast<float*>(take(static_cast<size_t>(plan.head_dim_qk) * kPanelRows));
    panel.o = static_cast<float*>(take(static_cast<size_t>(plan.head_dim_v + kTile) * kPanelRows));
    panel.row_max = static_cast<float*>(take(kPanelRows));
    panel.row_sum = static_cast<float*>(take(kPanelRows));
    panel.slope = static_cast<float*>(take(kPanelRows));
    panel.query = static_cast<float*>(take(kPanelRows));
    panel.id = static_cast<int32_t*>(take(kPanelRows));
  }
  return used;
}

// What the panel does in a block: the masks' loop bounds.
inline BlockKeys keys_in_block(const Item& item, const Panel& panel, Range block) {
  Range keys = intersect(item.band.keys_of_any(panel.queries), block);
  BlockKeys result;
  if (item.kv_segment_ids.data != nullptr && !keys.empty()) {
    const auto* ids = static_cast<const int32_t*>(item.kv_segment_ids.data);
    const auto segments = variants::segment_keys(keys, panel.id_min, panel.id_max,
                                                 [&](int64_t j) { return ids[j * item.kv_segment_ids.token]; });
    keys = segments.keys;
    result.has_segments = segments.needs_mask;
  }
  if (keys.empty()) return result;
  result.begin = static_cast<int>(keys.begin - block.begin);
  result.end = static_cast<int>(keys.end - block.begin);
  const Range full = intersect(item.band.keys_of_all(panel.queries), keys);
  const bool has_full = !full.empty() && !result.has_segments;
  result.full_begin = has_full ? static_cast<int>(full.begin - block.begin) : result.end;
  result.full_end = has_full ? static_cast<int>(full.end - block.begin) : result.end;
  return result;
}

// All panels of the item against one block of keys; `next` are the keys of the one after it.
template <class Storage>
void run_block(const ForwardPlan& plan, const Item& item, Range block, Range next, Prefetcher& prefetcher) {
  BlockKeys keys[kMaxPanels];
  int begin = kBlockKeys;
  int end = 0;
  bool needs_mask = false;
  for (int p = 0; p < item.num_panels; ++p) {
    keys[p] = keys_in_block(item, item.panels[p], block);
    if (keys[p].empty()) continue;
    begin = std::min(begin, keys[p].begin);
    end = std::max(end, keys[p].end);
    needs_mask = needs_mask || keys[p].needs_mask();
  }
  if (begin >= end) return;
  const Range rows = {block.begin + begin, block.begin + end};
  pack_block<Storage>(item.k, rows, plan.head_dim_qk, item.k_block + begin * kRowStride);
  pack_block<Storage>(item.v, rows, plan.head_dim_v, item.v_block + begin * kRowStride);
  const bool are_all_finite =
      !needs_mask || is_finite(item.v_block + begin * kRowStride, kRowStride, end - begin, plan.head_dim_v);
  prefetcher.start(plan, item.k, item.v, next, sizeof(typename Storage::Stored));
  for (int p = 0; p < item.num_panels; ++p) {
    if (keys[p].empty()) continue;
    const Panel& panel = item.panels[p];
    // Asked again for the panel's own keys, so that a row's result does not depend on which panels share its item.
    const bool is_v_finite =
        are_all_finite || !keys[p].needs_mask() ||
        is_finite(item.v_block + keys[p].begin * kRowStride, kRowStride, keys[p].end - keys[p].begin, plan.head_dim_v);
    if (panel.num_vectors == 1) {
      attend_block<1>(plan, item, panel, block, keys[p], is_v_finite, prefetcher);
    } else if (kVectors > 2 && panel.num_vectors == 3) {
      attend_block<kVectors>(plan, item, panel, block, keys[p], is_v_finite, prefetcher);
    } else {
      attend_block<2>(plan, item, panel, block, keys[p], is_v_finite, prefetcher);
    }
  }
}

template <class Storage>
void run_item(const ForwardPlan& plan, const Schedule& schedule, int64_t index) {
  const WorkItem work = schedule.item(index);
  Item item;
  locate<typename Storage::Stored>(plan, work, item);
  const size_t scratch_bytes = carve_scratch(plan, schedule.panels_per_item(), nullptr, nullptr);
  carve_scratch(plan, schedule.panels_per_item(), static_cast<char*>(thread_scratch(scratch_bytes)), &item);

  Range item_keys = {item.kv_len, 0};
  item.num_panels = 0;
  for (int64_t row = work.rows.begin; row < work.rows.end; row += kPanelRows) {
    Panel& panel = item.panels[item.num_panels++];
    panel.first_row = row;
    panel.num_rows = static_cast<int>(std::min<int64_t>(kPanelRows, work.rows.end - row));
    panel.num_vectors = (panel.num_rows + kLanes - 1) / kLanes;
    panel.queries = {row / plan.group, (row + panel.num_rows - 1) / plan.group + 1};
    const Range keys = intersect(item.band.keys_of_any(panel.queries), Range{0, item.kv_len});
    if (keys.empty()) continue;
    item_keys = {std::min(item_keys.begin, keys.begin), std::max(item_keys.end, keys.end)};
  }
  // Blocks start at multiples of kBlockKeys whatever the item, so a row's result does not depend on how rows are
  // grouped.
  const auto block_at = [&](int64_t begin) {
    return Range{begin, std::min<int64_t>(begin + kBlockKeys, item_keys.end)};
  };
  Range block = block_at(item_keys.begin / kBlockKeys * kBlockKeys);
  Prefetcher prefetcher;
  prefetcher.start(plan, item.k, item.v, block, sizeof(typename Storage::Stored));
  for (int p = 0; p < item.num_panels; ++p) pack_panel<Storage>(plan, item, item.panels[p], prefetcher);
  for (; !block.empty(); block = block_at(block.begin + kBlockKeys)) {
    run_block<Storage>(plan, item, block, block_at(block.begin + kBlockKeys), prefetcher);
  }
  for (int p = 0; p < item.num_panels; ++p) store_panel<Storage>(plan, item, item.panels[p]);
}

template <class Storage>
void run(const ForwardPlan& plan, int num_threads) {
  const Schedule schedule(plan, kPanelRows, max_panels(plan), num_threads);
  // Below some 20 us of work, waking other threads costs more than it gains.
  parallel_for(schedule.num_items(), schedule.num_products() < 1e6,
               [&](int64_t index) { run_item<Storage>(plan, schedule, index); });
}

void attention_fwd_run(const ForwardPlan& plan, int num_threads) {
  switch (plan.dtype) {
    case DType::kFloat32:
      return run<Float32>(plan, num_threads);
    case DType::kFloat16:
      return run<Float16>(plan, num_threads);
    case DType::kBFloat16:
      return run<BFloat16>(plan, num_threads);
    case DType::kInt32:
      return;  // validated away
  }
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ATTENTION_FWD_INL_H_
