// The kernels that are compiled before heed is shipped: what common calls get on a GPU, ready without a compiler.
#pragma once

#include <string>
#include <vector>

#include "cuda/jit/jit.h"

namespace heed::cuda {

// Of one architecture, such as "sm_90a". Throws ValueError for what is not the name of one.
HEED_API std::vector<KernelSpec> ahead_of_time_list(const std::string& arch);

}  // namespace heed::cuda
