// Kernel candidates of one op and how one of them is chosen: in order, the first that does not decline.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/target.h"
#include "heed/heed.h"

namespace heed {

// One row of an op's table. `run` is null for a family that this build does not contain (it then always declines).
template <class Problem, class Args>
struct Kernel {
  std::string_view name;
  Backend backend;
  std::string_view backend_name;
  std::string (*declines)(const Problem&, const Target&);  // the reason, empty if it serves the problem
  void (*run)(const Problem&, const Args&, void* prepared);
  // What the kernel derives once from a problem (null: nothing), and how that is made ready on a CUDA device.
  std::shared_ptr<void> (*prepare)(const Problem&) = nullptr;
  void (*load)(const Problem&, void* prepared, int device) = nullptr;
  // Floats of scratch memory for each query head of each leading index and batch row (null: none).
  int64_t (*workspace)(const Problem&) = nullptr;

  using ProblemType = Problem;
};

template <class KernelType>
struct Resolution {
  const KernelType* chosen = nullptr;
  int64_t workspace_per_head = 0;     // floats, of the chosen one
  int64_t workspace_bytes = 0;        // in all
  std::vector<Candidate> candidates;  // every row of the table, in order
};

// A problem with the kernel that serves it: what a compiled program's text stands for.
template <class KernelType>
struct Prepared {
  typename KernelType::ProblemType problem;
  const KernelType* kernel = nullptr;
  int64_t workspace_bytes = 0;
  std::shared_ptr<void> state;  // the kernel's own
};

// Pure: needs no driver, no GPU and no tensor memory.
template <class KernelType, size_t kCount, class Problem>
Resolution<KernelType> resolve_in(const KernelType (&table)[kCount], const Problem& problem, const Target& target) {
  Resolution<KernelType> resolution;
  for (const KernelType& kernel : table) {
    std::string reason;
    int64_t floats = 0, bytes = 0;
    if (problem.asked_backend() != Backend::kAuto && problem.asked_backend() != kernel.backend) {
      reason = "not the backend that was asked for";
    } else {
      reason = kernel.declines(problem, target);
    }
    if (reason.empty() && kernel.workspace != nullptr) {
      floats = kernel.workspace(problem);
      if (__builtin_mul_overflow(floats, problem.num_heads_in_all(), &bytes) ||
          __builtin_mul_overflow(bytes, int64_t{4}, &bytes)) {
        reason = "needs more workspace than 64 bits can count";
      }
    }
    if (reason.empty() && resolution.chosen == nullptr) {
      resolution.chosen = &kernel;
      resolution.workspace_per_head = floats;
      resolution.workspace_bytes = bytes;
    } else if (reason.empty()) {
      reason = "serves the problem too, but " + std::string(resolution.chosen->name) + " comes first";
    }
    resolution.candidates.push_back({std::string(kernel.name), std::string(kernel.backend_name), std::move(reason)});
  }
  return resolution;
}

}  // namespace heed
