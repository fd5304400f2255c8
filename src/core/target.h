// What a problem is resolved for: the CPU, or a GPU architecture that need not be present.
#pragma once

#include <string>
#include <string_view>

#include "heed/heed.h"

namespace heed {

struct Target {
  bool is_cpu = true;
  int sm = 0;  // compute capability times ten, such as 90
  std::string name = "cpu";
};

// "cpu"; "sm_80", "sm_90a", ...; "cuda" for a GPU whose architecture is not known (sm 0). Throws ValueError for
// anything else.
HEED_API Target parse_target(std::string_view name);

}  // namespace heed
