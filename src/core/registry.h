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
};

template <class KernelType>
struct Resolution {
  const KernelType* chosen = nullptr;
  int64_t workspace_bytes = 0;
  std::vector<Candidate> candidates;  // every row of the table, in order
};

// Pure: needs no driver, no GPU and no tensor memory.
template <class KernelType, size_t kCount, class Problem>
Resolution<KernelType> resolve_in(const KernelType (&table)[kCount], const Problem& problem, const Target& target) {
  Resolution<KernelType> resolution;
  for (const KernelType& kernel : table) {
    std::string reason;
    if (problem.backend != Backend::kAuto && problem.backend != kernel.backend) {
      reason = "not the backend that was asked for";
    } else {
      reason = kernel.declines(problem, target);
    }
    if (reason.empty() && resolution.chosen == nullptr) {
      resolution.chosen = &kernel;
    } else if (reason.empty()) {
      reason = "serves the problem too, but " + std::string(resolution.chosen->name) + " comes first";
    }
    resolution.candidates.push_back({std::string(kernel.name), std::string(kernel.backend_name), std::move(reason)});
  }
  return resolution;
}

}  // namespace heed
