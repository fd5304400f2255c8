// Rows (everything along the last axis) of several tensors that are walked side by side, whatever their strides.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "heed/heed.h"

namespace heed::cpu {

// Strides, in elements, of the axes that the tensors share; 0 where one broadcasts or lacks the axis.
using RowStrides = std::array<int64_t, kMaxRank>;

// Those of a view's first `num_axes` axes. An axis of size 1 never moves.
inline RowStrides row_strides(const TensorView& view, size_t num_axes) {
  RowStrides strides{};
  if (!view.defined()) return strides;
  for (size_t axis = 0; axis < num_axes; ++axis) strides[axis] = view.shape[axis] == 1 ? 0 : view.strides[axis];
  return strides;
}

// Elements between neighbours along the view's last axis.
inline int64_t last_stride(const TensorView& view) { return view.defined() ? view.strides[view.rank - 1] : 1; }

// Visits rows in row-major order. Axes that all tensors step through evenly are one axis.
template <size_t kNumTensors>
class RowWalk {
 public:
  using Offsets = std::array<int64_t, kNumTensors>;  // of each tensor's row from its first one, in elements

  // `sizes`: full sizes of the shared axes.
  RowWalk(const std::vector<int64_t>& sizes, const std::array<RowStrides, kNumTensors>& strides) {
    for (size_t axis = 0; axis < sizes.size(); ++axis) {
      num_rows_ *= sizes[axis];
      if (sizes[axis] == 1) continue;
      Axis next;
      next.size = sizes[axis];
      for (size_t i = 0; i < kNumTensors; ++i) next.strides[i] = strides[i][axis];
      if (num_axes_ > 0 && continues(axes_[num_axes_ - 1], next)) {
        next.size *= axes_[num_axes_ - 1].size;
        axes_[num_axes_ - 1] = next;
      } else {
        axes_[num_axes_++] = next;
      }
    }
  }

  int64_t num_rows() const { return num_rows_; }

  class Cursor {
   public:
    Cursor(const RowWalk& walk, int64_t row) : walk_(walk) {
      for (int axis = walk.num_axes_ - 1; axis >= 0; --axis) {
        index_[axis] = row % walk.axes_[axis].size;
        row /= walk.axes_[axis].size;
        for (size_t i = 0; i < kNumTensors; ++i) offsets_[i] += index_[axis] * walk.axes_[axis].strides[i];
      }
    }
    const Offsets& offsets() const { return offsets_; }
    void next() {
      for (int axis = walk_.num_axes_ - 1; axis >= 0; --axis) {
        const Axis& along = walk_.axes_[axis];
        const bool is_at_end = ++index_[axis] == along.size;
        const int64_t steps = is_at_end ? 1 - along.size : 1;
        for (size_t i = 0; i < kNumTensors; ++i) offsets_[i] += steps * along.strides[i];
        if (!is_at_end) return;
        index_[axis] = 0;
      }
    }

   private:
    const RowWalk& walk_;
    std::array<int64_t, kMaxRank> index_{};
    Offsets offsets_{};
  };

 private:
  struct Axis {
    int64_t size = 1;
    Offsets strides{};
  };

  static bool continues(const Axis& outer, const Axis& inner) {
    for (size_t i = 0; i < kNumTensors; ++i) {
      if (outer.strides[i] != inner.strides[i] * inner.size) return false;
    }
    return true;
  }

  int64_t num_rows_ = 1;
  int num_axes_ = 0;
  std::array<Axis, kMaxRank> axes_{};
};

}  // namespace heed::cpu
