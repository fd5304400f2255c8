// The CPU kernel of rotary embeddings.
#pragma once

#include <string>

#include "core/small_problems.h"
#include "core/target.h"
#include "heed/ops.h"

namespace heed::cpu {

// Why this kernel cannot serve the problem on the target; empty if it can.
std::string rope_declines(const RopeProblem& problem, const Target& target);

// Runs on the shared thread arena and returns when the results are written. Both must agree (validated by the op);
// strides are arbitrary, leading axes of size 1 broadcast.
void rope(const RopeProblem& problem, const RopeArgs& args);

}  // namespace heed::cpu
