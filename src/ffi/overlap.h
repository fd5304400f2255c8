// Memory that a caller hands over twice.
#pragma once

#include <initializer_list>
#include <string_view>

#include "heed/heed.h"

namespace heed::ffi {

struct NamedView {
  std::string_view name;
  const TensorView& view;  // undefined: absent
  // Of an output: the input that it may be, with the same start, shape and strides. Empty: none.
  std::string_view may_be = {};
};

// Throws ValueError if an output shares memory with an input or with another output. Views of one tensor that take
// turns in its memory, such as some heads of each token, share none.
void check_memory(std::initializer_list<NamedView> inputs, std::initializer_list<NamedView> outputs);

}  // namespace heed::ffi
