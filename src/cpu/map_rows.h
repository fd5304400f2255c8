// What the loop over elements (map_rows-inl.h) is told, whatever the instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu/row_memory.h"
#include "cpu/row_walk.h"

namespace heed::cpu {

// Columns of rows: of a whole tensor, or of a part of its last axis.
struct MapSlot {
  void* data = nullptr;  // the first element of the first row
  int64_t stride = 1;    // between elements of a row
};

// Inputs first, then outputs; all have `num_columns` columns.
template <size_t kIn, size_t kOut>
struct MapPlan {
  using Walk = RowWalk<kIn + kOut>;
  Walk walk;
  std::array<MapSlot, kIn + kOut> slots;
  int64_t num_columns;
  int64_t bytes_per_column;  // of all slots together
  bool is_streaming;         // results go past the caches

  MapPlan(const Walk& rows, const std::array<MapSlot, kIn + kOut>& parts, int64_t columns, int64_t size_bytes)
      : walk(rows),
        slots(parts),
        num_columns(columns),
        bytes_per_column(size_bytes * (kIn + kOut)),
        is_streaming(false) {
    is_streaming = num_bytes() >= kStreamingBytes;
  }

  int64_t num_bytes() const { return walk.num_rows() * num_columns * bytes_per_column; }
  bool has_adjacent_elements() const {
    return std::all_of(slots.begin(), slots.end(), [](const MapSlot& slot) { return slot.stride == 1; });
  }
  template <class Stored>
  Stored* at(size_t slot, const typename Walk::Offsets& offsets, int64_t column) const {
    return static_cast<Stored*>(slots[slot].data) + offsets[slot] + column * slots[slot].stride;
  }
};

// Rows shorter than this are gathered into longer pieces first.
inline constexpr int64_t kMinColumnsInPlace = 64;

struct MapItem {
  int64_t first_row, num_rows, first_column, num_columns;
};

// Cuts rows and columns into items.
class MapItems {
 public:
  MapItems(int64_t num_rows, int64_t num_columns, int64_t bytes_per_column, bool is_in_place)
      : num_rows_(num_rows), num_columns_(num_columns) {
    if (num_rows == 0 || num_columns == 0) return;
    columns_ = std::min(num_columns, is_in_place ? std::max(kChunk, kItemBytes / bytes_per_column) : kChunk);
    rows_ = std::max<int64_t>(1, kItemBytes / bytes_per_column / columns_);
    blocks_per_row_ = (num_columns + columns_ - 1) / columns_;
    count_ = blocks_per_row_ * ((num_rows + rows_ - 1) / rows_);
  }
  int64_t count() const { return count_; }
  MapItem at(int64_t index) const {
    const int64_t row = index / blocks_per_row_ * rows_;
    const int64_t column = index % blocks_per_row_ * columns_;
    return {row, std::min(rows_, num_rows_ - row), column, std::min(columns_, num_columns_ - column)};
  }

 private:
  int64_t num_rows_, num_columns_;
  int64_t rows_ = 1, columns_ = 1, blocks_per_row_ = 1, count_ = 0;
};

}  // namespace heed::cpu
