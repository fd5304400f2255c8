// Folders that depend on where the library lies and on where Python looks for packages.
#pragma once

#include <string>
#include <vector>

#include "heed/heed.h"

namespace heed::cuda {

// Folders that Python packages are installed in, where the nvidia-cuda-nvrtc wheel may be. Besides those that were set,
// the one that heed itself is in.
std::vector<std::string> site_dirs();
HEED_API void set_site_dirs(std::vector<std::string> folders);

// Folders with cubins that were shipped: HEED_AOT_DIR, then heed-kernels beside the library.
HEED_API std::vector<std::string> ahead_of_time_dirs();

}  // namespace heed::cuda
