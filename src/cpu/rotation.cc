// Frequencies of rotary embeddings.
#include "cpu/rotation.h"

#include <algorithm>
#include <cmath>

namespace heed::cpu {
namespace {

constexpr double kPi = 3.14159265358979323846;

// theta^(-2 i / rotary_dim). A call of few tokens would spend its time in pow(): it is called once per 16 pairs, and
// the products between add up to 2e-15 of relative error.
void fill_powers(double theta, Frequencies& frequencies) {
  const double exponent = -1.0 / frequencies.num_pairs;
  const double step = std::pow(theta, exponent);
  double power = 1.0;
  for (int i = 0; i < frequencies.num_pairs; ++i) {
    power = i % 16 == 0 ? std::pow(theta, exponent * i) : power * step;
    frequencies.quarter_turns[i] = power;
  }
}

// Llama 3.1: long waves turn slower by `scale`, short ones as they are, and those between are blended.
double llama31_scaled(double frequency, const RopeOptions& options) {
  const double periods = options.old_context_len * frequency / (2.0 * kPi);
  const double range = options.high_freq_factor - options.low_freq_factor;
  const double keep = std::clamp((periods - options.low_freq_factor) / range, 0.0, 1.0);
  return keep * frequency + (1.0 - keep) * frequency / options.scale;
}

}  // namespace

Frequencies make_frequencies(int64_t rotary_dim, const RopeOptions& options) {
  Frequencies result;
  result.num_pairs = static_cast<int>(rotary_dim / 2);
  fill_powers(options.theta, result);
  for (int i = 0; i < result.num_pairs; ++i) {
    double& frequency = result.quarter_turns[i];
    frequency = options.is_llama31 ? llama31_scaled(frequency, options) : frequency / options.scale;
    frequency *= 2.0 / kPi;
  }
  return result;
}

}  // namespace heed::cpu
