// What the stages of every op share: the target of a call, the reason of a family that this build lacks, the error if
// nothing serves a problem, and the tables of problems that have been prepared.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "core/registry.h"
#include "core/target.h"
#include "core/text_table.h"
#include "cuda/device_target.h"
#include "heed/heed.h"

namespace heed {

// The target of a call whose tensors are on the device.
inline Target target_of(Device device) {
  return device.type == DeviceType::kCpu ? Target{} : cuda_target(device.index);
}

// An op without a kernel of Hopper's own has its row already, so that a caller learns why it does not serve.
template <class Problem>
std::string sm90_declines(const Problem& problem, const Target& target) {
  if (target.is_cpu || (target.sm != 0 && target.sm != 90)) {
    return "needs an NVIDIA Hopper GPU (sm_90a), and the target is " + target.name;
  }
  std::string reason = "this version of heed has no such kernel for Hopper alone";
  if (problem.asked_backend() == Backend::kSm90) reason += " (sm80, or no backend at all, serves Hopper too)";
  return reason;
}

// The kernel that was chosen. Throws UnsupportedError with every candidate's reason if there is none.
template <class KernelType>
const KernelType* require_kernel(const Resolution<KernelType>& resolution, std::string_view op,
                                 const std::string& problem, const Target& target) {
  if (resolution.chosen != nullptr) return resolution.chosen;
  std::string message = "no kernel serves this " + std::string(op) + " on target " + target.name + ":";
  for (const Candidate& candidate : resolution.candidates) {
    message += "\n  " + candidate.name + ": " + candidate.reason;
  }
  throw UnsupportedError(message + "\n  problem: " + problem, resolution.candidates);
}

// Problems that have been prepared, by their text: one table for the CPU and one for each generation of GPUs. Finding
// is one lock-free lookup; a table keeps a bounded number of texts, and past that a text is prepared anew at each call.
// To be made with `new` and never destroyed: other threads may still compute while the process ends.
template <class PreparedType>
class PreparedTables {
 public:
  // `make` parses, validates and resolves the text if it was not seen before.
  template <class Make>
  std::shared_ptr<const PreparedType> find_or_make(std::string_view text, const Target& target, const Make& make) {
    const size_t index = target.is_cpu ? 0 : 1 + static_cast<size_t>(target.sm) % (kNumTables - 1);
    std::call_once(once_[index], [&] { tables_[index] = std::make_unique<TextTable<PreparedType>>(); });
    TextTable<PreparedType>& table = *tables_[index];
    if (std::shared_ptr<const PreparedType> known = table.find(text)) return known;
    return table.insert(text, std::make_shared<const PreparedType>(make()));
  }

 private:
  static constexpr size_t kNumTables = 128;

  std::array<std::unique_ptr<TextTable<PreparedType>>, kNumTables> tables_;
  std::array<std::once_flag, kNumTables> once_;
};

}  // namespace heed
