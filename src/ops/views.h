// Checks of the views that a caller hands over, against what the problem says of them. Shared by every op.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/problem.h"
#include "heed/heed.h"

namespace heed {

// The view's dtype and shape; an undefined view gives an absent spec. Checks what the type system lets through: ranks
// and enumerators out of range.
HEED_API TensorSpec spec_of(std::string_view name, const TensorView& view);

// One view's dtype, shape and memory against what the problem says. `device` is that of the operand
// `first`.
void check_view(std::string_view name, const TensorView& view, DType dtype, const std::vector<int64_t>& shape,
                Device device, bool is_output, std::string_view first = "q");

// Whether the view is scratch memory of at least `bytes`. Throws if it is there and is no scratch memory of any size:
// contiguous float32, aligned to 16 bytes. If `bytes` is 0, anything suffices.
bool suffices_as_workspace(const TensorView& view, int64_t bytes, Device device, std::string_view first = "q");

// The same for a kernel that needs it: throws if it does not suffice.
void check_workspace(const TensorView& view, int64_t bytes, Device device, std::string_view first = "q");

}  // namespace heed
