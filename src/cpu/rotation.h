// Rotary embeddings: the frequencies of the pairs, whatever the instruction set.
#pragma once

#include <array>
#include <cstdint>

#include "heed/ops.h"

namespace heed::cpu {

inline constexpr int kMaxRotaryPairs = 128;

// Pair i turns by quarter_turns[i] quarters of a circle per position. Doubles: the angle of position 2^31 is then exact
// to 1e-6.
struct Frequencies {
  int num_pairs = 0;
  std::array<double, kMaxRotaryPairs> quarter_turns{};
};

// Of `rotary_dim` elements, scaled as the options say (their own rotary_dim does not count).
Frequencies make_frequencies(int64_t rotary_dim, const RopeOptions& options);

}  // namespace heed::cpu
