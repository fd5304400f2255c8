// Gated activations in float32: values and slopes.
//
// float32 tensors get CUDA's accurate functions. 16-bit ones get approximations that are off by less than 2^-16: their
// memory is read so fast that a multiprocessor has some 40 instructions for each element.
#pragma once

#include "cuda/device/memory.cuh"
#include "cuda/sm80_act_and_mul_spec.h"

namespace heed::cuda {

struct ValueAndSlope {
  float value, slope;
};

// e^x.
template <bool kIsAccurate>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (kIsAccurate) return expf(x);
  return ptx::exp2_approx_subnormal(1.4426950408889634f * x);
}
template <bool kIsAccurate>
__device__ __forceinline__ float quotient(float a, float b) {  // b from 1 to 2
  if constexpr (kIsAccurate) return a / b;
  return a * ptx::reciprocal_approx(b);
}

// 1 / (1 + exp(-x)) and 1 minus that, without cancellation or overflow.
struct Logistic {
  float value, rest;
};
template <bool kIsAccurate>
__device__ __forceinline__ Logistic logistic(float x) {
  const float small = exponential<kIsAccurate>(-fabsf(x));
  const float larger = quotient<kIsAccurate>(1.0f, 1.0f + small);
  const float smaller = quotient<kIsAccurate>(small, 1.0f + small);
  return x < 0.0f ? Logistic{smaller, larger} : Logistic{larger, smaller};
}

template <bool kIsAccurate>
struct Silu {
  static __device__ __forceinline__ float value(float x) { return x * logistic<kIsAccurate>(x).value; }
  static __device__ __forceinline__ ValueAndSlope both(float x) {
    const Logistic sigma = logistic<kIsAccurate>(x);
    return {x * sigma.value, sigma.value * (1.0f + x * sigma.rest)};
  }
};

// x Phi(x), Phi the normal distribution's integral.
template <bool kIsAccurate>
struct Gelu {
  struct Normal {
    float integral, density;
  };
  static __device__ __forceinline__ Normal normal(float x) {
    constexpr float kDensityAtZero = 0.3989422804014327f;
    if constexpr (kIsAccurate) return {normcdff(x), kDensityAtZero * expf(-0.5f * x * x)};
    // Beyond |x|, the integral is exp(-x^2 / 2) times a function that varies slowly: relative error 9e-6 up to 14,
    // where it leaves the normal numbers.
    const float bell = ptx::exp2_approx_subnormal(-0.7213475204444817f * x * x);
    const float t = ptx::reciprocal_approx(1.0f + 0.46f * fabsf(x));
    float sum = 0.07222891f;
    sum = -0.23654719f + t * sum;
    sum = 0.17780396f + t * sum;
    sum = 0.11610526f + t * sum;
    sum = 0.18706703f + t * sum;
    sum = 0.18334631f + t * sum;
    const float tail = bell * (t * sum);
    return {x < 0.0f ? tail : 1.0f - tail, kDensityAtZero * bell};
  }
  static __device__ __forceinline__ float value(float x) { return x * normal(x).integral; }
  static __device__ __forceinline__ ValueAndSlope both(float x) {
    const Normal n = normal(x);
    return {x * n.integral, n.integral + x * n.density};
  }
};

// x / 2 (1 + tanh u) = x / (1 + exp(-2u)).
template <bool kIsAccurate>
struct GeluTanh {
  static constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;

  static __device__ __forceinline__ Logistic logistic_of(float x) {
    return logistic<kIsAccurate>(kTwice * x * (1.0f + kCubic * x * x));
  }
  static __device__ __forceinline__ float value(float x) { return x * logistic_of(x).value; }
  static __device__ __forceinline__ ValueAndSlope both(float x) {
    const Logistic sigma = logistic_of(x);
    // Beyond, one of the factors is 0, and their square would overflow.
    const float near = fminf(fmaxf(x, -100.0f), 100.0f);
    const float slope_of_2u = kTwice * (1.0f + 3.0f * kCubic * near * near);
    return {x * sigma.value, sigma.value + near * slope_of_2u * (sigma.value * sigma.rest)};
  }
};

template <Gate kGate, bool kIsAccurate>
struct GateFunction;
template <bool kIsAccurate>
struct GateFunction<Gate::kSilu, kIsAccurate> : Silu<kIsAccurate> {};
template <bool kIsAccurate>
struct GateFunction<Gate::kGelu, kIsAccurate> : Gelu<kIsAccurate> {};
template <bool kIsAccurate>
struct GateFunction<Gate::kGeluTanh, kIsAccurate> : GeluTanh<kIsAccurate> {};

}  // namespace heed::cuda
