// The CPU attention backward kernel for one instruction set. See attention_bwd.cc for the plan of attack.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ATTENTION_BWD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ATTENTION_BWD_INL_H_
#undef HEED_CPU_ATTENTION_BWD_INL_H_
#else
#define HEED_CPU_ATTENTION_BWD_INL_H_
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <thread>

#include "cpu/attention_bwd_plan.h"
#include "cpu/attention_bwd_schedule.h"
#include "cpu/attention_bwd_tiles-inl.h"
#include "cpu/convert-inl.h"
#include "cpu/math-inl.h"
#include "cpu/parallel.h"
#include "hwy/cache_control.h"
#include "variants/alibi.h"
#include "variants/segment_ids.h"
#include "variants/softcap.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace {
namespace score = variants::HWY_NAMESPACE;
using variants::Range;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kCacheLineBytes = 64;

// One KV head of one sequence. Queries and keys count from the sequence's first.
struct Head {
  // `data` at the problem, the (first) head and the sequence's first token.
  Operand q, k, v, out, lse, dout, dlse, alibi_slopes, q_segment_ids, kv_segment_ids, dq, dk, dv;
  HeadWorkspace workspace;
  variants::Band band;
};

// The chunk of keys that a thread works on.
struct Chunk {
  int64_t index;
  Range keys;
  int num_keys;
  bool is_k_finite;
  float* k;              // [num_keys][kRowStride]
  float* k_panels;       // K^T: per column tile [head_dim_qk][its keys]
  float* v_panels;       // V^T: per column tile [head_dim_v][its keys]
  float* dk;             // [keys rounded up to kTile][kRowStride]
  float* dv;             // likewise
  float* q;              // [kBlockRows][kRowStride]: the row block's
  float* dout;           // likewise
  float* dq;             // likewise: what the chunk adds
  float* weights;        // [kBlockRows][kScoreStride]: S, then P
  float* gradients;      // [kBlockRows][kScoreStride]: dP, then dS
  int32_t* segment_ids;  // [keys rounded up to vectors], if there are any
};

// What the rows of a block see of the chunk: the masks' loop bounds. Keys count from the chunk's first.
struct BlockRows {
  int num_rows = 0, num_tiles = 0;
  IntRange keys;                  // that any row sees
  bool needs_mask = false;        // some row does not see all keys of the chunk
  IntRange row_keys[kBlockRows];  // outside of these nothing is seen,
  bool has_ids[kBlockRows];       // and inside only keys with the row's id
  IntRange keys_of_tile[kMaxBlockTiles];
  IntRange rows_of_tile[kMaxChunkTiles];
  int32_t id[kBlockRows];
  float lse[kBlockRows];
  float delta[kBlockRows];
  float slope[kBlockRows];
  float diagonal[kBlockRows];   // key on the row's diagonal
  float slope_sum[kBlockRows];  // what the chunk adds
};

// ---------------------------------------------------------------------------------------------------------------------
// Masks.

// The keys of a chunk that carry an id, and whether only those lie between the first and the last of them.
struct IdKeys {
  IntRange keys;
  bool is_dense;
};

inline IdKeys keys_with_id(const Chunk& chunk, int32_t id) {
  IdKeys result{{0, 0}, true};
  int count = 0;
  for (int t = 0; t < chunk.num_keys; ++t) {
    if (!variants::same_segment(id, chunk.segment_ids[t])) continue;
    if (count++ == 0) result.keys.begin = t;
    result.keys.end = t + 1;
  }
  result.is_dense = count == result.keys.end - result.keys.begin;
  return result;
}

// Per tile of keys the rows that see any of them.
inline void find_rows_of_tiles(BlockRows& rows) {
  for (int i = rows.keys.begin / kTile; i < (rows.keys.end + kTile - 1) / kTile; ++i) rows.rows_of_tile[i] = {};
  for (int r = 0; r < rows.num_rows; ++r) {
    const IntRange keys = rows.row_keys[r];
    if (keys.empty()) continue;
    for (int i = keys.begin / kTile; i <= (keys.end - 1) / kTile; ++i) {
      if (rows.rows_of_tile[i].empty()) rows.rows_of_tile[i].begin = r;
      rows.rows_of_tile[i].end = r + 1;
    }
  }
}

