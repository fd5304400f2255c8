// The functions of the driver that heed calls, as cuda.h declares them: each notes its name and, unless it was chosen
// to fail, succeeds.
#include "fake_driver.h"

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <utility>

#include "device_emulation/tensor_map.h"

namespace heed::test {
namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kNotInitialized = 3, kInvalidDevice = 101, kInvalidContext = 201,
              kNotFound = 500;

std::mutex mutex;
std::atomic<bool> is_initialised = false;
thread_local std::vector<int> contexts;
thread_local int capture_mode = 0;  // global, as in a new thread
char context_tags[kNumFakeDevices];

int current() { return contexts.empty() ? -1 : contexts.back(); }

bool is_device(int ordinal) { return ordinal >= 0 && ordinal < kNumFakeDevices; }

// Notes the call and, if it succeeds, does what it does to the record.
template <class Effect>
int note(const char* name, const Effect& effect) {
  const std::lock_guard<std::mutex> lock(mutex);
  FakeDriver& driver = fake_driver();
  driver.calls.emplace_back(name);
  if (driver.failing_call == name) {
    driver.failing_call.clear();
    return kInvalidValue;
  }
  effect(driver);
  return kSuccess;
}

int note(const char* name) {
  return note(name, [](FakeDriver&) {});
}

std::vector<char> copy_of(const FakeDriver& driver, unsigned block, void** params) {
  if (block != driver.copied_block) return {};
  const char* bytes = static_cast<const char*>(params[0]);
  return {bytes, bytes + driver.num_copied_bytes};
}

int note_on_device(const char* name, const std::string& what, int device) {
  return note(name, [&](FakeDriver& driver) { driver.device_calls.push_back(what + " " + std::to_string(device)); });
}

}  // namespace

FakeDriver& fake_driver() {
  static FakeDriver& driver = *new FakeDriver;
  return driver;
}

std::vector<int>& fake_contexts() { return contexts; }
int fake_capture_mode() { return capture_mode; }

}  // namespace heed::test

using namespace heed::test;  // NOLINT(google-build-using-namespace): this file's vocabulary

