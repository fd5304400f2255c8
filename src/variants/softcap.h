// Logit soft cap: score = softcap * tanh(scale * qk / softcap).
#include "variants/variant.h"

#if defined(HEED_VARIANTS_SOFTCAP_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_VARIANTS_SOFTCAP_H_
#undef HEED_VARIANTS_SOFTCAP_H_
#else
#define HEED_VARIANTS_SOFTCAP_H_
#endif

HEED_VARIANT_BEGIN()

// `qk`: raw product of query and key. `scale_over_cap`: scale / softcap, finite.
template <class Math, class T>
HEED_HOST_DEVICE inline T soft_cap_tanh(const Math& math, T qk, float scale_over_cap) {
  return math.tanh(math.mul(qk, math.set(scale_over_cap)));
}

template <class Math, class T>
HEED_HOST_DEVICE inline T soft_capped(const Math& math, T qk, float scale_over_cap, float softcap) {
  return math.mul(math.set(softcap), soft_cap_tanh(math, qk, scale_over_cap));
}

// The derivative of the capped score by the score before the cap; `tanh`: of soft_cap_tanh.
template <class Math, class T>
HEED_HOST_DEVICE inline T soft_cap_derivative(const Math& math, T tanh) {
  return math.sub(math.set(1.0f), math.mul(tanh, tanh));
}

HEED_VARIANT_END()

#endif  // HEED_VARIANTS_SOFTCAP_H_
