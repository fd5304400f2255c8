// Rows between storage (float32, float16, bfloat16, any stride) and float32, and their transposition. Conversions are
// exact on every instruction set, subnormals included; narrowing rounds to nearest even and keeps NaN.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_CONVERT_INL_H_
#undef HEED_CPU_CONVERT_INL_H_
#else
#define HEED_CPU_CONVERT_INL_H_
#endif

#include <cstddef>
#include <cstdint>

// Highway's own float16 conversions are exact where they are instructions (F16C, NEON); its software ones are not.
#undef HEED_NATIVE_FLOAT16
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_NEON
#define HEED_NATIVE_FLOAT16 1
#else
#define HEED_NATIVE_FLOAT16 0
#endif

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Storage types. Each has load(d, p): Lanes(d) elements as floats, store(v, d, p), and store_pair(v0, v1, d, p): two
// vectors of them.
struct Float32 {
  using Stored = float;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const Stored* HWY_RESTRICT from) {
    return hn::LoadU(d, from);
  }
  template <class D>
  static HWY_INLINE void store(hn::Vec<D> v, D d, Stored* HWY_RESTRICT to) {
    hn::StoreU(v, d, to);
  }
  template <class D>
  static HWY_INLINE void store_pair(hn::Vec<D> v0, hn::Vec<D> v1, D d, Stored* HWY_RESTRICT to) {
    store(v0, d, to);
    store(v1, d, to + hn::Lanes(d));
  }
};

struct BFloat16 {
  using Stored = uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const Stored* HWY_RESTRICT from) {
    const hn::RebindToUnsigned<D> du;
    const hn::Rebind<uint16_t, D> du16;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(du16, from))));
  }
  template <class D>
  static HWY_INLINE void store(hn::Vec<D> v, [[maybe_unused]] D d, Stored* HWY_RESTRICT to) {
    const hn::RebindToUnsigned<D> du;
    const hn::RebindToSigned<D> di;
    const hn::Rebind<uint16_t, D> du16;
    hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di, hn::ShiftRight<16>(rounded(du, v)))), du16, to);
  }
  template <class D>
  static HWY_INLINE void store_pair(hn::Vec<D> v0, hn::Vec<D> v1, [[maybe_unused]] D d, Stored* HWY_RESTRICT to) {
#if HWY_TARGET == HWY_SCALAR
    store(v0, d, to);
    store(v1, d, to + 1);
#else
    const hn::RebindToUnsigned<D> du;
    const hn::Repartition<uint16_t, D> du16;
    hn::StoreU(hn::ConcatOdd(du16, hn::BitCast(du16, rounded(du, v1)), hn::BitCast(du16, rounded(du, v0))), du16, to);
#endif
  }

 private:
  // The upper 16 bits of each float, rounded.
  template <class DU, class V>
  static HWY_INLINE hn::Vec<DU> rounded(DU du, V v) {
    const auto bits = hn::BitCast(du, v);
    const auto is_odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
    const auto nearest = hn::Add(bits, hn::Add(is_odd, hn::Set(du, 0x7FFFu)));
    const auto quiet_nan = hn::Or(bits, hn::Set(du, 0x400000u));
    return hn::IfThenElse(hn::RebindMask(du, hn::Ne(v, v)), quiet_nan, nearest);
  }
};

struct Float16 {
  using Stored = uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const Stored* HWY_RESTRICT from) {
    const hn::Rebind<uint16_t, D> du16;
    const auto half = hn::LoadU(du16, from);
#if HEED_NATIVE_FLOAT16
    return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, D>(), half));
#else
    const hn::RebindToUnsigned<D> du;
    const hn::RebindToSigned<D> di;
    const auto bits = hn::PromoteTo(du, half);
    const auto magnitude = hn::And(bits, hn::Set(du, 0x7FFFu));
    const auto sign = hn::ShiftLeft<16>(hn::Xor(bits, magnitude));
    const auto shifted = hn::ShiftLeft<13>(magnitude);
    const auto normal = hn::Add(shifted, hn::Set(du, 112u << 23));
    const auto inf_or_nan = hn::Or(shifted, hn::Set(du, 0x7F800000u));
    // A subnormal half is an integer times 2^-24, which is a normal float: DAZ and FTZ do not matter.
    const auto subnormal = hn::BitCast(du, hn::Mul(hn::ConvertTo(d, hn::BitCast(di, magnitude)), hn::Set(d, 0x1p-24f)));
    const auto signed_magnitude = hn::BitCast(di, magnitude);
    const auto is_subnormal = hn::RebindMask(du, hn::Lt(signed_magnitude, hn::Set(di, 0x400)));
    const auto is_special = hn::RebindMask(du, hn::Gt(signed_magnitude, hn::Set(di, 0x7BFF)));
    const auto finite = hn::IfThenElse(is_subnormal, subnormal, normal);
    return hn::BitCast(d, hn::Or(hn::IfThenElse(is_special, inf_or_nan, finite), sign));
