// Constants, and what score formulas calculate with on a GPU.
#pragma once

#include "cuda/device/ptx.cuh"

namespace heed::cuda {

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
inline constexpr float kLog2E = 1.4426950408889634f;
// ln(2) as the sum of two floats: 16 bits, then the rest.
inline constexpr float kLn2High = 0.693145751953125f;
inline constexpr float kLn2Low = 1.42860677e-06f;

// What score formulas calculate with (variants/variant.h).
template <bool kIsExact>
struct ScoreMath {
  static __device__ __forceinline__ float set(float x) { return x; }
  static __device__ __forceinline__ float mul(float a, float b) { return a * b; }
  static __device__ __forceinline__ float sub(float a, float b) { return a - b; }
  static __device__ __forceinline__ float abs(float x) { return fabsf(x); }
  static __device__ __forceinline__ float tanh(float x) {
    if constexpr (kIsExact) return tanhf(x);
    return 1.0f - 2.0f * ptx::reciprocal_approx(1.0f + ptx::exp2_approx(x * (2.0f * kLog2E)));  // off by 1e-7
  }
};

}  // namespace heed::cuda
