// The portable GPU kernel of attention of one query (sm_80 and newer).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/small_problems.h"
#include "core/target.h"
#include "cuda/jit/jit.h"
#include "heed/ops.h"

namespace heed::cuda {

// Why the kernel does not serve the problem on the target; empty if it does.
std::string sm80_attention_decode_declines(const AttentionDecodeProblem& problem, const Target& target);

// Floats of workspace for each query head of each leading index.
int64_t sm80_attention_decode_workspace(const AttentionDecodeProblem& problem);

// What is derived from the problem once: the parameters but for the tensors, and the loaded kernels.
std::shared_ptr<void> prepare_sm80_attention_decode(const AttentionDecodeProblem& problem);

// Makes the kernels for packed (row-major) operands ready on a device.
void load_sm80_attention_decode(const AttentionDecodeProblem& problem, void* prepared, int device);

// Launches on args.stream.
void sm80_attention_decode(const AttentionDecodeProblem& problem, const SingleDecodeArgs& args, void* prepared);

// What is compiled ahead of time.
std::vector<KernelSpec> sm80_attention_decode_common_specs();

}  // namespace heed::cuda
