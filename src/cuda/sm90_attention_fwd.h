// The Hopper kernel of attention forward (WGMMA and TMA; sm_90a alone).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/problem.h"
#include "core/target.h"
#include "cuda/jit/jit.h"

namespace heed::cuda {

// Why the kernel does not serve the problem on the target; empty if it does.
std::string sm90_attention_fwd_declines(const AttentionProblem& problem, const Target& target);

// Floats of scratch memory for each query head of each leading index and batch row: room for the counter of tiles,
// which a call has one of, on any of the devices that heads are divided over, and for parts of tiles.
int64_t sm90_attention_fwd_workspace(const AttentionProblem& problem);

// What is derived from the problem once: the parameters but for the tensors, and the loaded kernel.
std::shared_ptr<void> prepare_sm90_attention_fwd(const AttentionProblem& problem);

// Makes the kernel ready on a device.
void load_sm90_attention_fwd(const AttentionProblem& problem, void* prepared, int device);

// Launches on args.stream. Only launches if the kernel was loaded on the device of `args.q`. Operands that lie in
// memory as TMA cannot copy them go to the portable kernel, which is loaded at the first such call; if this kernel was
// asked for by name, they are a ValueError.
void sm90_attention_fwd(const AttentionProblem& problem, const AttentionForwardArgs& args, void* prepared);

// The kernels of common problems, for the ahead-of-time list of sm_90a.
std::vector<KernelSpec> sm90_attention_fwd_common_specs();

}  // namespace heed::cuda
