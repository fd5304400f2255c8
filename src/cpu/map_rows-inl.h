// Element by element from some tensors to others: the loop around an operation that only sees vectors of floats.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_MAP_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_MAP_ROWS_INL_H_
#undef HEED_CPU_MAP_ROWS_INL_H_
#else
#define HEED_CPU_MAP_ROWS_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/map_rows.h"
#include "cpu/parallel.h"
#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// `count` adjacent elements of every slot: Op::apply(d, in, out) turns kIn vectors of floats into kOut.
template <class Storage, class Op, size_t kIn, size_t kOut, class Stored = typename Storage::Stored>
HWY_NOINLINE void map_piece(const std::array<const Stored*, kIn>& in, const std::array<Stored*, kOut>& out,
                            int64_t count) {
  for_vector_pairs(hn::ScalableTag<float>(), static_cast<size_t>(count), [&](auto d, size_t x, auto n) HWY_ATTR {
    using V = hn::Vec<decltype(d)>;
    V results[kOut][n.value];
    if constexpr (n.value == 2) {
      constexpr size_t kBytes = 2 * hn::MaxLanes(decltype(d)()) * sizeof(Stored);
      HEED_UNROLL for (size_t i = 0; i < kIn; ++i) prefetch_ahead<kBytes>(in[i] + x);
    }
    HEED_UNROLL for (int j = 0; j < n.value; ++j) {
      V inputs[kIn];
      V outputs[kOut];
      HEED_UNROLL for (size_t i = 0; i < kIn; ++i) inputs[i] = Storage::load(d, in[i] + x + j * hn::Lanes(d));
      Op::apply(d, inputs, outputs);
      HEED_UNROLL for (size_t i = 0; i < kOut; ++i) results[i][j] = outputs[i];
    }
    HEED_UNROLL for (size_t i = 0; i < kOut; ++i) store_group<Storage>(results[i], d, out[i] + x);
  });
}

// Rows that lie as the loop wants them, and are long enough for it.
template <class Storage, class Op, size_t kIn, size_t kOut>
void map_in_place(const MapPlan<kIn, kOut>& plan, const MapItem& item) {
  using Stored = typename Storage::Stored;
  Stored buffers[kOut][kStreamedColumns];
  const RowWriter<Stored> writers[] = {RowWriter<Stored>(1, plan.is_streaming, buffers[0]),
                                       RowWriter<Stored>(1, plan.is_streaming, buffers[kOut - 1])};
  static_assert(kOut <= 2);
  const int64_t piece = plan.is_streaming ? kStreamedColumns : item.num_columns;
  typename MapPlan<kIn, kOut>::Walk::Cursor cursor(plan.walk, item.first_row);
  for (int64_t row = 0; row < item.num_rows; ++row, cursor.next()) {
    for (int64_t x = 0; x < item.num_columns; x += piece) {
      const int64_t count = std::min(piece, item.num_columns - x);
      std::array<const Stored*, kIn> in;
      std::array<Stored*, kOut> rows;
      std::array<Stored*, kOut> out;
      for (size_t i = 0; i < kIn; ++i) in[i] = plan.template at<Stored>(i, cursor.offsets(), item.first_column + x);
      for (size_t i = 0; i < kOut; ++i) {
        rows[i] = plan.template at<Stored>(kIn + i, cursor.offsets(), item.first_column + x);
        out[i] = writers[i].begin(rows[i]);
      }
      map_piece<Storage, Op, kIn, kOut>(in, out, count);
      for (size_t i = 0; i < kOut; ++i) writers[i].end(rows[i], count);
    }
  }
  if (plan.is_streaming) hwy::FlushStream();
}

// Short rows, several at a time, and rows whose elements are not adjacent: through buffers.
template <class Storage, class Op, size_t kIn, size_t kOut>
void map_through_buffers(const MapPlan<kIn, kOut>& plan, const MapItem& item) {
  using Stored = typename Storage::Stored;
  using Cursor = typename MapPlan<kIn, kOut>::Walk::Cursor;
  Stored buffers[kIn + kOut][kChunk];
  std::array<const Stored*, kIn> in;
  std::array<Stored*, kOut> out;
  for (size_t i = 0; i < kIn; ++i) in[i] = buffers[i];
  for (size_t i = 0; i < kOut; ++i) out[i] = buffers[kIn + i];
  Cursor reading(plan.walk, item.first_row);
  Cursor writing = reading;
  const int64_t columns = item.num_columns;
  const int64_t batch = kChunk / columns;
  for (int64_t row = 0; row < item.num_rows; row += batch) {
    const int64_t num_rows = std::min(batch, item.num_rows - row);
    for (int64_t r = 0; r < num_rows; ++r, reading.next()) {
      for (size_t i = 0; i < kIn; ++i) {
        const Stored* from = plan.template at<Stored>(i, reading.offsets(), item.first_column);
        for (int64_t x = 0; x < columns; ++x) buffers[i][r * columns + x] = from[x * plan.slots[i].stride];
      }
    }
    map_piece<Storage, Op, kIn, kOut>(in, out, num_rows * columns);
    for (int64_t r = 0; r < num_rows; ++r, writing.next()) {
      for (size_t i = kIn; i < kIn + kOut; ++i) {
        Stored* to = plan.template at<Stored>(i, writing.offsets(), item.first_column);
        for (int64_t x = 0; x < columns; ++x) to[x * plan.slots[i].stride] = buffers[i][r * columns + x];
      }
    }
  }
}

template <class Storage, class Op, size_t kIn, size_t kOut>
void map_rows(const MapPlan<kIn, kOut>& plan) {
  const bool is_in_place = plan.has_adjacent_elements() && plan.num_columns >= kMinColumnsInPlace;
  const MapItems items(plan.walk.num_rows(), plan.num_columns, plan.bytes_per_column, is_in_place);
  const int threads = num_threads();
  parallel_for(items.count(), plan.num_bytes() < kSmallBytes, [&](int64_t index) {
    const MapItem item = items.at(spread_item(index, items.count(), threads));
    if (is_in_place) {
      map_in_place<Storage, Op>(plan, item);
    } else {
      map_through_buffers<Storage, Op>(plan, item);
    }
  });
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_MAP_ROWS_INL_H_
