// The device sources inside the library, and what exactly is compiled for a kernel.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/jit/jit.h"

namespace heed::cuda {

// A device header as the build embedded it. The table is generated (cmake/EmbedSources.cmake), sorted by path.
struct EmbeddedSource {
  std::string_view path;    // relative to src/, as it is included: "cuda/device/ptx.cuh"
  std::string_view text;    // null-terminated
  std::string_view sha256;  // of the text, in hexadecimal
};
std::span<const EmbeddedSource> embedded_sources();
const EmbeddedSource* find_source(std::string_view path);  // null if there is none

// The family's header and all that it includes, directly or not, sorted by path.
std::vector<const EmbeddedSource*> transitive_headers(std::string_view family);

// The source that is compiled: includes the family, names the instance, defines the entry point.
std::string entry_source(const KernelSpec& spec);

// The compiler's flags.
std::vector<std::string> compile_flags(std::string_view arch);

// Throws ValueError unless the spec names a family of this build and is one line.
void check_spec(const KernelSpec& spec);
// Throws ValueError unless it looks like "sm_90a".
void check_arch(std::string_view arch);

// What the machine code depends on, the compiler's version excepted: 32 hexadecimal digits.
std::string content_id(const KernelSpec& spec, std::string_view arch);

}  // namespace heed::cuda
