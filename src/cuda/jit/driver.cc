// Opens CUDA's driver. It is initialised the first time that something needs it, not when heed is loaded.
//
// No mutex here either: a race opens the same library twice, and cuInit may be called again.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <memory>
#include <stdexcept>

#include "cuda/jit/driver_api.h"
#include "cuda/jit/jit.h"

namespace heed::cuda {
namespace {

struct Driver {
  DriverApi api{};
  bool is_installed = false;
  bool is_usable = false;
  std::string why_not;
};

std::atomic<const Driver*> the_driver{nullptr};  // published once, never destroyed
std::atomic<bool> is_forked_child{false};
std::atomic<bool> watches_forks{false};

std::unique_ptr<Driver> open_driver() {
  auto driver = std::make_unique<Driver>();
  void* library = nullptr;
  for (const char* name : {"libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"}) {
    if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) {
    driver->why_not = "there is no NVIDIA driver (libcuda.so.1) on this machine";
    return driver;
  }
  driver->is_installed = true;
  std::string missing;
  const auto get = [&]<class F>(F& function, const char* name, bool is_needed = true) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (function == nullptr && is_needed) missing = name;
  };
  DriverApi& api = driver->api;
  get(api.init, "cuInit");
  get(api.driver_get_version, "cuDriverGetVersion");
  get(api.get_error_name, "cuGetErrorName");
  get(api.get_error_string, "cuGetErrorString");
  get(api.device_get_count, "cuDeviceGetCount");
  get(api.device_get, "cuDeviceGet");
  get(api.device_get_name, "cuDeviceGetName");
  get(api.device_get_attribute, "cuDeviceGetAttribute");
  get(api.device_primary_ctx_retain, "cuDevicePrimaryCtxRetain");
  get(api.ctx_get_current, "cuCtxGetCurrent");
  get(api.ctx_push_current, "cuCtxPushCurrent_v2");
  get(api.ctx_pop_current, "cuCtxPopCurrent_v2");
  get(api.thread_exchange_stream_capture_mode, "cuThreadExchangeStreamCaptureMode");
  get(api.library_load_data, "cuLibraryLoadData");
  get(api.library_unload, "cuLibraryUnload");
  get(api.library_get_kernel, "cuLibraryGetKernel");
  get(api.kernel_get_function, "cuKernelGetFunction");
  get(api.kernel_get_attribute, "cuKernelGetAttribute");
  get(api.kernel_set_attribute, "cuKernelSetAttribute");
  get(api.launch_kernel, "cuLaunchKernel");
  get(api.launch_kernel_ex, "cuLaunchKernelEx");
  get(api.tensor_map_encode_tiled, "cuTensorMapEncodeTiled");
  get(api.occupancy_max_active_clusters, "cuOccupancyMaxActiveClusters");
  get(api.func_load, "cuFuncLoad", false);
  if (!missing.empty()) {
    driver->why_not = "the NVIDIA driver is too old: it has no " + missing + ", which came with CUDA 12.0";
    return driver;
  }
  if (const CUresult result = api.init(0); result != kCudaSuccess) {
    const char* text = nullptr;
    api.get_error_string(result, &text);
    driver->why_not = "the NVIDIA driver cannot be initialised: " +
                      std::string(text != nullptr ? text : "error " + std::to_string(result));
    return driver;
  }
  driver->is_usable = true;
  if (!watches_forks.exchange(true)) pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true); });
  return driver;
}

const Driver& opened_driver() {
  const Driver* driver = the_driver.load(std::memory_order_acquire);
  if (driver != nullptr) return *driver;
  std::unique_ptr<const Driver> opened = open_driver();
  if (the_driver.compare_exchange_strong(driver, opened.get())) return *opened.release();
  return *driver;
}

}  // namespace

const DriverApi* driver() {
  const Driver& opened = opened_driver();
  return opened.is_usable && !is_forked_child.load(std::memory_order_relaxed) ? &opened.api : nullptr;
}

bool is_driver_installed() { return opened_driver().is_installed; }

std::string why_no_driver() {
  if (is_forked_child.load()) {
    return "this process was forked from one that had initialised CUDA, which does not survive that: start processes "
           "with 'spawn'";
  }
  return opened_driver().why_not;
}

void check(CUresult result, const char* call) {
  if (result == kCudaSuccess) return;
  const char* name = nullptr;
  const char* text = nullptr;
  if (const DriverApi* api = driver()) {
    api->get_error_name(result, &name);
    api->get_error_string(result, &text);
  }
  throw std::runtime_error(std::string(call) + " failed: " + (text != nullptr ? text : "unknown error") + " (" +
                           (name != nullptr ? name : std::to_string(result)) + ")");
}

}  // namespace heed::cuda
