// Arguments of the exports.
#include "ffi/arguments.h"

#include <cstdint>
#include <optional>
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

std::optional<DType> known_dtype(const DLDataType& dtype) {
  if (dtype.lanes != 1) return std::nullopt;
  if (dtype.code == kDLFloat && dtype.bits == 32) return DType::kFloat32;
  if (dtype.code == kDLFloat && dtype.bits == 16) return DType::kFloat16;
  if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::kBFloat16;
  if (dtype.code == kDLInt && dtype.bits == 32) return DType::kInt32;
  return std::nullopt;
}

DType dtype_of(const DLTensor& tensor, DType expected, std::string_view name) {
  const DLDataType& dtype = tensor.dtype;
  if (const std::optional<DType> known = known_dtype(dtype)) return *known;
  // Frameworks whose DLPack has no bfloat16 pass its bits.
  const bool is_bits = dtype.lanes == 1 && dtype.code == kDLUInt && dtype.bits == 16;
  if (is_bits && expected == DType::kBFloat16) return expected;
  throw TypeError(std::string(name) + ": got a dtype with DLPack code " + std::to_string(dtype.code) + " and " +
                  std::to_string(dtype.bits) + " bits, expected " + std::string(info(expected).name));
}

std::string dtype_name(const DLDataType& dtype) {
  const auto name = [&]() -> std::string {
    switch (dtype.code) {
      case kDLInt:
        return "int";
      case kDLUInt:
        return "uint";
      case kDLFloat:
        return "float";
      case kDLBfloat:
        return "bfloat";
      case kDLComplex:
        return "complex";
      case kDLBool:
        return "bool";
      default:
        return "DLPack type " + std::to_string(dtype.code) + " of bits ";
    }
  }();
  return name + std::to_string(dtype.bits);
}

// Memory, shape, strides and device.
TensorView view_of(const DLTensor& tensor, DType dtype, std::string_view name) {
  if (tensor.ndim < 0 || tensor.ndim > kMaxRank) {
    throw ValueError(std::string(name) + ": got rank " + std::to_string(tensor.ndim) + ", expected at most " +
                     std::to_string(kMaxRank));
  }
  TensorView view;
  view.dtype = dtype;
  if (tensor.data != nullptr) view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.rank = tensor.ndim;
  uint64_t contiguous_stride = 1;  // unsigned: shapes that overflow are refused later
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides != nullptr ? tensor.strides[i] : static_cast<int64_t>(contiguous_stride);
    contiguous_stride *= static_cast<uint64_t>(tensor.shape[i]);
  }
  const bool is_cpu = tensor.device.device_type == kDLCPU;
  if (!is_cpu && !is_on_cuda(tensor)) {
    throw ValueError(std::string(name) + ": got DLPack device type " + std::to_string(tensor.device.device_type) +
                     ", expected a CPU or CUDA tensor");
  }
  view.device = {is_cpu ? DeviceType::kCpu : DeviceType::kCuda, tensor.device.device_id};
  return view;
}

[[noreturn]] void refuse_dtype(const DLTensor& tensor, std::string_view name, const char* expected) {
  throw TypeError(std::string(name) + ": got dtype " + dtype_name(tensor.dtype) + ", expected " + expected);
}

[[noreturn]] void refuse_scalar(std::string_view name, const char* expected) {
  throw TypeError(std::string(name) + ": got another type, expected " + expected);
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
  const DLTensor& tensor = *tensor_argument(argument, name);
  return view_of(tensor, dtype_of(tensor, expected, name), name);
}

TensorView float_argument(const TVMFFIAny& argument, std::string_view name) {
  const DLTensor& tensor = *tensor_argument(argument, name);
  const std::optional<DType> dtype = known_dtype(tensor.dtype);
  if (!dtype || !info(*dtype).is_float) refuse_dtype(tensor, name, "float32, float16 or bfloat16");
  return view_of(tensor, *dtype, name);
}

TensorView index_argument(const TVMFFIAny& argument, std::string_view name) {
  const DLTensor& tensor = *tensor_argument(argument, name);
  if (known_dtype(tensor.dtype) != DType::kInt32) refuse_dtype(tensor, name, "int32");
  return view_of(tensor, DType::kInt32, name);
}

bool is_absent(const TVMFFIAny& argument) {
  if (argument.type_index == kTVMFFINone) return true;
  if (argument.type_index != kTVMFFIDLTensorPtr && argument.type_index != kTVMFFITensor) return false;
  const DLTensor& tensor = *tensor_argument(argument, "");
  return tensor.ndim > 0 && tensor.shape[tensor.ndim - 1] == 0;
}

int64_t integer_argument(const TVMFFIAny& argument, std::string_view name) {
  if (argument.type_index != kTVMFFIInt) refuse_scalar(name, "an int");
  return argument.v_int64;
}

bool flag_argument(const TVMFFIAny& argument, std::string_view name) {
  if (argument.type_index != kTVMFFIBool && argument.type_index != kTVMFFIInt) refuse_scalar(name, "a bool");
  return argument.v_int64 != 0;
}

double real_argument(const TVMFFIAny& argument, std::string_view name) {
  if (argument.type_index == kTVMFFIFloat) return argument.v_float64;
  if (argument.type_index == kTVMFFIInt) return static_cast<double>(argument.v_int64);
  refuse_scalar(name, "a float");
}

}  // namespace heed::ffi
