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

// 2^x for x <= 0, within 2 ulp; 2^0 is exactly 1, and everything below 2^-126 (the smallest normal float) is exactly 0, so
// that masked scores of -inf weigh nothing and results do not depend on FTZ.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_nonpositive(D d, V x) {
  const hn::RebindToUnsigned<D> du;
  // Adding 1.5 * 2^23 rounds x to an integer n and leaves n + 127, the biased exponent of 2^n, in the sum's low bits.
  const V magic = hn::Set(d, 12582912.0f + 127.0f);
  const V rounded = hn::Add(x, magic);
  const V f = hn::Sub(x, hn::Sub(rounded, magic));  // in [-1/2, 1/2]
  const V two_to_n = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, rounded)));
  // Minimax polynomial of 2^f with relative error 2e-9; the constant term is exactly 1.
  V p = hn::MulAdd(hn::Set(d, 0x1.41fbbcp-13f), f, hn::Set(d, 0x1.5f3e54p-10f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.3b2d4cp-7f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6aee8p-5f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebfbdcp-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.62e430p-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  // Not a clamp of x: the comparison is false for NaN, which then stays NaN.
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::Mul(p, two_to_n));
}

// tanh(x) within 3 ulp, for every x: relative accuracy near 0, exactly +-1 far out.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V tanh(D d, V x) {
  const V magnitude = hn::Abs(x);
  // |x| < 0.625: x + x^3 P(x^2), minimax with relative error 4.4e-9.
  const V z = hn::Mul(x, x);
  V p = hn::MulAdd(hn::Set(d, -0.005704985465854406f), z, hn::Set(d, 0.02063908614218235f));
  p = hn::MulAdd(p, z, hn::Set(d, -0.05373971536755562f));
  p = hn::MulAdd(p, z, hn::Set(d, 0.13331441581249237f));
  p = hn::MulAdd(p, z, hn::Set(d, -0.3333328068256378f));
  const V near_zero = hn::MulAdd(hn::Mul(p, z), x, x);
  // Elsewhere (1 - t) / (1 + t) with t = e^(-2 |x|).
  const V one = hn::Set(d, 1.0f);
  const V t = exp2_nonpositive(d, hn::Mul(magnitude, hn::Set(d, -2.8853900817779268f)));
  const V far_out = hn::CopySignToAbs(hn::Div(hn::Sub(one, t), hn::Add(one, t)), x);
  return hn::IfThenElse(hn::Lt(magnitude, hn::Set(d, 0.625f)), near_zero, far_out);
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
