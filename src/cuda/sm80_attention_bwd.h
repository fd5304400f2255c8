// The portable GPU kernels of attention backward (mma.sync; sm_80 and newer).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/attention_bwd_problem.h"
#include "core/target.h"
#include "cuda/jit/jit.h"
#include "heed/heed.h"

namespace heed::cuda {

// Why the kernels do not serve the problem on the target; empty if they do.
std::string sm80_attention_bwd_declines(const AttentionBwdProblem& problem, const Target& target);

// Floats of workspace for each query head of each leading index and batch row.
int64_t sm80_attention_bwd_workspace(const AttentionBwdProblem& problem);

// What is derived from the problem once: the parameters but for the tensors, and the loaded kernels.
std::shared_ptr<void> prepare_sm80_attention_bwd(const AttentionBwdProblem& problem);

// Makes the kernels for packed (row-major) operands ready on a device.
void load_sm80_attention_bwd(const AttentionBwdProblem& problem, void* prepared, int device);

// Launches on args.stream.
void sm80_attention_bwd(const AttentionBwdProblem& problem, const AttentionBackwardArgs& args, void* prepared);

// What is compiled ahead of time.
std::vector<KernelSpec> sm80_attention_bwd_common_specs();

}  // namespace heed::cuda
