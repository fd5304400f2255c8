// NVRTC: finding it and running it.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cuda/jit/jit.h"

namespace heed::cuda {

// Where NVRTC was found and which it is, such as "nvrtc 13.0". Loads the library only if the version cannot be told
// from the names of the files beside it: a lookup that finds its kernel on a disk needs no compiler.
struct NvrtcInfo {
  std::string path;     // a file, or a name that the loader resolves
  std::string version;  // "13.0"
};

// The first NVRTC of the search order; nothing if there is none, with the places looked at and why each failed in
// `searched` (one per line).
HEED_API std::optional<NvrtcInfo> find_nvrtc(std::string* searched = nullptr);

// Compiles. Throws std::runtime_error with the compiler's log, the spec and the flags if that fails.
struct Compilation {
  std::string cubin;
  std::string log;
};
Compilation run_nvrtc(const KernelSpec& spec, const std::string& arch);

}  // namespace heed::cuda
