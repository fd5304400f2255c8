// The instructions of src/cuda/device/memory.cuh, for device code that runs on the CPU. Addresses are checked.
#pragma once

#include "device_emulation/cuda/device/ptx.cuh"

namespace heed::cuda::ptx {

inline void check_aligned_16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulation::fail("an access of 16 bytes is not aligned");
}
inline uint4 load_read_only_16(const void* from) {
  check_aligned_16(from);
  uint4 value;
  std::memcpy(&value, from, 16);
  return value;
}
inline uint4 load_own_16(const void* from) { return load_read_only_16(from); }
inline void store_streaming_16(void* to, uint4 value) {
  check_aligned_16(to);
  std::memcpy(to, &value, 16);
}

inline float reciprocal_approx(float x) { return x >= 0x1p126f ? 0.0f : 1.0f / x; }
inline float exp2_approx_subnormal(float x) { return std::exp2(x); }

}  // namespace heed::cuda::ptx
