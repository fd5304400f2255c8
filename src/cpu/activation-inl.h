// The activations of act_and_mul and their derivatives on vectors, a few ulp of float32 for every argument, tails
// included; NaN in = NaN out.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ACTIVATION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ACTIVATION_INL_H_
#undef HEED_CPU_ACTIVATION_INL_H_
#else
#define HEED_CPU_ACTIVATION_INL_H_
#endif

#include "cpu/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Every activation is x * weight(x), with a weight between 0 and 1, weight(x) + weight(-x) = 1, that falls like an
// exponential on the negative side. Out there it is a subnormal number long before x * weight is 0, so it carries a
// factor: weight = scaled * unscale, with unscale a power of two.
template <class V>
struct Weight {
  V scaled;      // weight(x) / unscale
  V complement;  // weight(-x)
  V unscale;     // 1, or kTailUnscale far out on the negative side
};
constexpr float kTailScaleLog2 = 24.0f;
constexpr float kTailUnscale = 0x1p-24f;

// 2^(a b + low) for results up to 1; times 2^kTailScaleLog2 where `is_tail`.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_product(D d, V a, V b, V low, hn::Mask<D> is_tail) {
  const V magic = hn::Set(d, kExp2Magic);
  const V rounded = hn::MulAdd(a, b, magic);
  const V f = hn::Add(exact_mul_sub(d, a, b, hn::Sub(rounded, magic)), low);
  return exp2_of_parts(d, hn::Add(rounded, hn::IfThenElseZero(is_tail, hn::Set(d, kTailScaleLog2))), f);
}

// 1 / (1 + e^-z) and its complement; |z| log2(e) is |a b + low|, and the sign of z that of `sign`. `is_tail`: the
// exponential is below 2^-64 and z is negative.
template <class D, class V = hn::Vec<D>>
HWY_INLINE Weight<V> logistic(D d, V negative_a, V b, V low, V sign, hn::Mask<D> is_tail) {
  const V one = hn::Set(d, 1.0f);
  const V t = exp2_product(d, negative_a, b, low, is_tail);  // far out negligible beside 1, scaled or not
  const V rest = hn::Div(one, hn::Add(one, t));
  const auto is_negative = hn::Lt(sign, hn::Zero(d));
  return {hn::Mul(hn::IfThenElse(is_negative, t, one), rest), hn::Mul(hn::IfThenElse(is_negative, one, t), rest),
          hn::IfThenElse(is_tail, hn::Set(d, kTailUnscale), one)};
}

// x times its weight.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V weighted(D /*d*/, V x, const Weight<V>& weight) {
  return hn::Mul(hn::Mul(x, weight.scaled), weight.unscale);
}

// Each activation has value(d, x): x * weight(x); weight(d, x); and slope(d, x, weight): the derivative of weight(x),
// without its factor `unscale`.
struct SiluVector {
  // x / (1 + e^-x), as x/2 / (1/2 + e^-x / 2): cheaper than over the weight, and as exact down to x = -89.
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V value(D d, V x) {
    // From 87 on e^-x is nothing beside 1; at -89.4 its half has the exponent 128 and is infinite. A NaN as the second
    // operand is kept.
    const V bounded = hn::Min(hn::Set(d, 87.0f), hn::Max(hn::Set(d, -89.4f), x));
    const V magic = hn::Set(d, kExp2Magic - 1.0f);  // half
    const V log2e = hn::Set(d, -0x1.715476p+0f);
    const V rounded = hn::MulAdd(bounded, log2e, magic);
    V f = exact_mul_sub(d, bounded, log2e, hn::Sub(rounded, magic));
    f = hn::MulAdd(bounded, hn::Set(d, -0x1.4ae0c0p-26f), f);  // the rest of log2(e)
    const V half = hn::Set(d, 0.5f);
    return hn::Div(hn::Mul(x, half), hn::Add(half, exp2_of_parts(d, rounded, f)));
  }
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE Weight<V> weight(D d, V x) {
    const V log2e = hn::Set(d, 0x1.715476p+0f);
    const V magnitude = hn::Neg(hn::Abs(x));
    const V low = hn::Mul(magnitude, hn::Set(d, 0x1.4ae0c0p-26f));  // the rest of log2(e)
    return logistic(d, magnitude, log2e, low, x, hn::Lt(x, hn::Set(d, -64.0f)));
  }
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V slope(D /*d*/, V /*x*/, const Weight<V>& weight) {
    return hn::Mul(weight.scaled, weight.complement);
  }
};