#endif
  }
  template <class D>
  static HWY_INLINE void store(hn::Vec<D> v, [[maybe_unused]] D d, Stored* HWY_RESTRICT to) {
    const hn::Rebind<uint16_t, D> du16;
#if HEED_NATIVE_FLOAT16
    hn::StoreU(hn::BitCast(du16, hn::DemoteTo(hn::Rebind<hwy::float16_t, D>(), v)), du16, to);
#else
    const hn::RebindToUnsigned<D> du;
    const hn::RebindToSigned<D> di;
    const auto magnitude = hn::BitCast(du, hn::Abs(v));
    const auto sign = hn::ShiftRight<16>(hn::Xor(hn::BitCast(du, v), magnitude));
    // Normal: rebias the exponent, round at bit 13. A carry out of the mantissa is the next exponent, or infinity.
    const auto is_odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1u));
    const auto rebiased = hn::Sub(hn::Add(magnitude, hn::Add(is_odd, hn::Set(du, 0xFFFu))), hn::Set(du, 112u << 23));
    const auto normal = hn::ShiftRight<13>(rebiased);
    // Subnormal: in [0.5, 1) one ulp of a float is 2^-24, the step of subnormal halves, so the addition rounds.
    const auto half = hn::Set(d, 0.5f);
    const auto subnormal = hn::Sub(hn::BitCast(du, hn::Add(hn::Abs(v), half)), hn::BitCast(du, half));
    const auto quiet_nan = hn::Or(hn::Set(du, 0x7E00u), hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 0x3FFu)));
    const auto signed_magnitude = hn::BitCast(di, magnitude);
    const auto is_subnormal = hn::RebindMask(du, hn::Lt(signed_magnitude, hn::Set(di, 113 << 23)));
    const auto is_overflow = hn::RebindMask(du, hn::Gt(signed_magnitude, hn::Set(di, 0x477FEFFF)));  // >= 65520
    const auto is_nan = hn::RebindMask(du, hn::Ne(v, v));
    auto result = hn::IfThenElse(is_subnormal, subnormal, normal);
    result = hn::IfThenElse(is_overflow, hn::Set(du, 0x7C00u), result);
    result = hn::IfThenElse(is_nan, quiet_nan, result);
    hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di, hn::Or(result, sign))), du16, to);
#endif
  }
  template <class D>
  static HWY_INLINE void store_pair(hn::Vec<D> v0, hn::Vec<D> v1, D d, Stored* HWY_RESTRICT to) {
    store(v0, d, to);
    store(v1, d, to + hn::Lanes(d));
  }
};

// Calls op(d, index) on vectors that cover [0, count). The last one may overlap the one before it; below one vector it
// is one element at a time.
template <class D, class Op>
HWY_INLINE void for_vectors(D d, size_t count, const Op& op) {
  const size_t lanes = hn::Lanes(d);
  if (count < lanes) {
    const hn::CappedTag<hn::TFromD<D>, 1> d1;
    for (size_t i = 0; i < count; ++i) op(d1, i);
    return;
  }
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) op(d, i);
  if (i < count) op(d, count - lanes);
}

template <int kCount>
struct VectorCount {
  static constexpr int value = kCount;
};

// Calls op(d, index, n) on groups of n.value adjacent vectors, 2 or 1, that cover [0, count); otherwise as
// for_vectors(). Two at a time, because that is how 16-bit elements are stored at less cost.
template <class D, class Op>
HWY_INLINE void for_vector_pairs(D d, size_t count, const Op& op) {
  const size_t lanes = hn::Lanes(d);
  if (count < lanes) {
    const hn::CappedTag<hn::TFromD<D>, 1> d1;
    for (size_t i = 0; i < count; ++i) op(d1, i, VectorCount<1>());
    return;
  }
  size_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) op(d, i, VectorCount<2>());
  if (i + lanes <= count) op(d, i, VectorCount<1>()), i += lanes;
  if (i < count) op(d, count - lanes, VectorCount<1>());
}

