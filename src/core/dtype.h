// The dtype table: one row per storage dtype. A new dtype with an existing conversion is one more row here.
#pragma once

#include <cstdint>
#include <string_view>

#include "heed/heed.h"

namespace heed {

struct DTypeInfo {
  DType dtype;
  std::string_view name;
  int32_t size_bytes;
  bool is_float;
};

inline constexpr DTypeInfo kDTypes[] = {
    {DType::kFloat32, "float32", 4, true},
    {DType::kFloat16, "float16", 2, true},
    {DType::kBFloat16, "bfloat16", 2, true},
    {DType::kInt32, "int32", 4, false},
};

constexpr const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

// The dtype of that name, or nullptr if there is no row for it.
constexpr const DTypeInfo* find_dtype(std::string_view name) {
  for (const DTypeInfo& row : kDTypes) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

}  // namespace heed
