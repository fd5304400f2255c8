// Chooses the instruction set of the CPU kernels.
#include "cpu/simd.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "heed/heed.h"

namespace heed::cpu {
namespace {

// The fallback: Highway's portable code, which this CPU runs whatever it is. Its name depends on the compiler (SCALAR
// with those that miscompile EMU128), so either name selects it.
constexpr int64_t kFallback = HWY_BASELINE_SCALAR;

// Targets of this build that this CPU runs. Lower bits are better targets.
int64_t usable_targets() { return (hwy::SupportedTargets() & HWY_TARGETS) | kFallback; }

std::string upper(std::string_view text) {
  std::string result(text);
  std::transform(result.begin(), result.end(), result.begin(), [](unsigned char c) { return std::toupper(c); });
  return result;
}

std::vector<std::string> target_names() {
  std::vector<std::string> names;
  for (int64_t rest = usable_targets(); rest != 0; rest &= rest - 1) names.emplace_back(hwy::TargetName(rest & -rest));
  return names;
}

struct Choice {
  hwy::ChosenTarget target;
  std::string name;
  std::string error;  // why the request cannot be met

  // `request`: a target's name, empty for the best.
  void make(std::string_view request, std::string_view source) {
    error.clear();
    const std::string wanted = upper(request);
    for (int64_t rest = usable_targets(); rest != 0; rest &= rest - 1) {
      const int64_t bit = rest & -rest;
      const bool is_match =
          wanted == hwy::TargetName(bit) || (bit == kFallback && (wanted == "EMU128" || wanted == "SCALAR"));
      if (!wanted.empty() && !is_match) continue;
      target.Update(bit);
      name = hwy::TargetName(bit);
      return;
    }
    error = std::string(source) + ": got '" + std::string(request) + "', expected one of";
    for (const std::string& usable : target_names()) error += " " + usable;
  }
};

Choice& choice() {
  static Choice* const made = [] {
    auto* result = new Choice;  // lives as long as the process: other threads may still compute while it ends
    const char* request = std::getenv("HEED_CPU_TARGET");
    result->make(request == nullptr ? "" : request, "HEED_CPU_TARGET");
    return result;
  }();
  return *made;
}

const Choice& valid_choice() {
  const Choice& made = choice();
  if (!made.error.empty()) throw ValueError(made.error);
  return made;
}

}  // namespace

const hwy::ChosenTarget& chosen_target() { return valid_choice().target; }

void force_target(std::string_view name) {
  choice().make(name, "force_target");
  valid_choice();
}

}  // namespace heed::cpu

namespace heed {

std::string cpu_target() { return cpu::valid_choice().name; }
std::vector<std::string> cpu_targets() { return cpu::target_names(); }

}  // namespace heed
