// Reads what a cubin says about itself. It is an ELF file.
#pragma once

#include <optional>
#include <string_view>

namespace heed::cuda {

inline constexpr const char* kEntryPoint = "heed_kernel";

// The value of a 32-bit constant in device memory, such as "heed_num_threads"; nothing if the cubin has none of that
// name or is damaged.
std::optional<int> cubin_constant(std::string_view cubin, std::string_view name);

}  // namespace heed::cuda
