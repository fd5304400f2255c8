// The portable GPU kernel of rotary embeddings (sm_80 and newer).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/small_problems.h"
#include "core/target.h"
#include "cuda/jit/jit.h"
#include "cuda/sm80_rope_spec.h"
#include "heed/ops.h"

namespace heed::cuda {

// Why the kernel does not serve the problem on the target; empty if it does.
std::string sm80_rope_declines(const RopeProblem& problem, const Target& target);

// What is derived from the problem once: the parameters but for the tensors, and the loaded kernels.
std::shared_ptr<void> prepare_sm80_rope(const RopeProblem& problem);

// Makes the kernels for packed (row-major) operands ready on a device.
void load_sm80_rope(const RopeProblem& problem, void* prepared, int device);

// The parameters but for the tensors: the frequencies are computed once.
Sm80RopeParams sm80_rope_params(const RopeProblem& problem);

// One launch: which kernel, with what, on how many blocks (0: nothing is to be done).
struct Sm80RopePlan {
  Sm80RopeSpec spec;
  Sm80RopeParams params;
  int64_t num_blocks;
};
Sm80RopePlan plan_sm80_rope(const RopeProblem& problem, const RopeArgs& args, const Sm80RopeParams& params_of_problem);

// Launches on args.stream.
void sm80_rope(const RopeProblem& problem, const RopeArgs& args, void* prepared);

// What is compiled ahead of time.
std::vector<KernelSpec> sm80_rope_common_specs();

}  // namespace heed::cuda
