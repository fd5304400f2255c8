// What a CUDA device is as a target of resolution.
#pragma once

#include "core/target.h"

namespace heed {

// The target for CUDA's device of that ordinal, such as sm_90a. Asks the driver once per device.
HEED_API const Target& cuda_target(int device);

}  // namespace heed
