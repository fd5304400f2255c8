// Tensors on a made-up GPU, for code of the host that looks at shapes, strides and addresses only.
#pragma once

#include <cstdint>
#include <vector>

#include "heed/heed.h"

namespace heed::test {

// Memory that nobody looks at.
inline char* memory() {
  static char bytes[4096];
  return bytes + 256 - reinterpret_cast<uintptr_t>(bytes) % 256;
}

// Row-major.
inline TensorView device_tensor(DType dtype, const std::vector<int64_t>& shape, int device = 0, void* data = memory()) {
  TensorView view = TensorView::contiguous(data, dtype, {}, {DeviceType::kCuda, device});
  view.rank = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    view.shape[axis] = shape[axis];
    view.strides[axis] = stride;
    stride *= shape[axis];
  }
  return view;
}

}  // namespace heed::test