// (1 + tanh(u)) / 2 is the logistic function of 2 u.
struct GeluTanhVector {
  // 2 u = x (kA + kB x^2) in units of ln(2).
  static constexpr double kA = 2.0 * 0.79788456080286535588 * 1.44269504088896340736;
  static constexpr double kB = kA * 0.044715;

  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE Weight<V> weight(D d, V x) {
    constexpr auto kHighA = static_cast<float>(kA);
    constexpr auto kHighB = static_cast<float>(kB);
    const V a = hn::Set(d, kHighA);
    const V b = hn::Set(d, kHighB);
    // The factor of x as the sum of a rounded one and what rounding lost: errors of the exponent are errors of the
    // result.
    const V square = hn::Mul(x, x);
    const V square_low = exact_mul_sub(d, x, x, square);
    const V product = hn::Mul(b, square);
    const V product_low = exact_mul_sub(d, b, square, product);
    const V factor = hn::Add(a, product);
    const V taken = hn::Sub(factor, a);
    V low = hn::Add(hn::Sub(a, hn::Sub(factor, taken)), hn::Sub(product, taken));
    low = hn::Add(low, product_low);
    low = hn::MulAdd(b, square_low, low);
    low = hn::MulAdd(square, hn::Set(d, static_cast<float>(kB - kHighB)), low);
    low = hn::Add(low, hn::Set(d, static_cast<float>(kA - kHighA)));
    const V magnitude = hn::Neg(hn::Abs(x));
    return logistic(d, magnitude, factor, hn::Mul(magnitude, low), x, hn::Lt(x, hn::Set(d, -8.0f)));
  }
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V value(D d, V x) {
    return weighted(d, x, weight(d, x));
  }
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V slope(D d, V x, const Weight<V>& weight) {
    constexpr double kLn2 = 0.69314718055994530942;
    const V inner = hn::MulAdd(hn::Mul(x, x), hn::Set(d, static_cast<float>(3.0 * kB * kLn2)),
                               hn::Set(d, static_cast<float>(kA * kLn2)));
    const V bell = hn::Mul(weight.scaled, weight.complement);
    return hn::IfThenZeroElse(hn::Eq(bell, hn::Zero(d)), hn::Mul(bell, inner));  // `inner` may be infinite
  }
};

// The weight is the normal distribution: e^(-x^2 / 2) times a smooth function of |x| on the negative side.
struct GeluVector {
  // e^(-x^2 / 2), times 2^kTailScaleLog2 where `is_tail`.
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V bell(D d, V magnitude, hn::Mask<D> is_tail) {
    constexpr double kFactor = -0.5 * 1.44269504088896340736;
    constexpr auto kHigh = static_cast<float>(kFactor);
    const V square = hn::Mul(magnitude, magnitude);
    const V square_low = exact_mul_sub(d, magnitude, magnitude, square);
    const V factor = hn::Set(d, kHigh);
    const V low = hn::MulAdd(square, hn::Set(d, static_cast<float>(kFactor - kHigh)), hn::Mul(square_low, factor));
    return exp2_product(d, square, factor, low, is_tail);
  }

  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V clamped_magnitude(D d, V x) {
    const V largest = hn::Set(d, 15.0f);  // the bell is 0 there, and the square of infinity is no number to subtract
    const V magnitude = hn::Abs(x);
    return hn::IfThenElse(hn::Gt(magnitude, largest), largest, magnitude);  // not Min(), which may lose NaN
  }

  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE Weight<V> weight(D d, V x) {
    const V a = clamped_magnitude(d, x);
    const auto is_negative = hn::Lt(x, hn::Zero(d));
    const auto is_tail = hn::Lt(x, hn::Set(d, -11.0f));
    // erfc(a / sqrt(2)) / 2 * e^(a^2 / 2) on [0, 14.5], relative error 1e-8 with these float32 coefficients; all
    // terms are positive.
    V p = hn::MulAdd(hn::Set(d, 0.00408565346f), a, hn::Set(d, 0.0404427163f));
    p = hn::MulAdd(p, a, hn::Set(d, 0.182692945f));
    p = hn::MulAdd(p, a, hn::Set(d, 0.437598974f));
    p = hn::MulAdd(p, a, hn::Set(d, 0.5f));
    V q = hn::MulAdd(hn::Set(d, 0.0102410922f), a, hn::Set(d, 0.101381429f));
    q = hn::MulAdd(q, a, hn::Set(d, 0.468032181f));
    q = hn::MulAdd(q, a, hn::Set(d, 1.20030892f));
    q = hn::MulAdd(q, a, hn::Set(d, 1.67308283f));
    q = hn::MulAdd(q, a, hn::Set(d, 1.0f));
    const V one = hn::Set(d, 1.0f);
    const V tail = hn::Mul(hn::Div(p, q), bell(d, a, is_tail));
    const V body = hn::Sub(one, tail);
    return {hn::IfThenElse(is_negative, tail, body), hn::IfThenElse(is_negative, body, tail),
            hn::IfThenElse(is_tail, hn::Set(d, kTailUnscale), one)};
  }
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V value(D d, V x) {
    return weighted(d, x, weight(d, x));
  }
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V slope(D d, V x, const Weight<V>& /*weight*/) {
    return hn::Mul(bell(d, clamped_magnitude(d, x), hn::Lt(x, hn::Set(d, -11.0f))), hn::Set(d, 0.39894228040143268f));
  }
};

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ACTIVATION_INL_H_
