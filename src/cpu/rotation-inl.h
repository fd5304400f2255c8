// Cosines and sines of positions, and the rotation of a row of pairs by them.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ROTATION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ROTATION_INL_H_
#undef HEED_CPU_ROTATION_INL_H_
#else
#define HEED_CPU_ROTATION_INL_H_
#endif

#include <cstdint>

#include "cpu/convert-inl.h"
#include "cpu/rotation.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Of one position: cos and sin [kMaxRotaryPairs].
struct Rotation {
  float cos[kMaxRotaryPairs];
  float sin[kMaxRotaryPairs];
};

// cos and sin of `quarters` quarter turns, to float32's last bit as long as |quarters| < 2^50; NaN for what is not
// finite.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void cos_sin(D d, V quarters, V& cos, V& sin) {
  const hn::RebindToUnsigned<D> du;
  // Adding 1.5 * 2^52 rounds to an integer, whose low bits are then those of the sum.
  const V magic = hn::Set(d, 6755399441055744.0);
  const V sum = hn::Add(quarters, magic);
  const V half = hn::Set(d, 0.5);
  V f = hn::Sub(quarters, hn::Sub(sum, magic));
  // Beyond 2^51 nothing is left of the fraction, and nothing may grow. Not Min() and Max(), which may lose NaN.
  f = hn::IfThenElse(hn::Gt(f, half), half, f);
  f = hn::IfThenElse(hn::Lt(f, hn::Neg(half)), hn::Neg(half), f);
  const V z = hn::Mul(f, f);
  // Minimax polynomials on [-1/2, 1/2], errors 5e-12 and 6e-11.
  V s = hn::MulAdd(hn::Set(d, 0.0001581950736018545), z, hn::Set(d, -0.004681260627220747));
  s = hn::MulAdd(s, z, hn::Set(d, 0.0796925818428382));
  s = hn::MulAdd(s, z, hn::Set(d, -0.6459640961024161));
  s = hn::Mul(hn::MulAdd(s, z, hn::Set(d, 1.57079632678775)), f);
  V c = hn::MulAdd(hn::Set(d, 0.0009040216687326245), z, hn::Set(d, -0.02086028850719345));
  c = hn::MulAdd(c, z, hn::Set(d, 0.2536692440297705));
  c = hn::MulAdd(c, z, hn::Set(d, -1.2337005433534745));
  c = hn::MulAdd(c, z, hn::Set(d, 1.0));
  // A quarter turn makes (c, s) (-s, c): bit 0 of the integer exchanges them, bits 0 and 1 give the signs.
  const auto quadrant = hn::BitCast(du, sum);
  const auto one = hn::Set(du, uint64_t{1});
  const auto is_odd = hn::RebindMask(d, hn::Eq(hn::And(quadrant, one), one));
  const auto sin_sign = hn::ShiftLeft<63>(hn::ShiftRight<1>(quadrant));
  const auto cos_sign = hn::ShiftLeft<63>(hn::Xor(hn::ShiftRight<1>(quadrant), quadrant));
  cos = hn::BitCast(d, hn::Xor(hn::BitCast(du, hn::IfThenElse(is_odd, s, c)), cos_sign));
  sin = hn::BitCast(d, hn::Xor(hn::BitCast(du, hn::IfThenElse(is_odd, c, s)), sin_sign));
}

// The rotation of a token at `position`, back if `is_inverse`.
inline HWY_NOINLINE void make_rotation(const Frequencies& frequencies, int64_t position, bool is_inverse,
                                       Rotation& rotation) {
  for_vectors(hn::ScalableTag<double>(), static_cast<size_t>(frequencies.num_pairs), [&](auto d, size_t i) HWY_ATTR {
    const hn::Rebind<float, decltype(d)> df;
    using V = hn::Vec<decltype(d)>;
    const V turns = hn::LoadU(d, frequencies.quarter_turns.data() + i);
    V cos, sin;
    cos_sin(d, hn::Mul(turns, hn::Set(d, static_cast<double>(is_inverse ? -position : position))), cos, sin);
    hn::StoreU(hn::DemoteTo(df, cos), df, rotation.cos + i);
    hn::StoreU(hn::DemoteTo(df, sin), df, rotation.sin + i);
  });
}

// The halves of a row: pairs (i, i + num_pairs).
template <class From, class To>
HWY_INLINE void rotate_halves(const typename From::Stored* HWY_RESTRICT from, const Rotation& rotation, int num_pairs,
                              typename To::Stored* HWY_RESTRICT to) {
  for_vector_pairs(hn::ScalableTag<float>(), static_cast<size_t>(num_pairs), [&](auto d, size_t i, auto n) HWY_ATTR {
    using V = hn::Vec<decltype(d)>;
    V first[n.value];
    V second[n.value];
    HEED_UNROLL for (int j = 0; j < n.value; ++j) {
      const size_t at = i + j * hn::Lanes(d);
      const V cos = hn::LoadU(d, rotation.cos + at);
      const V sin = hn::LoadU(d, rotation.sin + at);
      const V a = From::load(d, from + at);
      const V b = From::load(d, from + num_pairs + at);
      first[j] = hn::MulSub(a, cos, hn::Mul(b, sin));
      second[j] = hn::MulAdd(b, cos, hn::Mul(a, sin));
    }
    store_group<To>(first, d, to + i);
    store_group<To>(second, d, to + num_pairs + i);
  });
}

// Pairs (2 i, 2 i + 1).
template <class Storage, class Stored = typename Storage::Stored>
HWY_INLINE void rotate_neighbours(const Stored* HWY_RESTRICT from, const Rotation& rotation, int num_pairs,
                                  Stored* HWY_RESTRICT to) {
  HWY_ALIGN float row[2 * kMaxRotaryPairs];
  HWY_ALIGN float rotated[2 * kMaxRotaryPairs];  // not in place: the last vectors overlap
  for_vectors(hn::ScalableTag<float>(), 2 * static_cast<size_t>(num_pairs),
              [&](auto d, size_t x) HWY_ATTR { hn::StoreU(Storage::load(d, from + x), d, row + x); });
  for_vectors(hn::ScalableTag<float>(), static_cast<size_t>(num_pairs), [&](auto d, size_t i) HWY_ATTR {
    using V = hn::Vec<decltype(d)>;
    const V cos = hn::LoadU(d, rotation.cos + i);
    const V sin = hn::LoadU(d, rotation.sin + i);
    V a, b;
    hn::LoadInterleaved2(d, row + 2 * i, a, b);
    hn::StoreInterleaved2(hn::MulSub(a, cos, hn::Mul(b, sin)), hn::MulAdd(b, cos, hn::Mul(a, sin)), d, rotated + 2 * i);
  });
  for_vector_pairs(hn::ScalableTag<float>(), 2 * static_cast<size_t>(num_pairs),
                   [&](auto d, size_t x, auto n) HWY_ATTR {
                     hn::Vec<decltype(d)> v[n.value];
                     HEED_UNROLL for (int j = 0; j < n.value; ++j) v[j] = hn::LoadU(d, rotated + x + j * hn::Lanes(d));
                     store_group<Storage>(v, d, to + x);
                   });
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ROTATION_INL_H_
