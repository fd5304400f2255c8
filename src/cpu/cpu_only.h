// Why the CPU kernels that serve every problem decline a target.
#pragma once

#include <string>

#include "core/target.h"

namespace heed::cpu {

inline std::string declines_other_targets(const Target& target) {
  if (!target.is_cpu) return "runs on the CPU only, and the target is " + target.name;
  return "";
}

}  // namespace heed::cpu
