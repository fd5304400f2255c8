// One kernel in a file: a few lines of text, the compiler's log, the machine code, and a checksum over all of it.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "cuda/jit/jit.h"

namespace heed::cuda {

struct Entry {
  std::string id;  // content_id of the spec and the architecture
  std::string spec;
  std::string arch;
  std::string compiler;  // such as "nvrtc 13.0"
  std::string log;
  std::string cubin;
};

inline constexpr std::string_view kEntrySuffix = ".kernel";

// The file's name. Machine code that is shipped serves machines with any compiler or none, so that name leaves it out.
std::string shipped_entry_name(const std::string& id);
std::string cached_entry_name(const std::string& id, const std::string& nvrtc_version);

// Whether a file's name is one of those two.
bool is_entry_name(std::string_view name);
// Whether it is that of an entry's temporary file or lock: what a killed process leaves.
bool is_leftover_name(std::string_view name);

std::string to_bytes(const Entry& entry);
// Nothing, and why in `reason`, unless the bytes are exactly what to_bytes() made.
std::optional<Entry> parse_entry(std::string_view bytes, std::string& reason);

}  // namespace heed::cuda
