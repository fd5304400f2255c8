// Constants, and what score formulas calculate with on a GPU.
#pragma once

#include "cuda/device/ptx.cuh"

namespace heed::cuda {

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
inline constexpr float kNaN = __builtin_bit_cast(float, 0x7fffffff);
inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// What score formulas calculate with (variants/variant.h).
struct ScoreMath {
  static __device__ __forceinline__ float set(float x) { return x; }
  static __device__ __forceinline__ float mul(float a, float b) { return a * b; }
  static __device__ __forceinline__ float sub(float a, float b) { return a - b; }
  static __device__ __forceinline__ float abs(float x) { return fabsf(x); }
  static __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
};

// 2^x to the last bit or so, where exp2_approx is off by up to 2^-22: 0 below 2^-126; x is not above 127.
__device__ __forceinline__ float exp2_accurate(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float whole = __fsub_rn(__fadd_rn(x, kRound), kRound);
  const float f = x - whole;  // in [-0.5, 0.5]
  float y = 1.52527338e-5f;   // Taylor's series: ln(2)^n / n!
  y = fmaf(y, f, 1.54035304e-4f);
  y = fmaf(y, f, 1.33335581e-3f);
  y = fmaf(y, f, 9.61812911e-3f);
  y = fmaf(y, f, 5.55041087e-2f);
  y = fmaf(y, f, 2.40226507e-1f);
  y = fmaf(y, f, 6.93147181e-1f);
  y = fmaf(y, f, 1.0f);
  const float scale = __int_as_float((static_cast<int>(whole) + 127) << 23);
  return x < -126.0f ? 0.0f : y * scale;  // not for NaN, which stays NaN
}

// e^x as accurately, for x up to 88: what rounding takes from x * log2(e) comes back as a factor.
__device__ __forceinline__ float exp_accurate(float x) {
  constexpr float kLog2ELow = 1.92596303e-8f;  // log2(e) - kLog2E
  const float y = x * kLog2E;
  const float rest = fmaf(x, kLog2ELow, fmaf(x, kLog2E, -y));
  return y < -126.0f ? 0.0f : exp2_accurate(y) * fmaf(rest, kLn2, 1.0f);
}

}  // namespace heed::cuda
