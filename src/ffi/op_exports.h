// What the exports of all ops share: an op's call, the loading of its kernel, and what it resolves to.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "cuda/device_target.h"
#include "cuda/jit/jit.h"
#include "ffi/arguments.h"
#include "ffi/device_ordinal.h"
#include "heed/heed.h"

namespace heed::ffi {

using Record = tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>;

// The exports of one op. Op: kName, kFirst (its first operand's name), prepare(text, target), load(prepared, device),
// views(prepared, tensors) -> its arguments, run(prepared, arguments). An op with read_workspace(arguments, tensor) may
// be given one after its outputs, or none, where its kernel has a use for it.

// op(problem, *inputs, *outputs[, workspace]): the operands that the problem's text names, in its order, then the
// outputs. On a GPU it runs on the stream that TVM-FFI holds for the device of the first operand. The first such call
// loads its kernel there.
template <class Op>
void call(const TVMFFIAny* args, int32_t num_args) {
  const std::string name(Op::kName);
  if (num_args < 2) throw TypeError(name + ": got too few arguments, expected a problem and its tensors");
  const std::string_view text = string_argument(args[0], "problem");
  const DLTensor& first = *tensor_argument(args[1], Op::kFirst);
  const bool is_cuda = is_on_cuda(first);
  const int device = first.device.device_id;
  static const Target kCpu = parse_target("cpu");
  const auto prepared = Op::prepare(text, is_cuda ? cuda_target(device) : kCpu);
  const int num_expected = 1 + prepared->problem.num_inputs() + prepared->problem.num_outputs();
  constexpr bool kMayHaveWorkspace = requires { &Op::read_workspace; };
  const bool has_workspace = kMayHaveWorkspace && prepared->workspace_bytes > 0 && num_args == num_expected + 1;
  if (num_args != num_expected && !has_workspace) {
    throw TypeError(name + ": got " + std::to_string(num_args) + " arguments, expected " +
                    std::to_string(num_expected) + " for this problem");
  }
  auto views = Op::views(*prepared, args + 1);
  if constexpr (kMayHaveWorkspace) {
    if (has_workspace) Op::read_workspace(views, args[num_expected]);
  }
  if (!is_cuda) {
    Op::run(*prepared, views);
    return;
  }
  views.stream = TVMFFIEnvGetStream(kDLCUDA, device);
  const cuda::DeviceScope scope(device);  // the default stream is that of the current context
  Op::run(*prepared, views);
}

// op_load(problem, device): makes the problem's kernel ready on CUDA's device of that ordinal.
template <class Op>
void load(const TVMFFIAny* args, int32_t num_args) {
  if (num_args != 2 || args[1].type_index != kTVMFFIInt) {
    throw TypeError(std::string(Op::kName) + "_load: expected a problem and a device's ordinal");
  }
  const int ordinal = device_ordinal(args[1].v_int64);
  Op::load(*Op::prepare(string_argument(args[0], "problem"), cuda_target(ordinal)), ordinal);
}

inline tvm::ffi::Array<int64_t> to_array(const std::vector<int64_t>& values) { return {values.begin(), values.end()}; }

inline tvm::ffi::String dtype_name(DType dtype) { return tvm::ffi::String(std::string(info(dtype).name)); }

template <class Resolution>
Record to_record(const Resolution& resolution) {
  tvm::ffi::Array<tvm::ffi::Any> candidates;
  for (const Candidate& candidate : resolution.candidates) {
    candidates.push_back(tvm::ffi::Array<tvm::ffi::String>{candidate.name, candidate.backend, candidate.reason});
  }
  const bool is_served = resolution.chosen != nullptr;
  return {{"chosen", tvm::ffi::String(is_served ? std::string(resolution.chosen->name) : "")},
          {"workspace_bytes", resolution.workspace_bytes},
          {"candidates", candidates}};
}

// An entry of a record's "results": what an op's call would return.
inline tvm::ffi::Array<tvm::ffi::Any> result_record(const std::string& dtype, const std::vector<int64_t>& shape) {
  return {tvm::ffi::String(dtype), to_array(shape)};
}

using Resolve = Record (*)(std::string_view text, std::string_view target_name);

inline void resolve(Resolve resolve_op, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  if (num_args != 2) {
    throw TypeError("resolve: got " + std::to_string(num_args) + " arguments, expected a problem and a target");
  }
  *reinterpret_cast<tvm::ffi::Any*>(result) =
      resolve_op(string_argument(args[0], "problem"), string_argument(args[1], "target"));
}

}  // namespace heed::ffi
