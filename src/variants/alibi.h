// ALiBi: score -= slope * |distance of the key from the query's diagonal|. Symmetric, so it also serves attention that
// is not causal. Applied after the soft cap.
#include "variants/variant.h"

#if defined(HEED_VARIANTS_ALIBI_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_VARIANTS_ALIBI_H_
#undef HEED_VARIANTS_ALIBI_H_
#else
#define HEED_VARIANTS_ALIBI_H_
#endif

HEED_VARIANT_BEGIN()

// `distance`: diagonal(i) - j, of either sign; `slope`: of the query's head.
template <class Math, class T>
HEED_HOST_DEVICE inline T alibi_biased(const Math& math, T score, T slope, T distance) {
  return math.sub(score, math.mul(slope, math.abs(distance)));
}

HEED_VARIANT_END()

#endif  // HEED_VARIANTS_ALIBI_H_
