// The portable GPU kernels of gated activations (sm_80 and newer).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/small_problems.h"
#include "core/target.h"
#include "cuda/jit/jit.h"
#include "cuda/sm80_act_and_mul_spec.h"
#include "heed/ops.h"

namespace heed::cuda {

// Why the kernels do not serve the problem on the target; empty if they do.
std::string sm80_act_and_mul_declines(const ActAndMulProblem& problem, const Target& target);
std::string sm80_act_and_mul_bwd_declines(const ActAndMulProblem& problem, const Target& target);

// What is derived from the problem once: the parameters but for the tensors, and the loaded kernels.
std::shared_ptr<void> prepare_sm80_act_and_mul(const ActAndMulProblem& problem);
std::shared_ptr<void> prepare_sm80_act_and_mul_bwd(const ActAndMulProblem& problem);

// Makes the kernels for packed (row-major) operands ready on a device.
void load_sm80_act_and_mul(const ActAndMulProblem& problem, void* prepared, int device);
void load_sm80_act_and_mul_bwd(const ActAndMulProblem& problem, void* prepared, int device);

// One launch: which kernel, with what, on how many blocks (0: nothing is to be done).
struct Sm80ActAndMulPlan {
  Sm80ActAndMulSpec spec;
  Sm80ActAndMulParams params;
  int64_t num_blocks;
};
Sm80ActAndMulPlan plan_sm80_act_and_mul(const ActAndMulProblem& problem, const ActAndMulArgs& args);
Sm80ActAndMulPlan plan_sm80_act_and_mul_bwd(const ActAndMulProblem& problem, const ActAndMulBackwardArgs& args);

// Launches on args.stream.
void sm80_act_and_mul(const ActAndMulProblem& problem, const ActAndMulArgs& args, void* prepared);
void sm80_act_and_mul_bwd(const ActAndMulProblem& problem, const ActAndMulBackwardArgs& args, void* prepared);

// What is compiled ahead of time.
std::vector<KernelSpec> sm80_act_and_mul_common_specs();

}  // namespace heed::cuda
