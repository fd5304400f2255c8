// Vector math of the CPU kernels: exp2 and tanh, a few ulp of float32, NaN in = NaN out.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_MATH_INL_H_
#undef HEED_CPU_MATH_INL_H_
#else
#define HEED_CPU_MATH_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// a * b - c without rounding the product. Where the CPU has no fused multiply-add, halves of a and b have exact
// products.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exact_mul_sub([[maybe_unused]] D d, V a, V b, V c) {
#if HWY_NATIVE_FMA
  return hn::MulSub(a, b, c);
#else
  const hn::RebindToUnsigned<D> du;
  const auto high = [&](V x) HWY_ATTR { return hn::BitCast(d, hn::And(hn::BitCast(du, x), hn::Set(du, 0xFFFFF000u))); };
  const V a_high = high(a);
  const V b_high = high(b);
  const V rest = hn::Add(hn::Mul(a_high, hn::Sub(b, b_high)), hn::Mul(hn::Sub(a, a_high), b));
  return hn::Add(hn::Sub(hn::Mul(a_high, b_high), c), rest);
#endif
}

// An argument of 2^x is taken apart as x = n + f. Adding 1.5 * 2^23 rounds x to an integer n and leaves n + 127, the
// biased exponent of 2^n, in the sum's low bits.
constexpr float kExp2Magic = 12582912.0f + 127.0f;

// 2^n * 2^f, where `rounded` is n + kExp2Magic and f lies in [-1/2, 1/2]. Everything below 2^-126 (the smallest normal
// float) is exactly 0, whatever f is.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_of_parts(D d, V rounded, V f) {
  const hn::RebindToUnsigned<D> du;
  const V two_to_n = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, rounded)));
  // Minimax polynomial of 2^f with relative error 2e-9; the constant term is exactly 1.
  V p = hn::MulAdd(hn::Set(d, 0x1.41fbbcp-13f), f, hn::Set(d, 0x1.5f3e54p-10f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.3b2d4cp-7f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6aee8p-5f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebfbdcp-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.62e430p-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  // Not a clamp: the comparison is false for NaN, which then stays NaN. 126 and not 126.5: n is -126 or more.
  return hn::IfThenZeroElse(hn::Lt(rounded, hn::Set(d, 12582912.0f + 1.0f)), hn::Mul(p, two_to_n));
}

// 2^(t * c) for t * c <= 0, within 2 ulp (the product is not rounded; c itself is taken as exact). 2^0 is exactly 1,
// and everything below 2^-126 is exactly 0, so that masked scores of -inf weigh nothing and results do not depend on
// FTZ.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_nonpositive(D d, V t, V c) {
  const V magic = hn::Set(d, kExp2Magic);
  const V rounded = hn::MulAdd(t, c, magic);
  return exp2_of_parts(d, rounded, exact_mul_sub(d, t, c, hn::Sub(rounded, magic)));
}

// e^x within 2 ulp for x <= 88, and that of 88 beyond; below the smallest normal float exactly 0.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp_bounded(D d, V x) {
  const V largest = hn::Set(d, 88.0f);
  x = hn::IfThenElse(hn::Gt(x, largest), largest, x);  // not Min(), which may lose NaN
  const V magic = hn::Set(d, kExp2Magic);
  const V log2e = hn::Set(d, 0x1.715476p+0f);
  const V rounded = hn::MulAdd(x, log2e, magic);
  const V f = exact_mul_sub(d, x, log2e, hn::Sub(rounded, magic));
  return exp2_of_parts(d, rounded, hn::MulAdd(x, hn::Set(d, 0x1.4ae0c0p-26f), f));  // the rest of log2(e)
}

// tanh(x) within 2 ulp, for every x: relative accuracy near 0, exactly +-1 far out.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V tanh(D d, V x) {
  const V magnitude = hn::Abs(x);
  // |x| < 1: x + x^3 P(x^2), minimax with relative error 4.6e-9.
  const V z = hn::Mul(x, x);
  V p = hn::MulAdd(hn::Set(d, -0.0003584517689887434f), z, hn::Set(d, 0.002301363740116358f));
  p = hn::MulAdd(p, z, hn::Set(d, -0.007946105673909187f));
  p = hn::MulAdd(p, z, hn::Set(d, 0.021486656740307808f));
  p = hn::MulAdd(p, z, hn::Set(d, -0.05387980118393898f));
  p = hn::MulAdd(p, z, hn::Set(d, 0.13332344591617584f));
  p = hn::MulAdd(p, z, hn::Set(d, -0.33333295583724976f));
  const V near_zero = hn::MulAdd(hn::Mul(p, z), x, x);
  // Elsewhere 1 - 2 t / (1 + t) with t = e^(-2 |x|): the subtrahend is small, and so is its error.
  const V one = hn::Set(d, 1.0f);
  const V t = exp2_nonpositive(d, magnitude, hn::Set(d, -2.8853900817779268f));
  const V far_out = hn::Sub(one, hn::Div(hn::Add(t, t), hn::Add(one, t)));
  return hn::IfThenElse(hn::Lt(magnitude, one), near_zero, hn::CopySignToAbs(far_out, x));
}

// The math policy of src/variants/ for vectors.
template <class D>
struct VectorMath {
  using V = hn::Vec<D>;
  D d;
  HWY_INLINE V set(float x) const { return hn::Set(d, x); }
  HWY_INLINE V mul(V a, V b) const { return hn::Mul(a, b); }
  HWY_INLINE V sub(V a, V b) const { return hn::Sub(a, b); }
  HWY_INLINE V abs(V a) const { return hn::Abs(a); }
  HWY_INLINE V tanh(V a) const { return HWY_NAMESPACE::tanh(d, a); }
};

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_MATH_INL_H_
