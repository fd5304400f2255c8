// The functions of fake_driver.h: each notes its name and succeeds.
#include "fake_driver.h"

#include <cstdint>
#include <cstring>

namespace heed::test {
namespace {

constexpr int kNumDevices = 2;
std::vector<void*> the_contexts;  // the thread's stack of them: the ordinal plus one

int current() {
  return the_contexts.empty() ? -1 : static_cast<int>(reinterpret_cast<intptr_t>(the_contexts.back())) - 1;
}

void* handle(intptr_t number) { return reinterpret_cast<void*>(number); }

int note(const char* name) {
  fake_driver().calls.emplace_back(name);
  return 0;
}

}  // namespace

FakeDriver& fake_driver() {
  static FakeDriver& driver = *new FakeDriver;
  return driver;
}

}  // namespace heed::test

using heed::test::current;
using heed::test::fake_driver;
using heed::test::handle;
using heed::test::note;

extern "C" {

constexpr int kInvalidDevice = 101;
constexpr int kInvalidContext = 201;

int cuInit(unsigned /*flags*/) { return note("cuInit"); }
// NVRTC asks for it, and does without.
int cuGetExportTable(const void** table, const void* /*id*/) {
  constexpr int kNotFound = 500;
  *table = nullptr;
  note("cuGetExportTable");
  return kNotFound;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return note("cuDriverGetVersion");
}
int cuGetErrorName(int /*error*/, const char** text) {
  *text = "CUDA_ERROR_FAKE";
  return note("cuGetErrorName");
}
int cuGetErrorString(int /*error*/, const char** text) {
  *text = "a made-up failure";
  return note("cuGetErrorString");
}
int cuDeviceGetCount(int* count) {
  *count = heed::test::kNumDevices;
  return note("cuDeviceGetCount");
}
int cuDeviceGet(int* device, int ordinal) {
  note("cuDeviceGet");
  if (ordinal < 0 || ordinal >= heed::test::kNumDevices) return kInvalidDevice;
  *device = ordinal;
  return 0;
}
int cuDeviceGetName(char* name, int bytes, int /*device*/) {
  std::strncpy(name, "fake GPU", static_cast<size_t>(bytes));
  return note("cuDeviceGetName");
}
int cuDeviceGetAttribute(int* value, int attribute, int /*device*/) {
  constexpr int kMajor = 75;
  *value = attribute == kMajor ? 9 : attribute == kMajor + 1 ? 0 : 132;
  return note("cuDeviceGetAttribute");
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = handle(device + 1);
  return note("cuDevicePrimaryCtxRetain");
}
int cuCtxGetCurrent(void** context) {
  *context = handle(current() + 1);
  return note("cuCtxGetCurrent");
}
int cuCtxPushCurrent_v2(void* context) {
  heed::test::the_contexts.push_back(context);
  return note("cuCtxPushCurrent");
}
int cuCtxPopCurrent_v2(void** context) {
  note("cuCtxPopCurrent");
  if (current() < 0) return kInvalidContext;
  *context = heed::test::the_contexts.back();
  heed::test::the_contexts.pop_back();
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* /*mode*/) { return note("cuThreadExchangeStreamCaptureMode"); }
int cuLibraryLoadData(void** library, const void* /*code*/, int*, void**, unsigned, int*, void**, unsigned) {
  *library = handle(1000);
  return note("cuLibraryLoadData");
}
int cuLibraryUnload(void* /*library*/) { return note("cuLibraryUnload"); }
int cuLibraryGetKernel(void** kernel, void* /*library*/, const char* /*name*/) {
  *kernel = handle(2000);
  return note("cuLibraryGetKernel");
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return note("cuKernelGetFunction");
}
int cuKernelGetAttribute(int* value, int /*attribute*/, void* /*kernel*/, int /*device*/) {
  *value = 128;
  return note("cuKernelGetAttribute");
}
int cuKernelSetAttribute(int /*attribute*/, int /*value*/, void* /*kernel*/, int /*device*/) {
  return note("cuKernelSetAttribute");
}
int cuFuncLoad(void* /*function*/) {
  fake_driver().devices_loaded.push_back(current());
  return note("cuFuncLoad");
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned /*block_y*/, unsigned /*block_z*/, unsigned shared_bytes, void* stream, void** /*params*/,
                   void** /*extra*/) {
  note("cuLaunchKernel");
  fake_driver().launches.push_back({function, stream, current(), {grid_x, grid_y, grid_z}, block_x, shared_bytes});
  return fake_driver().launch_result;
}

}  // extern "C"
