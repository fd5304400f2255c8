// What the kernels of elementwise and row-wise ops have in common: rows of operands in any layout, shared by the host
// side (row_host.h) and the device code (device/rows.cuh). Includes nothing from std: NVRTC compiles it too.
#pragma once

#include "cuda/attention_spec.h"

namespace heed::cuda {

// Division by a number that is known before the launch, as a multiplication (Granlund and Montgomery 1994). It serves
// numbers below 2^31.
struct Divisor {
  unsigned divisor, multiplier, shift;
};

HEED_HOST_DEVICE constexpr Divisor make_divisor(unsigned divisor) {
  unsigned shift = 0;
  while (shift < 31 && (1u << shift) < divisor) ++shift;
  const unsigned long long rest = (1ull << shift) - divisor;
  return {divisor, static_cast<unsigned>((rest << 32) / divisor + 1), shift};
}

inline constexpr int kMaxRopePairs = 128;  // of a head

inline constexpr int kMaxRowAxes = 11;  // all axes of a tensor but the last

// Axes that several operands share, outermost first, and where an index over all of them lies in each operand.
template <int kNumOperands>
struct RowAxes {
  int count;                                     // after neighbours were merged where every operand allows it
  Divisor sizes[kMaxRowAxes];                    // each below 2^31
  long long strides[kNumOperands][kMaxRowAxes];  // in elements
};

// Elements that a thread takes at once: 16 bytes, or single ones where rows are not aligned.
HEED_HOST_DEVICE constexpr int chunk_width(Element element, bool is_aligned) {
  return is_aligned ? 16 / bytes_of(element) : 1;
}

}  // namespace heed::cuda
