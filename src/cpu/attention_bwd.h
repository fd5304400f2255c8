// The CPU attention backward kernel.
#pragma once

#include <cstdint>
#include <string>

#include "core/attention_bwd_problem.h"
#include "core/target.h"
#include "heed/heed.h"

namespace heed::cpu {

// Why this kernel cannot serve the problem on the target; empty if it can.
std::string attention_bwd_declines(const AttentionBwdProblem& problem, const Target& target);

// Floats of workspace for each query head of each leading index and batch row.
int64_t attention_bwd_workspace(const AttentionBwdProblem& problem);

// Runs on the shared thread arena and returns when the gradients are written. Both must agree (validated by the op);
// strides are arbitrary, leading axes of size 1 broadcast.
void attention_bwd(const AttentionBwdProblem& problem, const AttentionBackwardArgs& args);

}  // namespace heed::cpu
