// Arguments of the exports.
#include "ffi/arguments.h"

#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace heed::ffi {

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
      throw TypeError(std::string(name) + ": got another type, expected a string");
  }
}

namespace {

DType dtype_of(const DLTensor& tensor, DType expected, std::string_view name) {
  const DLDataType& dtype = tensor.dtype;
  if (dtype.lanes == 1) {
    if (dtype.code == kDLFloat && dtype.bits == 32) return DType::kFloat32;
    if (dtype.code == kDLFloat && dtype.bits == 16) return DType::kFloat16;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::kBFloat16;
    if (dtype.code == kDLInt && dtype.bits == 32) return DType::kInt32;
    // Frameworks whose DLPack has no bfloat16 pass its bits.
    if (dtype.code == kDLUInt && dtype.bits == 16 && expected == DType::kBFloat16) return expected;
  }
  throw TypeError(std::string(name) + ": got a dtype with DLPack code " + std::to_string(dtype.code) + " and " +
                  std::to_string(dtype.bits) + " bits, expected " + std::string(info(expected).name));
}

}  // namespace

const DLTensor* tensor_argument(const TVMFFIAny& argument, std::string_view name) {
  if (argument.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(argument.v_ptr);
  if (argument.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(argument.v_obj);
  throw TypeError(std::string(name) + ": got no tensor, expected a DLPack tensor");
}

bool is_on_cuda(const DLTensor& tensor) {
  return tensor.device.device_type == kDLCUDA || tensor.device.device_type == kDLCUDAManaged;
}

TensorView view_argument(const TVMFFIAny& argument, DType expected, std::string_view name) {
  const DLTensor* tensor = tensor_argument(argument, name);
  if (tensor->ndim < 0 || tensor->ndim > kMaxRank) {
    throw ValueError(std::string(name) + ": got rank " + std::to_string(tensor->ndim) + ", expected at most " +
                     std::to_string(kMaxRank));
  }
  TensorView view;
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
    throw ValueError(std::string(name) + ": got DLPack device type " + std::to_string(tensor->device.device_type) +
                     ", expected a CPU or CUDA tensor");
  }
  view.device = {is_cpu ? DeviceType::kCpu : DeviceType::kCuda, tensor->device.device_id};
  return view;
}

}  // namespace heed::ffi
