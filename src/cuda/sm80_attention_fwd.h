// The portable GPU kernel of attention forward (mma.sync; sm_80 and newer).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/problem.h"
#include "core/target.h"
#include "cuda/jit/jit.h"

namespace heed::cuda {

// Why the kernel does not serve the problem on the target; empty if it does.
std::string sm80_attention_fwd_declines(const AttentionProblem& problem, const Target& target);

// What is derived from the problem once: the parameters but for the tensors, and the loaded kernels.
std::shared_ptr<void> prepare_sm80_attention_fwd(const AttentionProblem& problem);

// Makes the kernel for packed (row-major) operands ready on a device.
void load_sm80_attention_fwd(const AttentionProblem& problem, void* prepared, int device);

// Launches on args.stream. Only launches if the kernel was loaded on the device of `args.q`; operands whose rows are
// not aligned to 16 bytes have a kernel of their own, which is loaded at the first such call.
void sm80_attention_fwd(const AttentionProblem& problem, const AttentionForwardArgs& args, void* prepared);

// The kernels of common problems, for the ahead-of-time list.
std::vector<KernelSpec> sm80_attention_fwd_common_specs();

}  // namespace heed::cuda
