// Checks of the views that a caller hands over.
#include "ops/views.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "core/dtype.h"

namespace heed {
namespace {

void check_view_fields(std::string_view name, const TensorView& view) {
  if (view.rank > kMaxRank) {
    throw ValueError(std::string(name) + ": got rank " + std::to_string(view.rank) + ", expected at most " +
                     std::to_string(kMaxRank));
  }
  if (view.defined() && static_cast<size_t>(view.dtype) >= std::size(kDTypes)) {
    throw TypeError(std::string(name) + ": got DType " + std::to_string(static_cast<int>(view.dtype)) +
                    ", expected one of heed::DType");
  }
}

std::string show_list(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return text + "]";
}

std::string show(const TensorView& view) {
  return std::string(info(view.dtype).name) + " " + show_list(view.shape.data(), view.rank);
}

// Whether each stride steps over all that the smaller ones span. Sufficient for elements not to share memory, and true
// of every layout that slices, transposes or pads an array.
bool has_distinct_elements(const TensorView& view) {
  std::vector<std::pair<uint64_t, uint64_t>> axes;  // stride, size - 1
  for (int i = 0; i < view.rank; ++i) {
    const auto stride = static_cast<uint64_t>(view.strides[i]);
    if (view.shape[i] > 1) axes.emplace_back(view.strides[i] < 0 ? -stride : stride, view.shape[i] - 1);
  }
  std::sort(axes.begin(), axes.end());
  uint64_t span = 0;
  for (auto [stride, steps] : axes) {
    if (stride <= span) return false;
    span += stride * steps;
  }
  return true;
}

// Whether elements follow each other in row-major order. Axes of size 1 may have any stride.
bool is_row_major(const TensorView& view) {
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.shape[i] == 1) continue;
    if (view.strides[i] != stride) return false;
    if (__builtin_mul_overflow(stride, view.shape[i], &stride)) return false;
  }
  return true;
}

// Of all elements; negative if there cannot be as many.
int64_t size_bytes(const TensorView& view) {
  int64_t bytes = info(view.dtype).size_bytes;
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] < 0 || __builtin_mul_overflow(bytes, view.shape[i], &bytes)) return -1;
  }
  return bytes;
}

std::string expected_workspace(int64_t bytes) {
  return "expected at least " + std::to_string(bytes) + " bytes of float32";
}

void check_memory(const std::string& tensor, const TensorView& view, int64_t alignment_bytes) {
  if (view.data == nullptr) throw ValueError(tensor + ": got a null pointer, expected memory");
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(alignment_bytes) != 0) {
    throw ValueError(tensor + ": got a misaligned pointer, expected one aligned to " + std::to_string(alignment_bytes) +
                     " bytes");
  }
}

void check_device(const std::string& tensor, const TensorView& view, Device device, std::string_view first) {
  if (view.device == device) return;
  throw ValueError(tensor + ": got another device than " + std::string(first) + ", expected the device of " +
                   std::string(first));
}

}  // namespace

TensorSpec spec_of(std::string_view name, const TensorView& view) {
  if (!view.defined()) return {};
  check_view_fields(name, view);
  return {std::string(info(view.dtype).name), {view.shape.begin(), view.shape.begin() + view.rank}, true};
}

void check_view(std::string_view name, const TensorView& view, DType dtype, const std::vector<int64_t>& shape,
                Device device, bool is_output, std::string_view first) {
  const std::string tensor(name);
  check_view_fields(name, view);
  bool is_same_shape = view.rank == static_cast<int>(shape.size());
  bool is_empty = false;
  for (int i = 0; is_same_shape && i < view.rank; ++i) {
    is_same_shape = view.shape[i] == shape[i];
    is_empty = is_empty || shape[i] == 0;
  }
  if (!is_same_shape || view.dtype != dtype) {
    TensorView expected;
    expected.rank = static_cast<int>(shape.size());
    expected.dtype = dtype;
    std::copy(shape.begin(), shape.end(), expected.shape.begin());
    const std::string message =
        tensor + ": got " + (view.defined() ? show(view) : "nothing") + ", expected " + show(expected);
    if (is_same_shape) throw TypeError(message);
    throw ValueError(message);
  }
  check_device(tensor, view, device, first);
  if (is_empty) return;
  check_memory(tensor, view, info(dtype).size_bytes);
  if (is_output && !has_distinct_elements(view)) {
    throw ValueError(tensor + ": got strides " + show_list(view.strides.data(), view.rank) +
                     ", expected strides that keep output elements apart");
  }
}

bool suffices_as_workspace(const TensorView& view, int64_t bytes, Device device, std::string_view first) {
  const std::string tensor = "workspace";
  check_view_fields(tensor, view);
  if (bytes == 0) return true;
  if (!view.defined()) return false;
  const auto refusal = [&] { return tensor + ": got " + show(view) + ", " + expected_workspace(bytes); };
  if (view.dtype != DType::kFloat32) throw TypeError(refusal());
  const int64_t given_bytes = size_bytes(view);
  if (given_bytes < 0) throw ValueError(refusal());
  check_device(tensor, view, device, first);
  if (given_bytes == 0) return false;
  check_memory(tensor, view, 16);
  if (!is_row_major(view)) {
    throw ValueError(tensor + ": got strides " + show_list(view.strides.data(), view.rank) +
                     ", expected contiguous memory");
  }
  return given_bytes >= bytes;
}

void check_workspace(const TensorView& view, int64_t bytes, Device device, std::string_view first) {
  if (suffices_as_workspace(view, bytes, device, first)) return;
  const std::string given =
      view.defined() ? show(view) + " of " + std::to_string(size_bytes(view)) + " bytes" : "nothing";
  throw ValueError("workspace: got " + given + ", " + expected_workspace(bytes));
}

}  // namespace heed
