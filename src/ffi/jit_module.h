// What the modules of heed.jit are made of: functions on tensors that the caller owns, held by name.
#pragma once

#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "heed/heed.h"

namespace heed::ffi {

// What heed's messages call an operand, and what a function calls the argument that it came from.
struct Rename {
  std::string_view operand;
  std::string_view argument;
};

using Arguments = std::span<const TVMFFIAny>;

struct ModuleFunction {
  std::string name;
  std::vector<std::string> parameters;      // names, in order: as many arguments does a call have
  std::vector<Rename> renames;              // the operands that errors of `run` name
  std::function<void(Arguments)> run = {};  // throws what heed throws
};

tvm::ffi::Module make_module(std::vector<ModuleFunction> functions);

}  // namespace heed::ffi
