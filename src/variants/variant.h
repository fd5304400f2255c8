// What every file in src/variants/ builds on.
//
// A variant is a mask or a score function that every attention kernel shares: CPU kernels (once per instruction set),
// CUDA device code (compiled by NVRTC, so no standard header may be included here) and tests. There are two kinds:
//   - index arithmetic (band.h, segment_ids.h) and per-row scalars (sinks.h): plain functions;
//   - score formulas (softcap.h, alibi.h): templates over a math policy, an object with set, mul, sub, abs and tanh for
//     whatever the kernel calculates with: a float, or a vector of floats. Vector code must be compiled once per
//     instruction set, so these headers are re-included like any Highway "-inl.h" file, and their namespace is
//     heed::variants::HWY_NAMESPACE there and heed::variants everywhere else.
#if defined(HEED_VARIANTS_VARIANT_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_VARIANTS_VARIANT_H_
#undef HEED_VARIANTS_VARIANT_H_
#else
#define HEED_VARIANTS_VARIANT_H_
#endif

#include "variants/host_device.h"

#undef HEED_VARIANT_BEGIN
#undef HEED_VARIANT_END
#ifdef HWY_BEFORE_NAMESPACE
#define HEED_VARIANT_BEGIN() \
  HWY_BEFORE_NAMESPACE();    \
  namespace heed::variants::HWY_NAMESPACE {
#define HEED_VARIANT_END() \
  }                        \
  HWY_AFTER_NAMESPACE();
#else
#define HEED_VARIANT_BEGIN() namespace heed::variants {
#define HEED_VARIANT_END() }
#endif

#endif  // HEED_VARIANTS_VARIANT_H_
