// Every TVM-FFI export. Functions take DLPack tensors of any framework and only run: no allocation of tensor memory
// here.
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
#include "ffi/device_ordinal.h"
#include "ops/attention_fwd.h"

namespace {

namespace ffi = tvm::ffi;

// Runs `body` and turns heed's errors into TVM-FFI errors of the kind that Python users expect.
template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const heed::UnsupportedError& error) {
    TVMFFIErrorSetRaisedFromCStr("heed.UnsupportedError", error.what());
  } catch (const heed::ValueError& error) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", error.what());
  } catch (const heed::TypeError& error) {
    TVMFFIErrorSetRaisedFromCStr("TypeError", error.what());
  } catch (const ffi::Error& error) {
    ffi::detail::SetSafeCallRaised(error);
  } catch (const std::exception& error) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", error.what());
  } catch (...) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "unknown exception");
  }
  return -1;
}

// The bytes of a string argument, without a copy.
std::string_view string_argument(const TVMFFIAny& argument, const char* name) {
  switch (argument.type_index) {
    case kTVMFFIRawStr:
      return argument.v_c_str;
    case kTVMFFISmallStr:
      return {argument.v_bytes, argument.small_str_len};
    case kTVMFFIStr: {
      const TVMFFIByteArray* bytes = TVMFFIBytesGetByteArrayPtr(argument.v_obj);
      return {bytes->data, bytes->size};
    }
    default:
      throw heed::TypeError(std::string(name) + ": got another type, expected a string");
  }
}

heed::DType dtype_of(const DLTensor& tensor, heed::DType expected, std::string_view name) {
  const DLDataType& dtype = tensor.dtype;
  if (dtype.lanes == 1) {
    if (dtype.code == kDLFloat && dtype.bits == 32) return heed::DType::kFloat32;
    if (dtype.code == kDLFloat && dtype.bits == 16) return heed::DType::kFloat16;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return heed::DType::kBFloat16;
    if (dtype.code == kDLInt && dtype.bits == 32) return heed::DType::kInt32;
    // Frameworks whose DLPack has no bfloat16 pass its bits.
    if (dtype.code == kDLUInt && dtype.bits == 16 && expected == heed::DType::kBFloat16) return expected;
  }
  throw heed::TypeError(std::string(name) + ": got a dtype with DLPack code " + std::to_string(dtype.code) + " and " +
                        std::to_string(dtype.bits) + " bits, expected " + std::string(heed::info(expected).name));
}

