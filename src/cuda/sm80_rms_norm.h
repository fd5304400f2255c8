// The portable GPU kernels of RMS norms (sm_80 and newer).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/small_problems.h"
#include "core/target.h"
#include "cuda/jit/jit.h"
#include "cuda/sm80_rms_norm_spec.h"
#include "heed/ops.h"

namespace heed::cuda {

// Why the kernels do not serve the problem on the target; empty if they do.
std::string sm80_rms_norm_declines(const RmsNormProblem& problem, const Target& target);
std::string sm80_rms_norm_bwd_declines(const RmsNormProblem& problem, const Target& target);

// Floats of workspace for each leading index.
int64_t sm80_rms_norm_bwd_workspace(const RmsNormProblem& problem);

// What is derived from the problem once: the parameters but for the tensors, and the loaded kernels.
std::shared_ptr<void> prepare_sm80_rms_norm(const RmsNormProblem& problem);
std::shared_ptr<void> prepare_sm80_rms_norm_bwd(const RmsNormProblem& problem);

// Makes the kernels for packed (row-major) operands ready on a device.
void load_sm80_rms_norm(const RmsNormProblem& problem, void* prepared, int device);
void load_sm80_rms_norm_bwd(const RmsNormProblem& problem, void* prepared, int device);

// One or two launches: which kernel, with what, on how many blocks (0: nothing is to be done).
struct Sm80RmsNormPlan {
  Sm80RmsNormSpec spec;
  Sm80RmsNormParams params;
  int64_t num_blocks;
  int64_t num_sum_blocks;  // of the pass that adds up dweight, backward
};
Sm80RmsNormPlan plan_sm80_rms_norm(const RmsNormProblem& problem, const RmsNormArgs& args);
Sm80RmsNormPlan plan_sm80_rms_norm_bwd(const RmsNormProblem& problem, const RmsNormBackwardArgs& args);

// Launches on args.stream.
void sm80_rms_norm(const RmsNormProblem& problem, const RmsNormArgs& args, void* prepared);
void sm80_rms_norm_bwd(const RmsNormProblem& problem, const RmsNormBackwardArgs& args, void* prepared);

// What is compiled ahead of time.
std::vector<KernelSpec> sm80_rms_norm_common_specs();

}  // namespace heed::cuda
