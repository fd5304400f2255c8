// Loads and stores of 16 bytes.
#pragma once

#include "cuda/device/ptx.cuh"

namespace heed::cuda::ptx {

// Memory that is also written while the kernel runs, by this thread afterwards or by others before.
__device__ __forceinline__ uint4 load_own_16(const void* from) {
  uint4 value;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}
// Memory that the kernel only reads. Without hints, also where each byte is read once: loads that do not stay in L1
// are slower (docs/kernel-notes.md).
__device__ __forceinline__ uint4 load_read_only_16(const void* from) {
  uint4 value;
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}
// Results that the kernel does not read again. They leave L2 first: memory gets them in the order in which they are
// written, which is faster than when L2 runs out of room (docs/kernel-notes.md).
__device__ __forceinline__ void store_streaming_16(void* to, uint4 value) {
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// 1 / x; relative error below 2^-22, 0 above 2^126.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 2^x; relative error below 2^-22, subnormal results included.
__device__ __forceinline__ float exp2_approx_subnormal(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace heed::cuda::ptx
