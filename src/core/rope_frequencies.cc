// See rope_frequencies.h.
#include "core/rope_frequencies.h"

#include <cmath>
#include <numbers>

namespace heed {
namespace {

// Frequencies with fewer than `low_freq_factor` periods in the old context are divided by the scale, those with more
// than `high_freq_factor` are kept, and the others are blended between.
double llama31_frequency(double frequency, const RopeOptions& options) {
  const double periods = options.old_context_len * frequency / (2.0 * std::numbers::pi);
  if (periods < options.low_freq_factor) return frequency / options.scale;
  if (periods > options.high_freq_factor) return frequency;
  const double kept = (periods - options.low_freq_factor) / (options.high_freq_factor - options.low_freq_factor);
  return (1.0 - kept) * frequency / options.scale + kept * frequency;
}

}  // namespace

std::vector<double> rope_frequencies(int64_t rotary_dim, const RopeOptions& options) {
  std::vector<double> frequencies(static_cast<size_t>(rotary_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double frequency = std::pow(options.theta, -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim));
    frequencies[i] = options.is_llama31 ? llama31_frequency(frequency, options) : frequency / options.scale;
  }
  return frequencies;
}

}  // namespace heed