// `v`: one vector, or two.
template <class Storage, class D, size_t kCount>
HWY_INLINE void store_group(const hn::Vec<D> (&v)[kCount], D d, typename Storage::Stored* HWY_RESTRICT to) {
  if constexpr (kCount == 2) {
    Storage::store_pair(v[0], v[1], d, to);
  } else {
    Storage::store(v[0], d, to);
  }
}

constexpr int kMaxRow = 256;  // elements of a row that is not contiguous

// `from` [rows][from_stride] -> `to` [columns][to_stride], in squares of 4 x 4 while they fit.
inline HWY_NOINLINE void transpose(const float* HWY_RESTRICT from, size_t from_stride, int rows, int columns,
                                   float* HWY_RESTRICT to, size_t to_stride) {
  int r = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<float, 4> d4;
  const hn::FixedTag<double, 2> pairs;
  for (; r + 4 <= rows; r += 4) {
    int c = 0;
    for (; c + 4 <= columns; c += 4) {
      const float* at = from + r * from_stride + c;
      const auto row0 = hn::LoadU(d4, at);
      const auto row1 = hn::LoadU(d4, at + from_stride);
      const auto row2 = hn::LoadU(d4, at + 2 * from_stride);
      const auto row3 = hn::LoadU(d4, at + 3 * from_stride);
      const auto low01 = hn::BitCast(pairs, hn::InterleaveLower(d4, row0, row1));
      const auto low23 = hn::BitCast(pairs, hn::InterleaveLower(d4, row2, row3));
      const auto high01 = hn::BitCast(pairs, hn::InterleaveUpper(d4, row0, row1));
      const auto high23 = hn::BitCast(pairs, hn::InterleaveUpper(d4, row2, row3));
      float* out = to + c * to_stride + r;
      hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(pairs, low01, low23)), d4, out);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(pairs, low01, low23)), d4, out + to_stride);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(pairs, high01, high23)), d4, out + 2 * to_stride);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(pairs, high01, high23)), d4, out + 3 * to_stride);
    }
    for (; c < columns; ++c) {
      for (int i = r; i < r + 4; ++i) to[c * to_stride + i] = from[i * from_stride + c];
    }
  }
#endif
  for (; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

// `row`: `count` stored elements, `stride` apart -> `to` [count] floats.
template <class Storage>
HWY_INLINE void load_row(const typename Storage::Stored* HWY_RESTRICT row, int64_t stride, int count,
                         float* HWY_RESTRICT to) {
  typename Storage::Stored gathered[kMaxRow];
  if (stride != 1) {
    for (int x = 0; x < count; ++x) gathered[x] = row[x * stride];
    row = gathered;
  }
  for_vectors(hn::ScalableTag<float>(), static_cast<size_t>(count),
              [&](auto d, size_t x) HWY_ATTR { hn::StoreU(Storage::load(d, row + x), d, to + x); });
}

// op(d, `from` [count] floats) -> `row`: `count` stored elements, `stride` apart.
template <class Storage, class Op>
HWY_INLINE void store_row(const float* HWY_RESTRICT from, int count, typename Storage::Stored* HWY_RESTRICT row,
                          int64_t stride, const Op& op) {
  typename Storage::Stored gathered[kMaxRow];
  auto* HWY_RESTRICT to = stride == 1 ? row : gathered;
  for_vectors(hn::ScalableTag<float>(), static_cast<size_t>(count),
              [&](auto d, size_t x) HWY_ATTR { Storage::store(op(d, hn::LoadU(d, from + x)), d, to + x); });
  if (stride != 1) {
    for (int x = 0; x < count; ++x) row[x * stride] = gathered[x];
  }
}

// Whether `packed` [num_rows][stride] holds finite numbers only in the first `count` columns.
inline HWY_NOINLINE bool is_finite(const float* HWY_RESTRICT packed, size_t stride, int num_rows, int count) {
  float sum = 0.0f;
  for (int t = 0; t < num_rows; ++t) {
    for_vectors(hn::ScalableTag<float>(), static_cast<size_t>(count), [&](auto d, size_t x) HWY_ATTR {
      const auto zeros = hn::Mul(hn::LoadU(d, packed + static_cast<size_t>(t) * stride + x), hn::Zero(d));
      if (!hn::AllTrue(d, hn::Eq(zeros, hn::Zero(d)))) sum = 1.0f;
    });
  }
  return sum == 0.0f;
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_CONVERT_INL_H_
