// The CPU kernel of attention of one query.
#pragma once

#include <cstdint>
#include <string>

#include "core/small_problems.h"
#include "core/target.h"
#include "heed/ops.h"

namespace heed::cpu {

// Why this kernel cannot serve the problem on the target; empty if it can.
std::string attention_decode_declines(const AttentionDecodeProblem& problem, const Target& target);

// Floats of workspace for each query head of each leading index.
int64_t attention_decode_workspace(const AttentionDecodeProblem& problem);

// Runs on the shared thread arena and returns when the results are written. Both must agree (validated by the op);
// strides are arbitrary, leading axes of size 1 broadcast.
void attention_decode(const AttentionDecodeProblem& problem, const SingleDecodeArgs& args);

}  // namespace heed::cpu
