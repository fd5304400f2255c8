// The few types and functions of CUDA's driver and of NVRTC that heed uses, declared by hand: no toolkit is needed to
// build. Both libraries are reached through dlopen. Names follow cuda.h and nvrtc.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace heed::cuda {

using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUfunction = struct CUfunc_st*;

inline constexpr CUresult kCudaSuccess = 0;
inline constexpr int kFuncAttributeNumRegs = 4;
inline constexpr int kFuncAttributeMaxDynamicSharedSizeBytes = 8;
inline constexpr int kDeviceAttributeMultiprocessorCount = 16;
inline constexpr int kDeviceAttributeComputeCapabilityMajor = 75;
inline constexpr int kDeviceAttributeComputeCapabilityMinor = 76;
inline constexpr int kStreamCaptureModeRelaxed = 2;
inline constexpr int kLaunchAttributeClusterDimension = 4;
inline constexpr int kLaunchAttributeProgrammaticStreamSerialization = 6;
inline constexpr int kTensorMapFloat16 = 6;
inline constexpr int kTensorMapBFloat16 = 9;
inline constexpr int kTensorMapInterleaveNone = 0;
inline constexpr int kTensorMapSwizzle128Bytes = 3;
inline constexpr int kTensorMapPromoteToL2128Bytes = 2;
inline constexpr int kTensorMapFillWithZeros = 0;

struct CUlaunchAttribute {
  int id;
  int padding;
  union {
    unsigned cluster[3];
    int is_allowed;
    char bytes[64];
  } value;
};
struct CUlaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned num_attributes;
};

// The driver's functions. All are there with CUDA 12.0 and later, but the one that is marked.
struct DriverApi {
  CUresult (*init)(unsigned flags);
  CUresult (*driver_get_version)(int* version);
  CUresult (*get_error_name)(CUresult error, const char** text);
  CUresult (*get_error_string)(CUresult error, const char** text);
  CUresult (*device_get_count)(int* count);
  CUresult (*device_get)(CUdevice* device, int ordinal);
  CUresult (*device_get_name)(char* name, int bytes, CUdevice device);
  CUresult (*device_get_attribute)(int* value, int attribute, CUdevice device);
  CUresult (*device_primary_ctx_retain)(CUcontext* context, CUdevice device);
  CUresult (*ctx_get_current)(CUcontext* context);
  CUresult (*ctx_push_current)(CUcontext context);
  CUresult (*ctx_pop_current)(CUcontext* context);
  CUresult (*thread_exchange_stream_capture_mode)(int* mode);
  CUresult (*library_load_data)(CUlibrary* library, const void* code, int* jit_options, void** jit_values,
                                unsigned num_jit, int* options, void** values, unsigned num_options);
  CUresult (*library_unload)(CUlibrary library);
  CUresult (*library_get_kernel)(CUkernel* kernel, CUlibrary library, const char* name);
  CUresult (*kernel_get_function)(CUfunction* function, CUkernel kernel);
  CUresult (*kernel_get_attribute)(int* value, int attribute, CUkernel kernel, CUdevice device);
  CUresult (*kernel_set_attribute)(int attribute, int value, CUkernel kernel, CUdevice device);
  CUresult (*launch_kernel)(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** params,
                            void** extra);
  CUresult (*launch_kernel_ex)(const CUlaunchConfig* config, CUfunction function, void** params, void** extra);
  CUresult (*tensor_map_encode_tiled)(void* map, int element, uint32_t rank, void* memory, const uint64_t* sizes,
                                      const uint64_t* strides_bytes, const uint32_t* box, const uint32_t* box_steps,
                                      int interleave, int swizzle, int l2_promotion, int fill);
  CUresult (*occupancy_max_active_clusters)(int* count, CUfunction function, const CUlaunchConfig* config);
  CUresult (*func_load)(CUfunction function);  // CUDA 12.4; null before
};

// The driver, loaded and initialised, or null where there is none that works. After a fork of a process that had
// initialised it there is none either: CUDA does not survive one.
const DriverApi* driver();

// Throws std::runtime_error naming the call and the driver's message.
void check(CUresult result, const char* call);

using nvrtcResult = int;
using nvrtcProgram = struct nvrtcProgram_st*;

struct NvrtcApi {
  const char* (*get_error_string)(nvrtcResult result);
  nvrtcResult (*version)(int* major, int* minor);
  nvrtcResult (*create_program)(nvrtcProgram* program, const char* source, const char* name, int num_headers,
                                const char* const* headers, const char* const* include_names);
  nvrtcResult (*destroy_program)(nvrtcProgram* program);
  nvrtcResult (*compile_program)(nvrtcProgram program, int num_options, const char* const* options);
  nvrtcResult (*get_cubin_size)(nvrtcProgram program, size_t* bytes);
  nvrtcResult (*get_cubin)(nvrtcProgram program, char* cubin);
  nvrtcResult (*get_program_log_size)(nvrtcProgram program, size_t* bytes);
  nvrtcResult (*get_program_log)(nvrtcProgram program, char* log);
};

}  // namespace heed::cuda
