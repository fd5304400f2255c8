// What the host sides of the kernels of elementwise and row-wise ops have in common.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <string>

#include "core/dtype.h"
#include "core/target.h"
#include "cuda/attention_host.h"
#include "cuda/jit/jit.h"
#include "cuda/row_spec.h"
#include "heed/heed.h"

namespace heed::cuda {

inline constexpr int64_t kMaxGridBlocks = std::numeric_limits<int32_t>::max();

// Why no GPU kernel serves the target; empty if one may.
inline std::string gpu_declines(const Target& target) {
  if (!target.is_cpu && (target.sm == 0 || target.sm >= 80)) return "";
  return "needs an NVIDIA GPU (sm_80 or newer), and the target is " + target.name;
}

inline int64_t product_of(std::span<const int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

// Row-major tensors of such sizes have every row aligned if their last axis is.
inline bool fills_chunks(int64_t size, DType dtype) { return size % (16 / info(dtype).size_bytes) == 0; }

// The stride of an axis; of one of size 1, which may broadcast and where it means nothing else, 0.
inline int64_t stride_of(const TensorView& view, int axis) { return view.shape[axis] == 1 ? 0 : view.strides[axis]; }

// Whether memory and all strides but the last are multiples of 16 bytes, and the last axis is dense.
inline bool is_aligned(const TensorView& view) {
  if (!view.defined()) return true;
  const int64_t elements = 16 / info(view.dtype).size_bytes;
  const int last = view.rank - 1;
  int64_t all = 0;
  for (int axis = 0; axis < last; ++axis) all |= stride_of(view, axis);
  return all % elements == 0 && (view.shape[last] == 1 || view.strides[last] == 1) &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

// The axes first_axis, first_axis + 1, ... of all operands, of the given sizes (none 0, their product below 2^31), in
// as few as possible. Operands that are not there, or that lack these axes and are passed as null, have strides of 0.
template <int kNumOperands>
RowAxes<kNumOperands> merged_axes(std::span<const int64_t> sizes, int first_axis,
                                  const std::array<const TensorView*, kNumOperands>& operands) {
  RowAxes<kNumOperands> axes{};
  axes.sizes[0] = make_divisor(1);
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 1) continue;
    std::array<int64_t, kNumOperands> strides{};
    for (int operand = 0; operand < kNumOperands; ++operand) {
      const TensorView* view = operands[operand];
      if (view != nullptr && view->defined()) strides[operand] = stride_of(*view, first_axis + static_cast<int>(i));
    }
    const int last = axes.count - 1;
    bool is_dense = last >= 0;
    for (int operand = 0; is_dense && operand < kNumOperands; ++operand) {
      is_dense = axes.strides[operand][last] == sizes[i] * strides[operand];
    }
    const int64_t merged_size = is_dense ? axes.sizes[last].divisor * sizes[i] : sizes[i];
    const int axis = is_dense ? last : axes.count++;
    axes.sizes[axis] = make_divisor(static_cast<unsigned>(merged_size));
    for (int operand = 0; operand < kNumOperands; ++operand) axes.strides[operand][axis] = strides[operand];
  }
  return axes;
}

// Radians as a fraction of 2^64 turns; whole turns are left out.
inline unsigned long long fraction_of_turn(double radians) {
  const double turns = radians / (2.0 * std::numbers::pi);
  const double fraction = turns - std::floor(turns);
  if (!(fraction >= 0.0 && fraction < 1.0)) return 0;  // no number, or rounded up to a whole turn
  return static_cast<unsigned long long>(std::ldexp(fraction, 64));
}

// One launch. The kernel may be made ready while the stream's previous one ends: it waits for it before it reads.
inline void launch_overlapping(Variant& variant, int device, int64_t num_blocks, void* stream, const void* params) {
  if (num_blocks == 0) return;
  launch(variant.load_on(device),
         {.grid_x = num_blocks, .stream = stream, .overlaps_previous = compute_capability(device) >= 90}, params);
}

}  // namespace heed::cuda