extern "C" {

int cuInit(unsigned /*flags*/) {
  is_initialised = true;
  return note("cuInit");
}
// NVRTC asks for it, and does without.
int cuGetExportTable(const void** table, const void* /*id*/) {
  *table = nullptr;
  note("cuGetExportTable");
  return kNotFound;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return note("cuDriverGetVersion");
}
int cuGetErrorName(int error, const char** text) {
  *text = error == kInvalidValue ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
  return note("cuGetErrorName");
}
int cuGetErrorString(int /*error*/, const char** text) {
  *text = "invalid argument";
  return note("cuGetErrorString");
}
int cuDeviceGetCount(int* count) {
  if (!is_initialised) return kNotInitialized;
  *count = kNumFakeDevices;
  return note("cuDeviceGetCount");
}
int cuDeviceGet(int* device, int ordinal) {
  if (!is_device(ordinal)) return kInvalidDevice;
  *device = ordinal;
  return note("cuDeviceGet");
}
int cuDeviceGetName(char* name, int bytes, int device) {
  std::strncpy(name, ("Fake " + std::to_string(device)).c_str(), static_cast<size_t>(bytes));
  return note("cuDeviceGetName");
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;
  const int capability = kFakeCapabilities[device];
  *value = attribute == kMajor             ? capability / 10
           : attribute == kMinor           ? capability % 10
           : attribute == kMultiprocessors ? static_cast<int>(kFakeMultiprocessors)
                                           : -1;
  return note("cuDeviceGetAttribute");
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &context_tags[device];
  return note("cuDevicePrimaryCtxRetain");
}
int cuCtxGetCurrent(void** context) {
  *context = current() < 0 ? nullptr : &context_tags[current()];
  return note("cuCtxGetCurrent");
}
int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(static_cast<int>(static_cast<char*>(context) - context_tags));
  return note("cuCtxPushCurrent");
}
int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = &context_tags[contexts.back()];
  contexts.pop_back();
  return note("cuCtxPopCurrent");
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return note("cuThreadExchangeStreamCaptureMode");
}
int cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  constexpr char kElf[] = {0x7f, 'E', 'L', 'F'};
  if (std::memcmp(code, kElf, sizeof(kElf)) != 0) return kInvalidValue;
  return note("cuLibraryLoadData", [&](FakeDriver& driver) {
    driver.capture_modes.push_back(capture_mode);
    *library = reinterpret_cast<void*>(static_cast<intptr_t>(++driver.num_libraries));
  });
}
int cuLibraryUnload(void* /*library*/) {
  return note("cuLibraryUnload", [](FakeDriver& driver) { ++driver.num_unloaded; });
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  if (std::strcmp(name, "heed_kernel") != 0) return kInvalidValue;
  *kernel = reinterpret_cast<void*>(reinterpret_cast<intptr_t>(library) + 0x1000);
  return note("cuLibraryGetKernel");
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return note_on_device("cuKernelGetFunction", "function", current());
}
int cuKernelGetAttribute(int* value, int /*attribute*/, void* /*kernel*/, int /*device*/) {
  *value = 1;
  return note("cuKernelGetAttribute");
}
int cuKernelSetAttribute(int attribute, int value, void* /*kernel*/, int device) {
  const std::string what = "attribute " + std::to_string(attribute) + "=" + std::to_string(value);
  return note_on_device("cuKernelSetAttribute", what, device);
}
int cuFuncLoad(void* /*function*/) { return note_on_device("cuFuncLoad", "load", current()); }
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned /*block_y*/, unsigned /*block_z*/, unsigned shared_bytes, void* stream, void** params,
                   void** /*extra*/) {
  return note("cuLaunchKernel", [&](FakeDriver& driver) {
    driver.launches.push_back({.function = function,
                               .stream = stream,
                               .device = current(),
                               .grid = {grid_x, grid_y, grid_z},
                               .block = block_x,
                               .shared_bytes = shared_bytes,
                               .params = params[0],
                               .copy_of_params = copy_of(driver, block_x, params)});
  });
}
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                           int interleave, int swizzle, int l2_promotion, int fill) {
  const auto flag = [](int value) { return static_cast<unsigned>(value); };
  const int result =
      heed::device_emulation::encode_tensor_map(map, flag(type), rank, address, sizes, strides, box, element_strides,
                                                flag(interleave), flag(swizzle), flag(l2_promotion), flag(fill));
  return result != kSuccess ? result : note("cuTensorMapEncodeTiled");
}

// As cuda.h lays them out.
struct FakeLaunchAttribute {
  int id;
  char padding[4];
  unsigned value[16];
};
struct FakeLaunchConfig {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  FakeLaunchAttribute* attributes;
  unsigned num_attributes;
};

int cuLaunchKernelEx(const FakeLaunchConfig* config, void* function, void** params, void** /*extra*/) {
  constexpr int kClusterDimension = 4, kProgrammaticStreamSerialization = 6;
  return note("cuLaunchKernelEx", [&](FakeDriver& driver) {
    FakeLaunch launch{.function = function,
                      .stream = config->stream,
                      .device = current(),
                      .grid = {config->grid[0], config->grid[1], config->grid[2]},
                      .block = config->block[0],
                      .shared_bytes = config->shared_bytes,
                      .params = params[0],
                      .copy_of_params = copy_of(driver, config->block[0], params)};
    for (unsigned i = 0; i < config->num_attributes; ++i) {
      const FakeLaunchAttribute& attribute = config->attributes[i];
      if (attribute.id == kClusterDimension) launch.cluster = attribute.value[0];
      if (attribute.id == kProgrammaticStreamSerialization) launch.overlaps_previous = attribute.value[0] == 1;
    }
    driver.launches.push_back(launch);
  });
}
int cuOccupancyMaxActiveClusters(int* count, void* /*function*/, const FakeLaunchConfig* config) {
  const unsigned cluster = config->attributes[0].value[0];
  *count = static_cast<int>(kFakeMultiprocessors / cluster);
  return note("cuOccupancyMaxActiveClusters");
}

}  // extern "C"
