// Every TVM-FFI export but those of the kernel compiler. Functions take DLPack tensors of any framework and only run:
// no allocation of tensor memory here.
#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "cuda/device_target.h"
#include "cuda/jit/jit.h"
#include "ffi/arguments.h"
#include "ffi/device_ordinal.h"
#include "ops/attention_bwd.h"
#include "ops/attention_fwd.h"

namespace {

namespace ffi = tvm::ffi;
using heed::ffi::guarded;
using heed::ffi::string_argument;
using heed::ffi::tensor_argument;
using heed::ffi::view_argument;
using Record = ffi::Map<ffi::String, ffi::Any>;

// ---------------------------------------------------------------------------------------------------------------------
// What the ops' exports differ in.

struct AttentionFwd {
  static constexpr std::string_view kName = "attention_fwd";
  static constexpr auto& prepare = heed::prepare_attention_fwd;
  static constexpr auto& load = heed::load_attention_fwd;
  static constexpr auto& run = heed::run_attention_fwd;

  static heed::AttentionForwardArgs views(const heed::AttentionProblem& problem, const TVMFFIAny* tensors) {
    heed::AttentionForwardArgs views;
    const heed::AttentionInputs inputs = heed::inputs_of(views);
    for (int i = 0; i < heed::kNumAttentionInputs; ++i) {
      const heed::TensorSpec& spec = problem.operands[i];
      if (!spec.present) continue;
      *inputs[i] = view_argument(*tensors++, heed::find_dtype(spec.dtype)->dtype, heed::kAttentionOperandNames[i]);
    }
    views.out = view_argument(*tensors++, problem.dtype, "out");
    if (problem.wants_lse) views.lse = view_argument(*tensors++, heed::DType::kFloat32, "lse");
    return views;
  }
};

struct AttentionBwd {
  static constexpr std::string_view kName = "attention_bwd";
  static constexpr auto& prepare = heed::prepare_attention_bwd;
  static constexpr auto& load = heed::load_attention_bwd;
  static constexpr auto& run = heed::run_attention_bwd;

