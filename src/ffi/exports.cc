// The TVM-FFI exports of attention and of the library as a whole. Functions take DLPack tensors of any framework and
// only run: no allocation of tensor memory here.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/tvm_ffi.h>

#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "cuda/device_target.h"
#include "ffi/arguments.h"
#include "ffi/device_ordinal.h"
#include "ffi/op_exports.h"
#include "ops/attention_bwd.h"
#include "ops/attention_fwd.h"

namespace {

namespace ffi = tvm::ffi;
using heed::ffi::call;
using heed::ffi::dtype_name;
using heed::ffi::guarded;
using heed::ffi::load;
using heed::ffi::Record;
using heed::ffi::resolve;
using heed::ffi::result_record;
using heed::ffi::to_array;
using heed::ffi::to_record;
using heed::ffi::view_argument;

// ---------------------------------------------------------------------------------------------------------------------
// What the ops' exports differ in.

struct AttentionFwd {
  static constexpr std::string_view kName = "attention_fwd", kFirst = "q";
  static constexpr auto& prepare = heed::prepare_attention_fwd;
  static constexpr auto& load = heed::load_attention_fwd;
  static constexpr auto& run = heed::run_attention_fwd;

  static heed::AttentionForwardArgs views(const heed::PreparedAttentionFwd& prepared, const TVMFFIAny* tensors) {
    const heed::AttentionProblem& problem = prepared.problem;
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

  static void read_workspace(heed::AttentionForwardArgs& views, const TVMFFIAny& tensor) {
    views.workspace = view_argument(tensor, heed::DType::kFloat32, "workspace");
  }
};

struct AttentionBwd {
  static constexpr std::string_view kName = "attention_bwd", kFirst = "q";
  static constexpr auto& prepare = heed::prepare_attention_bwd;
  static constexpr auto& load = heed::load_attention_bwd;
  static constexpr auto& run = heed::run_attention_bwd;

  static heed::AttentionBackwardArgs views(const heed::PreparedAttentionBwd& prepared, const TVMFFIAny* tensors) {
    const heed::AttentionBwdProblem& problem = prepared.problem;
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

// attention_fwd_resolve(problem, target) -> map: what the call would return and which kernel would serve it. The
// workspace has a last axis of size 0 if no kernel serves or none has a use for it.
Record attention_fwd_resolve(std::string_view text, std::string_view target_name) {
  const heed::AttentionProblem problem = heed::validate(heed::parse_attention_request(text));
  const heed::AttentionFwdResolution resolution = heed::resolve(problem, heed::parse_target(target_name));
  Record record = to_record(resolution);
  record.Set("out_shape", to_array(problem.out_shape()));
  record.Set("lse_shape", to_array(problem.lse_shape()));
  record.Set("out_dtype", dtype_name(problem.dtype));
  record.Set("workspace_shape", to_array(problem.workspace_shape(resolution.workspace_per_head)));
  return record;
}

// attention_bwd_resolve(problem, target) -> map: likewise; "results" has the dtype and the shape of each result, the
// gradients that are there and then the workspace, which has a last axis of size 0 if no kernel serves or none is
// needed.
Record attention_bwd_resolve(std::string_view text, std::string_view target_name) {
  const heed::AttentionBwdProblem problem = heed::validate(heed::parse_attention_bwd_request(text));
  const heed::AttentionBwdResolution resolution = heed::resolve(problem, heed::parse_target(target_name));
  ffi::Array<ffi::Any> results;
  for (const heed::TensorSpec& spec : problem.gradients) {
    if (spec.present) results.push_back(result_record(spec.dtype, spec.shape));
  }
  const std::vector<int64_t> workspace_shape = problem.workspace_shape(resolution.workspace_per_head);
  results.push_back(result_record("float32", workspace_shape));
  Record record = to_record(resolution);
  record.Set("results", results);
  record.Set("workspace_shape", to_array(workspace_shape));
  return record;
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
