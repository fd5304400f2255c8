// The CPU attention forward kernel.
#pragma once

#include <string>

#include "core/problem.h"
#include "core/target.h"
#include "heed/heed.h"

namespace heed::cpu {

// Why this kernel cannot serve the problem on the target; empty if it can.
std::string attention_fwd_declines(const AttentionProblem& problem, const Target& target);

// Runs on the shared thread arena and returns when `args.out` (and `args.lse`, if defined) are written.
// Both must agree (validated by the op); strides are arbitrary, leading axes of size 1 broadcast.
void attention_fwd(const AttentionProblem& problem, const AttentionForwardArgs& args);

}  // namespace heed::cpu