  static heed::AttentionBackwardArgs views(const heed::AttentionBwdProblem& problem, const TVMFFIAny* tensors) {
    heed::AttentionBackwardArgs views;
    const auto read = [&](heed::TensorView& view, const heed::TensorSpec& spec, std::string_view name) {
      if (spec.present) view = view_argument(*tensors++, heed::find_dtype(spec.dtype)->dtype, name);
    };
    const heed::AttentionBwdInputs inputs = heed::bwd_inputs_of(views);
    for (int i = 0; i < heed::kNumAttentionBwdInputs; ++i) {
      read(*inputs[i], problem.operand(i), heed::attention_bwd_operand_name(i));
    }
    const heed::AttentionGradients gradients = heed::gradients_of(views);
    for (int i = 0; i < heed::kNumAttentionGradients; ++i) {
      read(*gradients[i], problem.gradients[i], heed::kAttentionGradientNames[i]);
    }
    views.workspace = view_argument(*tensors, heed::DType::kFloat32, "workspace");
    return views;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// What they share.

// op(problem, *inputs, *outputs): the operands that the problem's text names, in its order, then the outputs. On a GPU
// it runs on the stream that TVM-FFI holds for q's device. The first such call loads its kernel there.
template <class Op>
void call(const TVMFFIAny* args, int32_t num_args) {
  const std::string name(Op::kName);
  if (num_args < 2) throw heed::TypeError(name + ": got too few arguments, expected a problem and its tensors");
  const std::string_view text = string_argument(args[0], "problem");
  const DLTensor& q = *tensor_argument(args[1], "q");
  const bool is_cuda = heed::ffi::is_on_cuda(q);
  const int device = q.device.device_id;
  static const heed::Target kCpu = heed::parse_target("cpu");
  const auto prepared = Op::prepare(text, is_cuda ? heed::cuda_target(device) : kCpu);
  const int num_expected = 1 + prepared->problem.num_inputs() + prepared->problem.num_outputs();
  if (num_args != num_expected) {
    throw heed::TypeError(name + ": got " + std::to_string(num_args) + " arguments, expected " +
                          std::to_string(num_expected) + " for this problem");
  }
  auto views = Op::views(prepared->problem, args + 1);
  if (!is_cuda) {
    Op::run(*prepared, views);
    return;
  }
  views.stream = TVMFFIEnvGetStream(kDLCUDA, device);
  const heed::cuda::DeviceScope scope(device);  // the default stream is that of the current context
  Op::run(*prepared, views);
}

// op_load(problem, device): makes the problem's kernel ready on CUDA's device of that ordinal.
template <class Op>
void load(const TVMFFIAny* args, int32_t num_args) {
  if (num_args != 2 || args[1].type_index != kTVMFFIInt) {
    throw heed::TypeError(std::string(Op::kName) + "_load: expected a problem and a device's ordinal");
  }
  const int ordinal = heed::device_ordinal(args[1].v_int64);
  Op::load(*Op::prepare(string_argument(args[0], "problem"), heed::cuda_target(ordinal)), ordinal);
}

ffi::Array<int64_t> to_array(const std::vector<int64_t>& values) { return {values.begin(), values.end()}; }

ffi::String dtype_name(heed::DType dtype) { return ffi::String(std::string(heed::info(dtype).name)); }

template <class Resolution>
Record to_record(const Resolution& resolution) {
  ffi::Array<ffi::Any> candidates;
  for (const heed::Candidate& candidate : resolution.candidates) {
    candidates.push_back(ffi::Array<ffi::String>{candidate.name, candidate.backend, candidate.reason});
  }
  const bool is_served = resolution.chosen != nullptr;
  return {{"chosen", ffi::String(is_served ? std::string(resolution.chosen->name) : "")},
          {"workspace_bytes", resolution.workspace_bytes},
          {"candidates", candidates}};
}

// attention_fwd_resolve(problem, target) -> map: what the call would return and which kernel would serve it.
Record attention_fwd_resolve(std::string_view text, std::string_view target_name) {
  const heed::AttentionProblem problem = heed::validate(heed::parse_attention_request(text));
  Record record = to_record(heed::resolve(problem, heed::parse_target(target_name)));
  record.Set("out_shape", to_array(problem.out_shape()));
  record.Set("lse_shape", to_array(problem.lse_shape()));
  record.Set("out_dtype", dtype_name(problem.dtype));
  return record;
}

// attention_bwd_resolve(problem, target) -> map: likewise; "results" has the dtype and the shape of each result, the
// gradients that are there and then the workspace, which has a last axis of size 0 if no kernel serves or none is
// needed.
Record attention_bwd_resolve(std::string_view text, std::string_view target_name) {
  const heed::AttentionBwdProblem problem = heed::validate(heed::parse_attention_bwd_request(text));
  const heed::AttentionBwdResolution resolution = heed::resolve(problem, heed::parse_target(target_name));
  const auto result = [](ffi::String dtype, const std::vector<int64_t>& shape) {
    return ffi::Array<ffi::Any>{std::move(dtype), to_array(shape)};
  };
  ffi::Array<ffi::Any> results;
  for (const heed::TensorSpec& spec : problem.gradients) {
    if (spec.present) results.push_back(result(spec.dtype, spec.shape));
  }
  const std::vector<int64_t> workspace_shape = problem.workspace_shape(resolution.workspace_per_head);
  results.push_back(result(dtype_name(heed::DType::kFloat32), workspace_shape));
  Record record = to_record(resolution);
  record.Set("results", results);
  record.Set("workspace_shape", to_array(workspace_shape));
  return record;
}

using Resolve = Record (*)(std::string_view text, std::string_view target_name);

void resolve(Resolve resolve_op, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  if (num_args != 2) {
    throw heed::TypeError("resolve: got " + std::to_string(num_args) + " arguments, expected a problem and a target");
  }
  *reinterpret_cast<ffi::Any*>(result) =
      resolve_op(string_argument(args[0], "problem"), string_argument(args[1], "target"));
}

ffi::Array<ffi::String> cpu_targets() {
  ffi::Array<ffi::String> names;
  for (const std::string& name : heed::cpu_targets()) names.push_back(name);
  return names;
}

}  // namespace

extern "C" {

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_fwd(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                               TVMFFIAny* /*result*/) {
  return guarded([&] { call<AttentionFwd>(args, num_args); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_fwd_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                       TVMFFIAny* result) {
  return guarded([&] { resolve(attention_fwd_resolve, args, num_args, result); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_fwd_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                    TVMFFIAny* /*result*/) {
  return guarded([&] { load<AttentionFwd>(args, num_args); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_bwd(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                               TVMFFIAny* /*result*/) {
  return guarded([&] { call<AttentionBwd>(args, num_args); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_bwd_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                       TVMFFIAny* result) {
  return guarded([&] { resolve(attention_bwd_resolve, args, num_args, result); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_bwd_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                    TVMFFIAny* /*result*/) {
  return guarded([&] { load<AttentionBwd>(args, num_args); });
}

}  // extern "C"

TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, [] { return ffi::String(heed::version()); })
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_target, [] { return ffi::String(heed::cpu_target()); })
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_targets, cpu_targets)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_target, [](int64_t device) {
  return ffi::String(heed::cuda_target(heed::device_ordinal(device)).name);
})
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_threads, [] { return static_cast<int64_t>(heed::num_threads()); })
