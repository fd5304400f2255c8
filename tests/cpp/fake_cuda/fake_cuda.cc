// The functions of the driver that heed calls, as cuda.h declares them, without a GPU behind them.
#include "fake_cuda.h"

#include <cstring>
#include <mutex>

namespace {

std::mutex mutex;
fake_cuda::Record record;
thread_local std::vector<int> contexts;
thread_local int capture_mode = 0;  // global, as in a new thread
char context_tags[fake_cuda::kNumDevices];
bool is_initialised = false;

constexpr int kSuccess = 0, kInvalidValue = 1, kNotInitialized = 3, kInvalidContext = 201, kInvalidDevice = 101,
              kNoDevice = 100;

// Whether this call was chosen to fail.
bool fails(const char* call) {
  if (record.failing_call != call) return false;
  record.failing_call.clear();
  return true;
}

int note(const std::string& call, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails(call.c_str())) return kInvalidValue;
  record.calls.push_back(call + " " + std::to_string(device));
  return kSuccess;
}

int current() { return contexts.empty() ? -1 : contexts.back(); }

}  // namespace

extern "C" {

fake_cuda::Record* fake_cuda_record() { return &record; }
void fake_cuda_reset() { record = {}; }
std::vector<int>* fake_cuda_contexts() { return &contexts; }
int fake_cuda_capture_mode() { return capture_mode; }

// The first caller is heed. Later ones are NVRTC, which looks for debugging interfaces that are not here.
int cuInit(unsigned) {
  if (is_initialised) return kNoDevice;
  is_initialised = true;
  return kSuccess;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
int cuGetErrorName(int error, const char** text) {
  *text = error == kInvalidValue ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
  return kSuccess;
}
int cuGetErrorString(int, const char** text) {
  *text = "invalid argument";
  return kSuccess;
}
int cuDeviceGetCount(int* count) {
  if (!is_initialised) return kNotInitialized;
  *count = fake_cuda::kNumDevices;
  return kSuccess;
}
int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= fake_cuda::kNumDevices) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}
int cuDeviceGetName(char* name, int bytes, int device) {
  std::strncpy(name, ("Fake " + std::to_string(device)).c_str(), static_cast<size_t>(bytes));
  return kSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = fake_cuda::kCapabilities[device];
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  return kSuccess;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &context_tags[device];
  return note("retain", device);
}
int cuCtxGetCurrent(void** context) {
  *context = current() < 0 ? nullptr : &context_tags[current()];
  return kSuccess;
}
int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(static_cast<int>(static_cast<char*>(context) - context_tags));
  return kSuccess;
}
int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = &context_tags[contexts.back()];
  contexts.pop_back();
  return kSuccess;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return kSuccess;
}
int cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  if (std::memcmp(code,
                  "\x7f"
                  "ELF",
                  4) != 0)
    return kInvalidValue;
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("library")) return kInvalidValue;
  record.capture_modes.push_back(capture_mode);
  *library = reinterpret_cast<void*>(static_cast<intptr_t>(++record.num_libraries));
  return kSuccess;
}
int cuLibraryUnload(void*) {
  ++record.num_unloaded;
  return kSuccess;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  if (std::strcmp(name, "heed_kernel") != 0 || fails("kernel")) return kInvalidValue;
  *kernel = reinterpret_cast<void*>(reinterpret_cast<intptr_t>(library) + 0x1000);
  return kSuccess;
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return note("function", current());
}
int cuKernelGetAttribute(int* value, int, void*, int) {
  *value = 1;
  return kSuccess;
}
int cuKernelSetAttribute(int attribute, int value, void*, int device) {
  return note("attribute " + std::to_string(attribute) + "=" + std::to_string(value), device);
}
int cuFuncLoad(void*) { return note("load", current()); }
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned,
                   unsigned, unsigned shared_bytes, void* stream, void** params, void**) {
  if (fails("launch")) return kInvalidValue;
  record.launches.push_back({function, {grid_x, grid_y, grid_z}, block_x, shared_bytes, stream, params[0]});
  return kSuccess;
}

}  // extern "C"
