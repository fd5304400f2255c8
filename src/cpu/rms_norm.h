// The CPU kernels of RMS norms.
#pragma once

#include <cstdint>
#include <string>

#include "core/small_problems.h"
#include "core/target.h"
#include "heed/ops.h"

namespace heed::cpu {

// Why these kernels cannot serve the problem on the target; empty if they can.
std::string rms_norm_declines(const RmsNormProblem& problem, const Target& target);
std::string rms_norm_bwd_declines(const RmsNormProblem& problem, const Target& target);

// Floats of workspace for each leading index.
int64_t rms_norm_bwd_workspace(const RmsNormProblem& problem);

// Runs on the shared thread arena and returns when the results are written. Both must agree (validated by the op);
// strides are arbitrary, leading axes of size 1 broadcast.
void rms_norm(const RmsNormProblem& problem, const RmsNormArgs& args);
void rms_norm_bwd(const RmsNormProblem& problem, const RmsNormBackwardArgs& args);

}  // namespace heed::cpu
