// The CPU kernels of gated activations.
#pragma once

#include <string>

#include "core/small_problems.h"
#include "core/target.h"
#include "heed/ops.h"

namespace heed::cpu {

// Why these kernels cannot serve the problem on the target; empty if they can.
std::string act_and_mul_declines(const ActAndMulProblem& problem, const Target& target);
std::string act_and_mul_bwd_declines(const ActAndMulProblem& problem, const Target& target);

// Runs on the shared thread arena and returns when the results are written. Both must agree (validated by the op);
// strides are arbitrary, leading axes of size 1 broadcast.
void act_and_mul(const ActAndMulProblem& problem, const ActAndMulArgs& args);
void act_and_mul_bwd(const ActAndMulProblem& problem, const ActAndMulBackwardArgs& args);

}  // namespace heed::cpu
