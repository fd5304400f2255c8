// The frequencies of rotary embeddings, for every backend.
#pragma once

#include <cstdint>
#include <vector>

#include "heed/ops.h"

namespace heed {

// Radians that each pair turns from one position to the next: options.theta^(-2i / rotary_dim) / options.scale, or as
// Llama 3.1 has it. rotary_dim / 2 of them.
std::vector<double> rope_frequencies(int64_t rotary_dim, const RopeOptions& options);

}  // namespace heed
