// The store of compiled kernels as the command line sees it: filling, listing, checking and emptying it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/jit/jit.h"

namespace heed::cuda {

// What is told besides the kernel itself: where its file is (empty: nowhere) and under what name.
struct StoredKernel {
  CompiledKernel kernel;
  std::string file;
};

// compile(), silent on a terminal.
HEED_API StoredKernel compile_to_cache(const KernelSpec& spec, const std::string& arch);

// Puts the kernel into a folder that is to be shipped (HEED_AOT_DIR, or the wheel's), compiled unless it is there.
// Throws std::runtime_error if it does not compile or cannot be written.
HEED_API StoredKernel compile_to_folder(const KernelSpec& spec, const std::string& arch, const std::string& path);

// The folder of the user's cache, made if need be; empty if none can be had.
HEED_API std::string cache_dir();

// One file of a folder of kernels.
struct StoredFile {
  std::string name;
  int64_t bytes = 0;
  std::string spec, arch, compiler;  // of an entry that can be read
  std::string error;                 // why it cannot
};
// Every kernel in the user's cache, or in the folder if one is given, checksums verified; sorted by spec.
HEED_API std::vector<StoredFile> stored_files(const std::string& path = "");

// Removes damaged kernels and what killed processes left, or everything. Returns the number of files. No other file is
// touched.
HEED_API int64_t remove_stored_files(bool only_damaged);

// Reads from the cubin how it is launched. Nothing, and why in `reason`, if it does not say.
std::optional<CompiledKernel> to_compiled_kernel(std::string cubin, std::string log, std::string& reason);

}  // namespace heed::cuda
