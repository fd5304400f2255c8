// The TVM-FFI exports of the small ops: for each op a call, what it resolves to, and the loading of its kernel.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/tvm_ffi.h>

#include <string_view>

#include "core/dtype.h"
#include "ffi/arguments.h"
#include "ffi/op_exports.h"
#include "ops/act_and_mul.h"
#include "ops/attention_decode.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"

namespace {

namespace ffi = tvm::ffi;
using heed::ffi::guarded;

template <class SmallOp>
struct Export {
  static constexpr std::string_view kName = SmallOp::kName, kFirst = SmallOp::Problem::kNames[0];
  static constexpr auto& prepare = SmallOp::prepare;
  static constexpr auto& load = SmallOp::load;
  static constexpr auto& run = SmallOp::run;

  static typename SmallOp::Args views(const heed::PreparedOp<SmallOp>& prepared, const TVMFFIAny* tensors) {
    return heed::read_views<SmallOp>(prepared, [&](std::string_view name, const heed::TensorSpec& spec) {
      return heed::ffi::view_argument(*tensors++, heed::find_dtype(spec.dtype)->dtype, name);
    });
  }
};

template <class SmallOp>
int call(const TVMFFIAny* args, int32_t num_args) {
  return guarded([&] { heed::ffi::call<Export<SmallOp>>(args, num_args); });
}

template <class SmallOp>
int load(const TVMFFIAny* args, int32_t num_args) {
  return guarded([&] { heed::ffi::load<Export<SmallOp>>(args, num_args); });
}

// op_resolve(problem, target) -> map: which kernel would serve the problem, and in "results" the dtype and the shape of
// each result. A workspace comes last; its last axis has size 0 if no kernel serves or none is needed.
template <class SmallOp>
heed::ffi::Record resolve_op(std::string_view text, std::string_view target_name) {
  const heed::ResolvedOp<SmallOp> resolved = SmallOp::resolve_text(text, heed::parse_target(target_name));
  ffi::Array<ffi::Any> results;
  for (const heed::TensorSpec& spec : resolved.results) {
    if (spec.present) results.push_back(heed::ffi::result_record(spec.dtype, spec.shape));
  }
  heed::ffi::Record record = heed::ffi::to_record(resolved.resolution);
  record.Set("results", results);
  return record;
}

template <class SmallOp>
int resolve(const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  return guarded([&] { heed::ffi::resolve(resolve_op<SmallOp>, args, num_args, result); });
}

}  // namespace

extern "C" {

TVM_FFI_DLL_EXPORT int __tvm_ffi_act_and_mul(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                             TVMFFIAny* /*result*/) {
  return call<heed::ActAndMulOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_act_and_mul_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                     TVMFFIAny* result) {
  return resolve<heed::ActAndMulOp>(args, num_args, result);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_act_and_mul_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                  TVMFFIAny* /*result*/) {
  return load<heed::ActAndMulOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_act_and_mul_bwd(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                 TVMFFIAny* /*result*/) {
  return call<heed::ActAndMulBwdOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_act_and_mul_bwd_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                         TVMFFIAny* result) {
  return resolve<heed::ActAndMulBwdOp>(args, num_args, result);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_act_and_mul_bwd_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                      TVMFFIAny* /*result*/) {
  return load<heed::ActAndMulBwdOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rope(void* /*self*/, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* /*result*/) {
  return call<heed::RopeOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rope_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                              TVMFFIAny* result) {
  return resolve<heed::RopeOp>(args, num_args, result);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rope_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                           TVMFFIAny* /*result*/) {
  return load<heed::RopeOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rms_norm(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                          TVMFFIAny* /*result*/) {
  return call<heed::RmsNormOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rms_norm_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                  TVMFFIAny* result) {
  return resolve<heed::RmsNormOp>(args, num_args, result);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rms_norm_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                               TVMFFIAny* /*result*/) {
  return load<heed::RmsNormOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rms_norm_bwd(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                              TVMFFIAny* /*result*/) {
  return call<heed::RmsNormBwdOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rms_norm_bwd_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                      TVMFFIAny* result) {
  return resolve<heed::RmsNormBwdOp>(args, num_args, result);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rms_norm_bwd_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                   TVMFFIAny* /*result*/) {
  return load<heed::RmsNormBwdOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_decode(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                  TVMFFIAny* /*result*/) {
  return call<heed::AttentionDecodeOp>(args, num_args);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_decode_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                          TVMFFIAny* result) {
  return resolve<heed::AttentionDecodeOp>(args, num_args, result);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_decode_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                       TVMFFIAny* /*result*/) {
  return load<heed::AttentionDecodeOp>(args, num_args);
}

}  // extern "C"