const DLTensor* tensor_argument(const TVMFFIAny& argument, std::string_view name) {
  if (argument.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(argument.v_ptr);
  if (argument.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(argument.v_obj);
  throw heed::TypeError(std::string(name) + ": got no tensor, expected a DLPack tensor");
}

bool is_on_cuda(const DLTensor& tensor) {
  return tensor.device.device_type == kDLCUDA || tensor.device.device_type == kDLCUDAManaged;
}

heed::TensorView view_argument(const TVMFFIAny& argument, heed::DType expected, std::string_view name) {
  const DLTensor* tensor = tensor_argument(argument, name);
  if (tensor->ndim < 0 || tensor->ndim > heed::kMaxRank) {
    throw heed::ValueError(std::string(name) + ": got rank " + std::to_string(tensor->ndim) + ", expected at most " +
                           std::to_string(heed::kMaxRank));
  }
  heed::TensorView view;
  view.dtype = dtype_of(*tensor, expected, name);
  if (tensor->data != nullptr) view.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  view.rank = tensor->ndim;
  uint64_t contiguous_stride = 1;  // unsigned: shapes that overflow are refused later
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = tensor->shape[i];
    view.strides[i] = tensor->strides != nullptr ? tensor->strides[i] : static_cast<int64_t>(contiguous_stride);
    contiguous_stride *= static_cast<uint64_t>(tensor->shape[i]);
  }
  const bool is_cpu = tensor->device.device_type == kDLCPU;
  const bool is_cuda = is_on_cuda(*tensor);
  if (!is_cpu && !is_cuda) {
    throw heed::ValueError(std::string(name) + ": got DLPack device type " +
                           std::to_string(tensor->device.device_type) + ", expected a CPU or CUDA tensor");
  }
  view.device = {is_cpu ? heed::DeviceType::kCpu : heed::DeviceType::kCuda, tensor->device.device_id};
  return view;
}

heed::AttentionForwardArgs attention_views(const heed::AttentionProblem& problem, const TVMFFIAny* args,
                                           int32_t num_args) {
  const int num_expected = 1 + problem.num_inputs() + problem.num_outputs();
  if (num_args != num_expected) {
    throw heed::TypeError("attention_fwd: got " + std::to_string(num_args) + " arguments, expected " +
                          std::to_string(num_expected) + " for this problem");
  }
  heed::AttentionForwardArgs views;
  const heed::AttentionInputs inputs = heed::inputs_of(views);
  int next = 1;
  for (int i = 0; i < heed::kNumAttentionInputs; ++i) {
    const heed::TensorSpec& spec = problem.operands[i];
    if (!spec.present) continue;
    *inputs[i] = view_argument(args[next++], heed::find_dtype(spec.dtype)->dtype, heed::kAttentionOperandNames[i]);
  }
  views.out = view_argument(args[next++], problem.dtype, "out");
  if (problem.wants_lse) views.lse = view_argument(args[next++], heed::DType::kFloat32, "lse");
  return views;
}

// attention_fwd(problem, *inputs, *outputs): the operands that the problem's text names, in its order, then out[, lse].
// On a GPU it runs on the stream that TVM-FFI holds for q's device. The first such call loads its kernel there.
void attention_fwd(const TVMFFIAny* args, int32_t num_args) {
  if (num_args < 2) throw heed::TypeError("attention_fwd: got too few arguments, expected a problem and its tensors");
  const std::string_view text = string_argument(args[0], "problem");
  const DLTensor& q = *tensor_argument(args[1], "q");
  if (!is_on_cuda(q)) {
    static const heed::Target kTarget = heed::parse_target("cpu");
    const auto prepared = heed::prepare_attention_fwd(text, kTarget);
    heed::run_attention_fwd(*prepared, attention_views(prepared->problem, args, num_args));
    return;
  }
  const int device = q.device.device_id;
  const auto prepared = heed::prepare_attention_fwd(text, heed::cuda_target(device));
  heed::AttentionForwardArgs views = attention_views(prepared->problem, args, num_args);
  views.stream = TVMFFIEnvGetStream(kDLCUDA, device);
  const heed::cuda::DeviceScope scope(device);  // the default stream is that of the current context
  heed::run_attention_fwd(*prepared, views);
}

// attention_fwd_load(problem, device): makes the problem's kernel ready on CUDA's device of that ordinal.
void attention_fwd_load(std::string_view text, int64_t device) {
  const int ordinal = heed::device_ordinal(device);
  heed::load_attention_fwd(*heed::prepare_attention_fwd(text, heed::cuda_target(ordinal)), ordinal);
}

ffi::Array<int64_t> to_array(const std::vector<int64_t>& values) { return {values.begin(), values.end()}; }

// attention_fwd_resolve(problem, target) -> map: what the call would return and which kernel would serve it.
ffi::Map<ffi::String, ffi::Any> attention_fwd_resolve(std::string_view text, std::string_view target_name) {
  const heed::AttentionProblem problem = heed::validate(heed::parse_attention_request(text));
  const heed::AttentionFwdResolution resolution = heed::resolve(problem, heed::parse_target(target_name));
  ffi::Array<ffi::Any> candidates;
  for (const heed::Candidate& candidate : resolution.candidates) {
    candidates.push_back(ffi::Array<ffi::String>{candidate.name, candidate.backend, candidate.reason});
  }
  const bool is_served = resolution.chosen != nullptr;
  return {{"out_shape", to_array(problem.out_shape())},
          {"lse_shape", to_array(problem.lse_shape())},
          {"out_dtype", ffi::String(std::string(heed::info(problem.dtype).name))},
          {"chosen", ffi::String(is_served ? std::string(resolution.chosen->name) : "")},
          {"workspace_bytes", resolution.workspace_bytes},
          {"candidates", candidates}};
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
  return guarded([&] { attention_fwd(args, num_args); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_fwd_resolve(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                       TVMFFIAny* result) {
  return guarded([&] {
    if (num_args != 2) throw heed::TypeError("attention_fwd_resolve: expected a problem and a target");
    *reinterpret_cast<ffi::Any*>(result) =
        attention_fwd_resolve(string_argument(args[0], "problem"), string_argument(args[1], "target"));
  });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_attention_fwd_load(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                    TVMFFIAny* /*result*/) {
  return guarded([&] {
    if (num_args != 2 || args[1].type_index != kTVMFFIInt) {
      throw heed::TypeError("attention_fwd_load: expected a problem and a device's ordinal");
    }
    attention_fwd_load(string_argument(args[0], "problem"), args[1].v_int64);
  });
}

}  // extern "C"

TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, [] { return ffi::String(heed::version()); })
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_target, [] { return ffi::String(heed::cpu_target()); })
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_targets, cpu_targets)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_target, [](int64_t device) {
  return ffi::String(heed::cuda_target(heed::device_ordinal(device)).name);
})
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_threads, [] { return static_cast<int64_t>(heed::num_threads()); })
