// Storage types: the operands of a product and the product itself.
//
// One step of a product takes 32 bytes of each row: 16 elements of 16 bits, or 8 floats. Operand A is 16 rows of a
// step, operand B 8 columns of it. `make_a` takes A from shared memory (as ldmatrix leaves it) or from accumulators.
#pragma once

#include "cuda/attention_spec.h"
#include "cuda/device/ptx.cuh"

namespace heed::cuda {

// An accumulator tile of 16 x 8: rows g and g + 8 (g = lane / 4), columns 2t and 2t + 1 (t = lane % 4):
//   [0] (g, 2t)   [1] (g, 2t + 1)   [2] (g + 8, 2t)   [3] (g + 8, 2t + 1)
using Accumulator = float[4];

// Both 16-bit types.
template <Element kElement>
struct MathOf {
  static constexpr bool kIsBf16 = kElement == Element::kBFloat16;
  struct A {
    uint32 bits[4];
  };
  struct B {
    uint32 bits[2];
  };

  static __device__ __forceinline__ uint32 pack(float low, float high) {
    return kIsBf16 ? ptx::pack_bf16(low, high) : ptx::pack_f16(low, high);
  }
  static __device__ __forceinline__ A make_a(const uint32 (&bits)[4]) { return {{bits[0], bits[1], bits[2], bits[3]}}; }
  // The accumulators of two neighbouring tiles are an operand of 16 columns as they lie.
  static __device__ __forceinline__ A make_a(const Accumulator& left, const Accumulator& right) {
    return {{pack(left[0], left[1]), pack(left[2], left[3]), pack(right[0], right[1]), pack(right[2], right[3])}};
  }
  static __device__ __forceinline__ B make_b(uint32 b0, uint32 b1) { return {{b0, b1}}; }

  // Eight elements in 16 bytes: whether no exponent is all ones.
  static __device__ __forceinline__ bool are_finite(uint4 chunk) {
    constexpr uint32 kExponent = kIsBf16 ? 0x7f80u : 0x7c00u;
    const uint32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    bool are = true;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      are = are && (words[i] & kExponent) != kExponent && (words[i] >> 16 & kExponent) != kExponent;
    }
    return are;
  }
  // Of the lower 16 bits.
  static __device__ __forceinline__ float to_float(uint32 bits) {
    return kIsBf16 ? __uint_as_float(bits << 16) : ptx::float_of_f16(static_cast<unsigned short>(bits));
  }
  static __device__ __forceinline__ float load(const char* from) {
    return to_float(*reinterpret_cast<const unsigned short*>(from));
  }

  static __device__ __forceinline__ void mma(Accumulator& acc, const A& a, const B& b) {
    if constexpr (kIsBf16) {
      ptx::mma_bf16(acc, a.bits, b.bits[0], b.bits[1]);
    } else {
      ptx::mma_f16(acc, a.bits, b.bits[0], b.bits[1]);
    }
  }
};

// float32 on tensor cores that take TF32, 11 bits of a number: x is split exactly into a high, a middle and a low part
// of 11, 11 and 2 bits, and of the nine products those that float32 notices are kept. (Two parts and three products,
// the usual "3xTF32", miss the last bits: an output that is a copy of a row of V would not equal it.)
template <>
struct MathOf<Element::kFloat32> {
  struct A {
    uint32 high[4], middle[4], low[4];
  };
  struct B {
    uint32 high[2], middle[2], low[2];
  };

  static __device__ __forceinline__ void split(uint32 bits, uint32& high, uint32& middle, uint32& low) {
    const float value = __uint_as_float(bits);
    // The largest numbers are cut off instead: they would round to infinity.
    high = fabsf(value) > 3.4e38f ? bits & 0xffffe000u : ptx::round_to_tf32(value);
    const float rest = value - __uint_as_float(high);
    middle = ptx::round_to_tf32(rest);
    low = __float_as_uint(rest - __uint_as_float(middle));
  }
  static __device__ __forceinline__ A make_a(const uint32 (&bits)[4]) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(bits[i], a.high[i], a.middle[i], a.low[i]);
    return a;
  }
  // Columns t and t + 4 of the operand are columns 2t and 2t + 1 of the accumulators: B's rows must come in that order.
  static __device__ __forceinline__ A make_a(const Accumulator& acc) {
    const uint32 bits[4] = {__float_as_uint(acc[0]), __float_as_uint(acc[2]), __float_as_uint(acc[1]),
                            __float_as_uint(acc[3])};
    return make_a(bits);
  }
  static __device__ __forceinline__ B make_b(uint32 b0, uint32 b1) {
    B b;
    split(b0, b.high[0], b.middle[0], b.low[0]);
    split(b1, b.high[1], b.middle[1], b.low[1]);
    return b;
  }

  static __device__ __forceinline__ bool are_finite(uint4 chunk) {
    constexpr uint32 kExponent = 0x7f800000u;
    return (chunk.x & kExponent) != kExponent && (chunk.y & kExponent) != kExponent &&
           (chunk.z & kExponent) != kExponent && (chunk.w & kExponent) != kExponent;
  }
  static __device__ __forceinline__ float load(const char* from) { return *reinterpret_cast<const float*>(from); }

  // A sum of products. Tensor cores truncate what they accumulate, so the products of high parts are summed by four
  // there and rounded when they are added up; those of the other parts are too small for it to matter.
  struct Sum {
    float left[4], right[4], small[4];

    __device__ __forceinline__ Sum() : left{}, right{}, small{} {}
    __device__ __forceinline__ void add_product(const A& a, const B& b) {
      ptx::mma_tf32(small, a.low, b.high[0], b.high[1]);
      ptx::mma_tf32(small, a.high, b.low[0], b.low[1]);
      ptx::mma_tf32(small, a.middle, b.middle[0], b.middle[1]);
      ptx::mma_tf32(small, a.middle, b.high[0], b.high[1]);
      ptx::mma_tf32(small, a.high, b.middle[0], b.middle[1]);
      float four[4] = {}, other_four[4] = {};
      ptx::mma_tf32_half(four, a.high[0], a.high[1], b.high[0]);
      ptx::mma_tf32_half(other_four, a.high[2], a.high[3], b.high[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] += four[i];
        right[i] += other_four[i];
      }
    }
    __device__ __forceinline__ float total(int i) const { return (left[i] + right[i]) + small[i]; }
  };
};

}  // namespace heed::cuda