HWY_NOINLINE void find_rows(const BackwardPlan& plan, const Head& head, const Chunk& chunk, const RowBlock& block,
                            BlockRows& rows) {
  const int64_t group = plan.forward.group;
  const auto* lse = static_cast<const float*>(head.lse.data);
  const auto* slopes = static_cast<const float*>(head.alibi_slopes.data);
  const auto* ids = static_cast<const int32_t*>(head.q_segment_ids.data);
  rows.num_rows = static_cast<int>(block.rows.end - block.rows.begin);
  rows.num_tiles = (rows.num_rows + kTile - 1) / kTile;
  rows.keys = {chunk.num_keys, 0};
  rows.needs_mask = false;
  for (int i = 0; i < rows.num_tiles; ++i) rows.keys_of_tile[i] = {chunk.num_keys, 0};
  IdKeys id_keys{};
  for (int r = 0; r < rows.num_rows; ++r) {
    const int64_t query = (block.rows.begin + r) / group;
    const int64_t in_group = (block.rows.begin + r) % group;
    rows.lse[r] = lse[in_group * head.lse.head + query * head.lse.token];
    rows.delta[r] = head.workspace.delta[block.rows.begin + r];
    rows.slope[r] = slopes == nullptr ? 0.0f : slopes[in_group * head.alibi_slopes.head];
    rows.diagonal[r] = static_cast<float>(query + head.band.offset - chunk.keys.begin);
    rows.slope_sum[r] = 0.0f;
    rows.has_ids[r] = false;
    const Range seen = intersect(head.band.keys_of_any({query, query + 1}), chunk.keys);
    IntRange& keys = rows.row_keys[r];
    keys = {};
    if (!seen.empty() && rows.lse[r] != -kInfinity) {
      keys = {static_cast<int>(seen.begin - chunk.keys.begin), static_cast<int>(seen.end - chunk.keys.begin)};
    }
    if (ids != nullptr) {
      rows.id[r] = ids[query * head.q_segment_ids.token];
      if (r == 0 || rows.id[r] != rows.id[r - 1]) id_keys = keys_with_id(chunk, rows.id[r]);
      keys = {std::max(keys.begin, id_keys.keys.begin), std::min(keys.end, id_keys.keys.end)};
      rows.has_ids[r] = !id_keys.is_dense;
    }
    const bool is_full = keys.begin == 0 && keys.end == chunk.num_keys && !rows.has_ids[r];
    rows.needs_mask = rows.needs_mask || !is_full;
    if (keys.empty()) {
      keys = {};
      continue;
    }
    IntRange& tile = rows.keys_of_tile[r / kTile];
    tile = {std::min(tile.begin, keys.begin), std::max(tile.end, keys.end)};
    rows.keys = {std::min(rows.keys.begin, keys.begin), std::max(rows.keys.end, keys.end)};
  }
  if (rows.keys.empty()) return;
  if (rows.needs_mask) {
    find_rows_of_tiles(rows);
  } else {
    std::fill_n(rows.rows_of_tile, (rows.keys.end + kTile - 1) / kTile, IntRange{0, rows.num_rows});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Scores -> weights and their gradients, keys along lanes.

// Keys [begin, end) of row r, of which `begin` starts a vector. On entry the products <q, k> and <dout, v>, on return P
// and dS (times the soft cap's derivative).
template <bool kIsMasked, bool kHasVariants>
HWY_INLINE void transform_row(const BackwardPlan& plan, const Chunk& chunk, BlockRows& rows, int r, int begin,
                              int end) {
  const DF d;
  const DI di;
  const VectorMath<DF> math{d};
  float* HWY_RESTRICT weights = chunk.weights + r * kScoreStride;
  float* HWY_RESTRICT gradients = chunk.gradients + r * kScoreStride;
  const bool has_softcap = plan.forward.has_softcap;
  const VF scale = hn::Set(d, plan.scale);
  const VF lse = hn::Set(d, rows.lse[r]);
  const VF delta = hn::Set(d, rows.delta[r]);
  const VF slope = hn::Set(d, rows.slope[r]);
  VF slope_sum = hn::Zero(d);
  for (int t = begin; t < end; t += kLanes) {
    const VF product = hn::LoadU(d, weights + t);
    VF shifted;  // score - lse
    VF distance = hn::Zero(d);
    VF tanh = hn::Zero(d);
    if constexpr (kHasVariants) {
      if (has_softcap) tanh = score::soft_cap_tanh(math, product, plan.scale_over_cap);
      VF s = has_softcap ? hn::Mul(hn::Set(d, plan.forward.softcap), tanh) : hn::Mul(product, scale);
      distance = hn::Sub(hn::Set(d, rows.diagonal[r] - static_cast<float>(t)), hn::Iota(d, 0.0f));
      shifted = hn::Sub(score::alibi_biased(math, s, slope, distance), lse);
    } else {
      shifted = hn::MulSub(product, scale, lse);
    }
    VF weight = exp_bounded(d, shifted);  // weights are 1 at most, so the bound is one of nonsense
    VF gradient = hn::Mul(weight, hn::Sub(hn::LoadU(d, gradients + t), delta));
    if constexpr (kIsMasked) {
      const auto key = hn::Iota(di, t);
      auto keep =
          hn::AndNot(hn::Lt(key, hn::Set(di, rows.row_keys[r].begin)), hn::Lt(key, hn::Set(di, rows.row_keys[r].end)));
      if (rows.has_ids[r]) {
        keep = hn::And(keep, hn::Eq(hn::LoadU(di, chunk.segment_ids + t), hn::Set(di, rows.id[r])));
      }
      weight = hn::IfThenElseZero(hn::RebindMask(d, keep), weight);
      gradient = hn::IfThenElseZero(hn::RebindMask(d, keep), gradient);
    }
    if constexpr (kHasVariants) {
      slope_sum = score::alibi_biased(math, slope_sum, gradient, distance);
      if (has_softcap) gradient = hn::Mul(gradient, score::soft_cap_derivative(math, tanh));
    }
    hn::StoreU(weight, d, weights + t);
    hn::StoreU(gradient, d, gradients + t);
  }
  if constexpr (kHasVariants) rows.slope_sum[r] = hn::GetLane(hn::SumOfLanes(d, slope_sum));
}

template <bool kHasVariants>
HWY_NOINLINE void transform_scores(const BackwardPlan& plan, const Chunk& chunk, BlockRows& rows) {
  // Products read whole tiles of keys, so what no row of a tile sees is 0 too.
  const int fill_begin = rows.keys.begin / kChunkStep * kChunkStep;
  const int fill_end = (rows.keys.end + kChunkStep - 1) / kChunkStep * kChunkStep;
  for (int r = 0; r < rows.num_tiles * kTile; ++r) {
    const IntRange keys = r < rows.num_rows ? rows.row_keys[r] : IntRange{};
    const int begin = keys.empty() ? fill_begin : keys.begin / kLanes * kLanes;
    const int end = keys.empty() ? fill_begin : (keys.end + kLanes - 1) / kLanes * kLanes;
    for (float* row : {chunk.weights + r * kScoreStride, chunk.gradients + r * kScoreStride}) {
      std::fill(row + fill_begin, row + begin, 0.0f);
      std::fill(row + end, row + fill_end, 0.0f);
    }
    if (keys.empty()) continue;
    if (rows.has_ids[r] || keys.begin != begin || keys.end != end) {
      transform_row<true, kHasVariants>(plan, chunk, rows, r, begin, end);
    } else {
      transform_row<false, kHasVariants>(plan, chunk, rows, r, begin, end);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The last three products.

// to [count] += weight * from [count]
HWY_INLINE void add_row(float weight, const float* HWY_RESTRICT from, int count, float* HWY_RESTRICT to) {
  for (int x = 0; x < count; ++x) to[x] += weight * from[x];
}

// The three products over kept (query, key) pairs only: where an operand holds inf or NaN, a weight of 0 is not enough
// to keep a masked pair out. Slow, and only ever runs in blocks that are both masked and not finite.
HWY_NOINLINE void multiply_kept_pairs(const BackwardPlan& plan, const Chunk& chunk, const BlockRows& rows) {
  for (int r = 0; r < rows.num_rows; ++r) {
    float* dq = chunk.dq + r * kRowStride;
    std::fill_n(dq, plan.forward.head_dim_qk, 0.0f);
    for (int t = rows.row_keys[r].begin; t < rows.row_keys[r].end; ++t) {
      if (rows.has_ids[r] && !variants::same_segment(rows.id[r], chunk.segment_ids[t])) continue;
      const float weight = chunk.weights[r * kScoreStride + t];
      const float gradient = chunk.gradients[r * kScoreStride + t];
      add_row(weight, chunk.dout + r * kRowStride, plan.forward.head_dim_v, chunk.dv + t * kRowStride);
      add_row(gradient, chunk.q + r * kRowStride, plan.forward.head_dim_qk, chunk.dk + t * kRowStride);
      add_row(gradient, chunk.k + t * kRowStride, plan.forward.head_dim_qk, dq);
    }
  }
}

inline void multiply_weights(const BackwardPlan& plan, const Chunk& chunk, const BlockRows& rows) {
  const int head_dim_qk = plan.forward.head_dim_qk;
  const int head_dim_v = plan.forward.head_dim_v;
  if (rows.needs_mask && !(chunk.is_k_finite && is_finite(chunk.q, kRowStride, rows.num_rows, head_dim_qk) &&
                           is_finite(chunk.dout, kRowStride, rows.num_rows, head_dim_v))) {
    return multiply_kept_pairs(plan, chunk, rows);
  }
  const IntRange tiles = {rows.keys.begin / kTile, (rows.keys.end + kTile - 1) / kTile};
  add_to_keys(chunk.weights, chunk.dout, head_dim_v, rows.rows_of_tile, tiles, chunk.dv);
  add_to_keys(chunk.gradients, chunk.q, head_dim_qk, rows.rows_of_tile, tiles, chunk.dk);
  set_rows(chunk.gradients, chunk.k, chunk.num_keys, head_dim_qk, rows.keys_of_tile, rows.num_tiles, chunk.dq);
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing.

// Columns up to the next vector are 0.
template <class Storage>
HWY_INLINE void load_padded_row(const typename Storage::Stored* HWY_RESTRICT row, int64_t stride, int head_dim,
                                float* HWY_RESTRICT packed) {
  load_row<Storage>(row, stride, head_dim, packed);
  std::fill(packed + head_dim, packed + vectors_of(head_dim) * kLanes, 0.0f);
}

HWY_INLINE void clear_rows(float* rows, int begin, int end, int head_dim) {
  for (int r = begin; r < end; ++r) std::fill_n(rows + r * kRowStride, vectors_of(head_dim) * kLanes, 0.0f);
}

// Keys [keys) of K or V -> `rows` [..][kRowStride] and its transposed `panels`.
template <class Storage>
HWY_NOINLINE void pack_keys(const Operand& operand, Range keys, int head_dim, float* HWY_RESTRICT rows,
                            float* HWY_RESTRICT panels) {
  const auto* data = static_cast<const typename Storage::Stored*>(operand.data);
  const int num_keys = static_cast<int>(keys.end - keys.begin);
  for (int t = 0; t < num_keys; ++t) {
    load_padded_row<Storage>(data + (keys.begin + t) * operand.token, operand.dim, head_dim, rows + t * kRowStride);
  }
  clear_rows(rows, num_keys, vectors_of(num_keys) * kLanes, head_dim);
  for_column_tiles(vectors_of(num_keys), [&](int first, auto vecs) HWY_ATTR {
    constexpr int kWidth = vecs() * kLanes;
    transpose(rows + first * kLanes * kRowStride, kRowStride, kWidth, head_dim, panels + first * kLanes * head_dim,
              kWidth);
  });
}

// A row that sees no key of the chunk counts as 0, whatever it holds.
template <class Storage>
HWY_NOINLINE void pack_rows(const Operand& operand, const RowBlock& block, int64_t group, const BlockRows& rows,
                            int head_dim, float* HWY_RESTRICT packed) {
  const auto* data = static_cast<const typename Storage::Stored*>(operand.data);
  for (int r = 0; r < rows.num_rows; ++r) {
    const int64_t row = block.rows.begin + r;
    if (rows.row_keys[r].empty()) {
      clear_rows(packed, r, r + 1, head_dim);
    } else {
      load_padded_row<Storage>(data + row / group * operand.token + row % group * operand.head, operand.dim, head_dim,
                               packed + r * kRowStride);
    }
  }
  clear_rows(packed, rows.num_rows, rows.num_tiles * kTile, head_dim);
}

template <class Storage>
HWY_INLINE void store_scaled(const float* HWY_RESTRICT from, float scale, int count,
                             typename Storage::Stored* HWY_RESTRICT row, int64_t stride) {
  store_row<Storage>(from, count, row, stride, [=](auto d, auto x) HWY_ATTR { return hn::Mul(x, hn::Set(d, scale)); });
}

template <class Storage>
HWY_NOINLINE void store_keys(const Operand& operand, Range keys, int head_dim, float scale, const float* rows) {
  auto* data = static_cast<typename Storage::Stored*>(operand.data);
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    store_scaled<Storage>(rows, scale, head_dim, data + key * operand.token, operand.dim);
    rows += kRowStride;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// dQ: the sum over the chunks, in their order.

// Waits until the chunks before this one have added to the row block. Those started earlier, on threads that are
// running, so they end; unless one failed, and then this returns false.
inline bool wait_for_turn(std::atomic_ref<int32_t> next, int64_t chunk, const std::atomic<bool>& has_failed) {
  constexpr int kSpins = 1000;
  for (int spins = 0; next.load(std::memory_order_acquire) != static_cast<int32_t>(chunk); ++spins) {
    if (has_failed.load(std::memory_order_relaxed)) return false;
    if (spins < kSpins) {
      hwy::Pause();
    } else {
      std::this_thread::yield();
    }
  }
  return true;
}

template <class Storage>
HWY_NOINLINE void finish_rows(const BackwardPlan& plan, const Head& head, const Chunk& chunk, const RowBlock& block,
                              const BlockRows& rows, const std::atomic<bool>& has_failed) {
  const int head_dim = plan.forward.head_dim_qk;
  const int64_t group = plan.forward.group;
  const bool is_first = chunk.index == block.chunks.begin;
  const bool is_last = chunk.index + 1 == block.chunks.end;
  int32_t* turn = is_first && is_last ? nullptr : head.workspace.next_chunk + block.rows.begin;
  if (!is_first && !wait_for_turn(std::atomic_ref<int32_t>(*turn), chunk.index, has_failed)) return;
  auto* dq = static_cast<typename Storage::Stored*>(head.dq.data);
  for (int r = 0; r < rows.num_rows; ++r) {
    const int64_t row = block.rows.begin + r;
    float* added = chunk.dq + r * kRowStride;
    float* sum = is_first && is_last ? added : head.workspace.dq + row * head_dim;
    if (!is_first) {
      for (int x = 0; x < head_dim; ++x) sum[x] += added[x];
    } else if (!is_last) {
      std::copy_n(added, head_dim, sum);
    }
    if (is_last) {
      store_scaled<Storage>(sum, plan.scale, head_dim, dq + row / group * head.dq.token + row % group * head.dq.head,
                            head.dq.dim);
    }
    if (head.workspace.slope != nullptr) {
      head.workspace.slope[row] = rows.slope_sum[r] + (is_first ? 0.0f : head.workspace.slope[row]);
    }
  }
  if (!is_last) {
    std::atomic_ref<int32_t>(*turn).store(static_cast<int32_t>(chunk.index + 1), std::memory_order_release);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Work items.

template <class Stored>
Head locate(const BackwardPlan& plan, const BackwardItem& item) {
  const ForwardPlan& forward = plan.forward;
  const Sequence& sequence = item.part->sequence;
  const ProblemIndex index = split_problem(forward, item.problem);
  const auto at = [&](Operand operand, int64_t head, int64_t token, auto type) {
    advance<decltype(type)>(operand, offset_of(forward, operand, index) + head * operand.head + token * operand.token);
    return operand;
  };
  const int64_t q_head = item.kv_head * forward.group;
  const int64_t query = sequence.queries.begin;
  const int64_t key = sequence.keys.begin;
  Head head;
  head.q = at(forward.q, q_head, query, Stored());
  head.k = at(forward.k, item.kv_head, key, Stored());
  head.v = at(forward.v, item.kv_head, key, Stored());
  head.out = at(forward.out, q_head, query, Stored());
  head.dout = at(plan.dout, q_head, query, Stored());
  head.dq = at(plan.dq, q_head, query, Stored());
  head.dk = at(plan.dk, item.kv_head, key, Stored());
  head.dv = at(plan.dv, item.kv_head, key, Stored());
  head.lse = at(forward.lse, q_head, query, float());
  head.dlse = at(plan.dlse, q_head, query, float());
  head.alibi_slopes = at(forward.alibi_slopes, q_head, 0, float());
  head.q_segment_ids = at(forward.q_segment_ids, 0, query, int32_t());
  head.kv_segment_ids = at(forward.kv_segment_ids, 0, key, int32_t());
  head.band = forward.band(item.part->q_len(), item.part->kv_len());
  head.workspace = head_workspace(plan, item.problem, item.kv_head);
  const int64_t row = query * forward.group;
  head.workspace.delta += row;
  if (head.workspace.slope != nullptr) head.workspace.slope += row;
  if (plan.has_chunks) {
    head.workspace.next_chunk += row;
    head.workspace.dq += row * forward.head_dim_qk;
  }
  return head;
}

// Cuts this thread's scratch into the chunk's buffers, each on a cache line.
inline size_t carve_scratch(const BackwardPlan& plan, char* base, Chunk* chunk) {
  size_t used = 0;
  const auto take = [&](int64_t count) {
    void* at = base == nullptr ? nullptr : base + used;
    used += (static_cast<size_t>(count) * sizeof(float) + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
    return at;
  };
  const auto floats = [&](int64_t count) { return static_cast<float*>(take(count)); };
  const int64_t keys = plan.max_chunk_keys;
  Chunk unused;
  if (chunk == nullptr) chunk = &unused;
  chunk->k = floats(keys * kRowStride);
  chunk->k_panels = floats(keys * plan.forward.head_dim_qk);
  chunk->v_panels = floats(keys * plan.forward.head_dim_v);
  chunk->dk = floats(keys * kRowStride);
  chunk->dv = floats(keys * kRowStride);
  chunk->q = floats(int64_t{kBlockRows} * kRowStride);
  chunk->dout = floats(int64_t{kBlockRows} * kRowStride);
  chunk->dq = floats(int64_t{kBlockRows} * kRowStride);
  chunk->weights = floats(int64_t{kBlockRows} * kScoreStride);
  chunk->gradients = floats(int64_t{kBlockRows} * kScoreStride);
  chunk->segment_ids = static_cast<int32_t*>(take(keys));
  return used;
}

template <class Storage>
void pack_chunk(const BackwardPlan& plan, const Head& head, Chunk& chunk) {
  const int head_dim_qk = plan.forward.head_dim_qk;
  const int head_dim_v = plan.forward.head_dim_v;
  pack_keys<Storage>(head.v, chunk.keys, head_dim_v, chunk.dv, chunk.v_panels);  // dv: free until it is cleared
  pack_keys<Storage>(head.k, chunk.keys, head_dim_qk, chunk.k, chunk.k_panels);
  chunk.is_k_finite = is_finite(chunk.k, kRowStride, chunk.num_keys, head_dim_qk);
  const int padded_keys = (chunk.num_keys + kTile - 1) / kTile * kTile;
  clear_rows(chunk.dk, 0, padded_keys, head_dim_qk);
  clear_rows(chunk.dv, 0, padded_keys, head_dim_v);
  if (const auto* ids = static_cast<const int32_t*>(head.kv_segment_ids.data); ids != nullptr) {
    for (int t = 0; t < chunk.num_keys; ++t) {
      chunk.segment_ids[t] = ids[(chunk.keys.begin + t) * head.kv_segment_ids.token];
    }
  }
}

template <class Stored>
RowPrefetcher prefetch_rows(const BackwardPlan& plan, const Head& head, const Chunk& chunk, Range rows, int num_tiles) {
  const auto of = [](const Operand& operand, int head_dim) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(Stored));
    return RowPrefetcher::Rows{static_cast<const char*>(operand.data), operand.token * kBytes, operand.head * kBytes,
                               operand.dim == 1 ? head_dim * kBytes : 0};
  };
  const int num_panels = (vectors_of(chunk.num_keys) + kVectors - 1) / kVectors;
  return {of(head.q, plan.forward.head_dim_qk), of(head.dout, plan.forward.head_dim_v), plan.forward.group, rows,
          2 * num_panels * num_tiles};
}

template <class Storage>
void run_block(const BackwardPlan& plan, const Head& head, const Chunk& chunk, const RowBlock& block, Range next_rows,
               const std::atomic<bool>& has_failed) {
  const int head_dim_qk = plan.forward.head_dim_qk;
  const int head_dim_v = plan.forward.head_dim_v;
  BlockRows rows;
  find_rows(plan, head, chunk, block, rows);
  if (rows.keys.empty()) {  // all masked by segments
    clear_rows(chunk.dq, 0, rows.num_rows, head_dim_qk);
  } else {
    pack_rows<Storage>(head.q, block, plan.forward.group, rows, head_dim_qk, chunk.q);
    pack_rows<Storage>(head.dout, block, plan.forward.group, rows, head_dim_v, chunk.dout);
    RowPrefetcher prefetcher = prefetch_rows<typename Storage::Stored>(plan, head, chunk, next_rows, rows.num_tiles);
    multiply_scores(chunk.q, chunk.k_panels, head_dim_qk, chunk.num_keys, rows.keys_of_tile, rows.num_tiles, prefetcher,
                    chunk.weights);
    multiply_scores(chunk.dout, chunk.v_panels, head_dim_v, chunk.num_keys, rows.keys_of_tile, rows.num_tiles,
                    prefetcher, chunk.gradients);
    if (plan.forward.has_softcap || head.alibi_slopes.data != nullptr) {
      transform_scores<true>(plan, chunk, rows);
    } else {
      transform_scores<false>(plan, chunk, rows);
    }
    multiply_weights(plan, chunk, rows);
  }
  finish_rows<Storage>(plan, head, chunk, block, rows, has_failed);
}

template <class Storage>
void run_chunk(const BackwardPlan& plan, const BackwardSchedule& schedule, int64_t index,
               const std::atomic<bool>& has_failed) {
  const BackwardItem item = schedule.chunk_item(index);
  const Head head = locate<typename Storage::Stored>(plan, item);
  Chunk chunk;
  const size_t scratch_bytes = carve_scratch(plan, nullptr, nullptr);
  carve_scratch(plan, static_cast<char*>(thread_scratch(scratch_bytes)), &chunk);
  chunk.index = item.index;
  chunk.keys = schedule.chunk_keys(*item.part, item.index);
  chunk.num_keys = static_cast<int>(chunk.keys.end - chunk.keys.begin);
  pack_chunk<Storage>(plan, head, chunk);
  // Last rows first: with causal masks and windows each chunk then starts on rows that those before it have done, or
  // do not see.
  const Range blocks = schedule.blocks_of_chunk(*item.part, item.index);
  for (int64_t b = blocks.end - 1; b >= blocks.begin; --b) {
    const RowBlock block = schedule.row_block(*item.part, b);
    if (block.chunks.begin > item.index || block.chunks.end <= item.index) continue;
    const Range next_rows = b > blocks.begin ? schedule.row_block(*item.part, b - 1).rows : Range{0, 0};
    run_block<Storage>(plan, head, chunk, block, next_rows, has_failed);
  }
  store_keys<Storage>(head.dk, chunk.keys, plan.forward.head_dim_qk, plan.scale, chunk.dk);
  store_keys<Storage>(head.dv, chunk.keys, plan.forward.head_dim_v, 1.0f, chunk.dv);
}

// <dout, out>, summed exactly as the score tiles sum <dout, v>: a row that sees one key only has out = v, and the
// difference of both products is then exactly 0. `dout`, `out`: [kMaxHeadDim], 0 from head_dim to the next run.
HWY_INLINE float delta_product(const float* HWY_RESTRICT dout, const float* HWY_RESTRICT out, int head_dim) {
  const hn::CappedTag<float, 1> d;
  hn::Vec<decltype(d)> runs[kMaxHeadDim / kDotRun];
  const int num_runs = (head_dim + kDotRun - 1) / kDotRun;
  for (int run = 0; run < num_runs; ++run) runs[run] = hn::Zero(d);
  for (int i = 0; i < kDotRun; ++i) {  // runs side by side: none waits for another
    for (int run = 0; run < num_runs; ++run) {
      const int x = run * kDotRun + i;
      runs[run] = hn::MulAdd(hn::LoadU(d, dout + x), hn::LoadU(d, out + x), runs[run]);
    }
  }
  for (int run = 1; run < num_runs; ++run) runs[0] = hn::Add(runs[0], runs[run]);
  return hn::GetLane(runs[0]);
}

// What comes before the chunks: delta of each row, and the gradients of rows that see no key.
template <class Storage>
void prepare_block(const BackwardPlan& plan, const BackwardSchedule& schedule, int64_t index) {
  using Stored = typename Storage::Stored;
  const BackwardItem item = schedule.block_item(index);
  const Head head = locate<Stored>(plan, item);
  const RowBlock block = schedule.row_block(*item.part, item.index);
  const int64_t group = plan.forward.group;
  const auto* lse = static_cast<const float*>(head.lse.data);
  const auto* dlse = static_cast<const float*>(head.dlse.data);
  const bool is_masked = block.chunks.empty();
  HWY_ALIGN float out_row[kMaxHeadDim] = {};
  HWY_ALIGN float dout_row[kMaxHeadDim] = {};
  const float zeros[kMaxHeadDim] = {};
  for (int64_t row = block.rows.begin; row < block.rows.end; ++row) {
    const int64_t query = row / group;
    const int64_t in_group = row % group;
    float delta = 0.0f;
    if (!item.part->sequence.is_outside && lse[in_group * head.lse.head + query * head.lse.token] != -kInfinity) {
      load_row<Storage>(static_cast<const Stored*>(head.out.data) + query * head.out.token + in_group * head.out.head,
                        head.out.dim, plan.forward.head_dim_v, out_row);
      load_row<Storage>(
          static_cast<const Stored*>(head.dout.data) + query * head.dout.token + in_group * head.dout.head,
          head.dout.dim, plan.forward.head_dim_v, dout_row);
      delta = delta_product(dout_row, out_row, plan.forward.head_dim_v);
      if (dlse != nullptr) delta -= dlse[in_group * head.dlse.head + query * head.dlse.token];
    }
    head.workspace.delta[row] = delta;
    if (!is_masked) continue;
    store_scaled<Storage>(zeros, 1.0f, plan.forward.head_dim_qk,
                          static_cast<Stored*>(head.dq.data) + query * head.dq.token + in_group * head.dq.head,
                          head.dq.dim);
    if (head.workspace.slope != nullptr) head.workspace.slope[row] = 0.0f;
  }
  if (plan.has_chunks) head.workspace.next_chunk[block.rows.begin] = static_cast<int32_t>(block.chunks.begin);
}

template <class Storage>
void clear_gap(const BackwardPlan& plan, const KeyGap& gap, int64_t kv_head) {
  BackwardPart part;
  part.sequence.keys = gap.keys;
  const Head head = locate<typename Storage::Stored>(plan, {&part, gap.problem, kv_head, 0});
  const float zeros[kMaxHeadDim] = {};
  for (int64_t key = 0; key < part.kv_len(); ++key) {
    store_keys<Storage>(head.dk, {key, key + 1}, plan.forward.head_dim_qk, 1.0f, zeros);
    store_keys<Storage>(head.dv, {key, key + 1}, plan.forward.head_dim_v, 1.0f, zeros);
  }
}

template <class Storage>
void prepare(const BackwardPlan& plan, const BackwardSchedule& schedule, int64_t index) {
  if (index < schedule.num_block_items()) return prepare_block<Storage>(plan, schedule, index);
  index -= schedule.num_block_items();
  const int64_t num_heads = plan.forward.num_kv_heads;
  clear_gap<Storage>(plan, schedule.key_gaps()[static_cast<size_t>(index / num_heads)], index % num_heads);
}

// What comes after the chunks: the gradients of one query head's sink and slope.
inline void sum_head(const BackwardPlan& plan, int64_t index) {
  const ForwardPlan& forward = plan.forward;
  const int64_t num_q_heads = forward.num_kv_heads * forward.group;
  const int64_t problem = index / num_q_heads;
  const int64_t q_head = index % num_q_heads;
  const int64_t in_group = q_head % forward.group;
  const ProblemIndex at = split_problem(forward, problem);
  const HeadWorkspace workspace = head_workspace(plan, problem, q_head / forward.group);
  const auto element = [&](const Operand& operand, int64_t token) -> float& {
    return static_cast<float*>(
        operand.data)[offset_of(forward, operand, at) + q_head * operand.head + token * operand.token];
  };
  double sink_sum = 0.0;
  double slope_sum = 0.0;
  for (int64_t query = 0; query < forward.q_len; ++query) {
    const int64_t row = query * forward.group + in_group;
    if (workspace.slope != nullptr) slope_sum += workspace.slope[row];
    if (forward.sinks.data == nullptr || workspace.delta[row] == 0.0f) continue;
    sink_sum -=
        std::exp(static_cast<double>(element(forward.sinks, 0)) - element(forward.lse, query)) * workspace.delta[row];
  }
  if (plan.dsinks.data != nullptr) element(plan.dsinks, 0) = static_cast<float>(sink_sum);
  if (plan.dalibi_slopes.data != nullptr) element(plan.dalibi_slopes, 0) = static_cast<float>(slope_sum);
}

template <class Storage>
void run(const BackwardPlan& plan) {
  const BackwardSchedule schedule(plan);
  // Below some 20 us of work, waking other threads costs more than it gains.
  const bool is_small = schedule.num_products() < 1e6;
  const auto num_gaps = static_cast<int64_t>(schedule.key_gaps().size()) * plan.forward.num_kv_heads;
  parallel_for(schedule.num_block_items() + num_gaps, is_small,
               [&](int64_t index) { prepare<Storage>(plan, schedule, index); });
  std::atomic<bool> has_failed{false};
  parallel_for(schedule.num_chunk_items(), is_small, [&](int64_t index) {
    try {
      run_chunk<Storage>(plan, schedule, index, has_failed);
    } catch (...) {
      has_failed.store(true, std::memory_order_relaxed);
      throw;
    }
  });
  if (plan.dsinks.data == nullptr && plan.dalibi_slopes.data == nullptr) return;
  parallel_for(plan.forward.num_problems * plan.forward.num_kv_heads * plan.forward.group, is_small,
               [&](int64_t index) { sum_head(plan, index); });
}

}  // namespace

void attention_bwd_run(const BackwardPlan& plan) {
  switch (plan.forward.dtype) {
    case DType::kFloat32:
      return run<Float32>(plan);
    case DType::kFloat16:
      return run<Float16>(plan);
    case DType::kBFloat16:
      return run<BFloat16>(plan);
    case DType::kInt32:
      return;  // validated away
  }
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ATTENTION_BWD_INL_H_
