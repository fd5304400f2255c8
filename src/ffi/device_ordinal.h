// CUDA's device ordinals as Python passes them.
#pragma once

#include <tvm/ffi/error.h>

#include <cstdint>
#include <string>

namespace heed {

// The ordinal as heed's functions take it. Throws TVM-FFI's ValueError for one that no device of heed's can have.
inline int device_ordinal(int64_t device) {
  constexpr int64_t kLast = 63;
  if (device < 0 || device > kLast) {
    throw tvm::ffi::Error(
        "ValueError", "got CUDA device " + std::to_string(device) + ", expected one from 0 to " + std::to_string(kLast),
        "");
  }
  return static_cast<int>(device);
}

}  // namespace heed
