// Kernels on devices: loading, launching, contexts.
//
// A kernel is loaded once per architecture as a CUDA library, whose handle serves every device of that architecture;
// what loading does per device is forced there and then, so that a launch finds nothing left to do.
#include <array>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>

#include "cuda/jit/cubin.h"
#include "cuda/jit/driver_api.h"
#include "cuda/jit/jit.h"
#include "cuda/jit/log.h"

namespace heed::cuda {
namespace {

constexpr int kMostDevices = 64;  // the bits of LoadedKernel::loaded_devices

const DriverApi& required_driver() {
  if (const DriverApi* api = driver()) return *api;
  throw std::runtime_error("heed cannot use a GPU: " + why_no_driver());
}

// Facts that never change, asked once. Primary contexts are kept for the life of the process, as CUDA's runtime does.
struct DeviceFacts {
  std::atomic<int> capability{0};
  std::atomic<int> multiprocessors{0};
  std::atomic<CUcontext> context{nullptr};
};
std::array<DeviceFacts, kMostDevices> the_devices;

CUdevice device_handle(const DriverApi& api, int device) {
  CUdevice handle = 0;
  check(api.device_get(&handle, device), "cuDeviceGet");
  return handle;
}

CUcontext primary_context(const DriverApi& api, int device) {
  if (device < 0 || device >= kMostDevices) {
    throw std::runtime_error("CUDA device: got " + std::to_string(device) + ", expected at most " +
                             std::to_string(kMostDevices - 1));
  }
  std::atomic<CUcontext>& slot = the_devices[static_cast<size_t>(device)].context;
  CUcontext context = slot.load(std::memory_order_acquire);
  if (context != nullptr) return context;
  check(api.device_primary_ctx_retain(&context, device_handle(api, device)), "cuDevicePrimaryCtxRetain");
  slot.store(context, std::memory_order_release);  // of a race, both got the same one
  return context;
}

// While another thread captures a stream, CUDA refuses this one all that might synchronise, loading code included. None
// of what is done here reaches a stream, so the refusal is lifted.
class RelaxedCaptureScope {
 public:
  explicit RelaxedCaptureScope(const DriverApi& api) : api_(api) {
    is_changed_ = api_.thread_exchange_stream_capture_mode(&mode_) == kCudaSuccess;
  }
  ~RelaxedCaptureScope() {
    if (is_changed_) api_.thread_exchange_stream_capture_mode(&mode_);
  }
  RelaxedCaptureScope(const RelaxedCaptureScope&) = delete;
  RelaxedCaptureScope& operator=(const RelaxedCaptureScope&) = delete;

 private:
  const DriverApi& api_;
  int mode_ = kStreamCaptureModeRelaxed;
  bool is_changed_ = false;
};

// ---------------------------------------------------------------------------------------------------------------------
// All kernels of the process, by spec and compute capability.

struct KernelKey {
  std::string_view family;
  std::string_view instance;
  int capability;
  friend bool operator==(const KernelKey&, const KernelKey&) = default;
};

struct HashKernelKey {
  size_t operator()(const KernelKey& key) const {
    const std::hash<std::string_view> hash;
    return (hash(key.instance) * 31 + hash(key.family)) * 31 + static_cast<size_t>(key.capability);
  }
};

struct KernelSlot {
  explicit KernelSlot(const KernelSpec& s) : spec(s) {}
  KernelSpec spec;  // owns the key's text
  std::mutex loading;
  LoadedKernel kernel;
};

// Never destroyed: other threads may launch while the process ends.
struct KernelTable {
  std::shared_mutex mutex;
  std::unordered_map<KernelKey, std::unique_ptr<KernelSlot>, HashKernelKey> slots;
};

KernelSlot& slot_of(const KernelSpec& spec, int capability) {
  static KernelTable& table = *new KernelTable;
  const KernelKey key{spec.family, spec.instance, capability};
  {
    const std::shared_lock lock(table.mutex);
    const auto it = table.slots.find(key);
    if (it != table.slots.end()) return *it->second;
  }
  auto slot = std::make_unique<KernelSlot>(spec);
  const KernelKey own_key{slot->spec.family, slot->spec.instance, capability};
  const std::unique_lock lock(table.mutex);
  return *table.slots.emplace(own_key, std::move(slot)).first->second;
}

// The library, for all devices of the architecture. Nothing is on a device yet.
void load_library(const DriverApi& api, const KernelSpec& spec, int capability, LoadedKernel& kernel) {
  const CompiledKernel compiled = compile(spec, arch_for(capability));
  CUlibrary library = nullptr;
  check(api.library_load_data(&library, compiled.cubin.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
        "cuLibraryLoadData");
  CUkernel handle = nullptr;
  const CUresult result = api.library_get_kernel(&handle, library, kEntryPoint);
  if (result != kCudaSuccess) api.library_unload(library);
  check(result, "cuLibraryGetKernel");
  kernel.num_threads = compiled.num_threads;
  kernel.shared_bytes = compiled.shared_bytes;
  kernel.handle = handle;
}

// The code in the device's memory, and leave to use as much shared memory as it needs.
void load_on_device(const DriverApi& api, int device, LoadedKernel& kernel) {
  const CUdevice handle = device_handle(api, device);
  auto* const entry = static_cast<CUkernel>(kernel.handle);
  // Always: what a block may have without asking, 48 KiB, counts its static shared memory too.
  check(api.kernel_set_attribute(kFuncAttributeMaxDynamicSharedSizeBytes, kernel.shared_bytes, entry, handle),
        "cuKernelSetAttribute");
  // CUDA loads code when it is first used unless it is asked to do it now.
  CUfunction function = nullptr;
  check(api.kernel_get_function(&function, entry), "cuKernelGetFunction");
  if (api.func_load != nullptr) {
    check(api.func_load(function), "cuFuncLoad");
  } else {
    int registers = 0;
    check(api.kernel_get_attribute(&registers, kFuncAttributeNumRegs, entry, handle), "cuKernelGetAttribute");
  }
}

// With the slot's lock held.
void load_slot(const DriverApi& api, KernelSlot& slot, int capability, int device) {
  const double start = seconds_now();
  const RelaxedCaptureScope relaxed(api);
  const DeviceScope scope(device);
  if (slot.kernel.handle == nullptr) load_library(api, slot.spec, capability, slot.kernel);
  load_on_device(api, device, slot.kernel);
  slot.kernel.loaded_devices.fetch_or(uint64_t{1} << device, std::memory_order_release);
  if (is_verbose()) {
    log_verbose("jit: device " + std::to_string(device) + " " + to_text(slot.spec) + ": ready in " +
                milliseconds(seconds_now() - start));
  }
}

// A launch with more than cuLaunchKernel takes, as the driver has it.
struct AttributedLaunch {
  CUlaunchAttribute attributes[2]{};
  CUlaunchConfig config{};

  AttributedLaunch(const LoadedKernel& kernel, const LaunchConfig& launch) {
    config.grid_x = static_cast<unsigned>(launch.grid_x);
    config.grid_y = static_cast<unsigned>(launch.grid_y);
    config.grid_z = static_cast<unsigned>(launch.grid_z);
    config.block_x = static_cast<unsigned>(kernel.num_threads);
    config.block_y = config.block_z = 1;
    config.shared_bytes = static_cast<unsigned>(kernel.shared_bytes);
    config.stream = static_cast<CUstream>(launch.stream);
    config.attributes = attributes;
    if (launch.cluster_x != 1) {
      CUlaunchAttribute& cluster = attributes[config.num_attributes++];
      cluster.id = kLaunchAttributeClusterDimension;
      cluster.value.cluster[0] = static_cast<unsigned>(launch.cluster_x);
      cluster.value.cluster[1] = cluster.value.cluster[2] = 1;
    }
    if (launch.overlaps_previous) {
      CUlaunchAttribute& overlap = attributes[config.num_attributes++];
      overlap.id = kLaunchAttributeProgrammaticStreamSerialization;
      overlap.value.is_allowed = 1;
    }
  }
  AttributedLaunch(const AttributedLaunch&) = delete;
  AttributedLaunch& operator=(const AttributedLaunch&) = delete;
};

void launch_with_attributes(const DriverApi& api, const LoadedKernel& kernel, const LaunchConfig& config,
                            void** arguments) {
  if (config.cluster_x < 1 || config.grid_x % config.cluster_x != 0) {
    throw std::runtime_error("kernel launch: got clusters of " + std::to_string(config.cluster_x) + " blocks, and " +
                             std::to_string(config.grid_x) + " blocks are no multiple of that");
  }
  const AttributedLaunch launch(kernel, config);
  check(api.launch_kernel_ex(&launch.config, static_cast<CUfunction>(kernel.handle), arguments, nullptr),
        "cuLaunchKernelEx");
}

}  // namespace

int device_count() {
  const DriverApi* api = driver();
  int count = 0;
  return api != nullptr && api->device_get_count(&count) == kCudaSuccess ? count : 0;
}

int driver_version() {
  const DriverApi* api = driver();
  int version = 0;
  return api != nullptr && api->driver_get_version(&version) == kCudaSuccess ? version : 0;
}

std::string device_name(int device) {
  const DriverApi* api = driver();
  CUdevice handle = 0;
  char name[256] = "";
  if (api == nullptr || api->device_get(&handle, device) != kCudaSuccess) return "";
  return api->device_get_name(name, sizeof(name), handle) == kCudaSuccess ? name : "";
}

int compute_capability(int device) {
  if (device < 0 || device >= kMostDevices) return 0;
  std::atomic<int>& slot = the_devices[static_cast<size_t>(device)].capability;
  int capability = slot.load(std::memory_order_relaxed);
  if (capability != 0) return capability;
  const DriverApi* api = driver();
  CUdevice handle = 0;
  int major = 0;
  int minor = 0;
  if (api == nullptr || api->device_get(&handle, device) != kCudaSuccess ||
      api->device_get_attribute(&major, kDeviceAttributeComputeCapabilityMajor, handle) != kCudaSuccess ||
      api->device_get_attribute(&minor, kDeviceAttributeComputeCapabilityMinor, handle) != kCudaSuccess) {
    return 0;
  }
  capability = major * 10 + minor;
  slot.store(capability, std::memory_order_relaxed);
  return capability;
}

int multiprocessor_count(int device) {
  if (device < 0 || device >= kMostDevices) return 0;
  std::atomic<int>& slot = the_devices[static_cast<size_t>(device)].multiprocessors;
  int count = slot.load(std::memory_order_relaxed);
  if (count != 0) return count;
  const DriverApi* api = driver();
  CUdevice handle = 0;
  if (api == nullptr || api->device_get(&handle, device) != kCudaSuccess ||
      api->device_get_attribute(&count, kDeviceAttributeMultiprocessorCount, handle) != kCudaSuccess) {
    return 0;
  }
  slot.store(count, std::memory_order_relaxed);
  return count;
}

DeviceScope::DeviceScope(int device) {
  const DriverApi& api = required_driver();
  const CUcontext wanted = primary_context(api, device);
  CUcontext current = nullptr;
  check(api.ctx_get_current(&current), "cuCtxGetCurrent");
  if (current == wanted) return;
  check(api.ctx_push_current(wanted), "cuCtxPushCurrent");
  pushed_ = true;
}

DeviceScope::~DeviceScope() {
  const DriverApi* api = pushed_ ? driver() : nullptr;
  CUcontext popped = nullptr;
  if (api != nullptr) api->ctx_pop_current(&popped);
}

const LoadedKernel& load(const KernelSpec& spec, int device) {
  const DriverApi& api = required_driver();
  const int capability = compute_capability(device);
  if (capability == 0) {
    throw std::runtime_error("CUDA device: got " + std::to_string(device) + ", expected one of the " +
                             std::to_string(device_count()) + " devices of this machine");
  }
  KernelSlot& slot = slot_of(spec, capability);
  if (slot.kernel.is_loaded_on(device)) return slot.kernel;
  const std::lock_guard<std::mutex> lock(slot.loading);
  if (!slot.kernel.is_loaded_on(device)) load_slot(api, slot, capability, device);
  return slot.kernel;
}

int max_active_clusters(const LoadedKernel& kernel, int device, int cluster_x) {
  constexpr int kOldestCapability = 90;
  if (compute_capability(device) < kOldestCapability) return 0;
  const DriverApi& api = required_driver();
  const RelaxedCaptureScope relaxed(api);
  const DeviceScope scope(device);
  auto* const entry = static_cast<CUkernel>(kernel.handle);
  CUfunction function = nullptr;
  check(api.kernel_get_function(&function, entry), "cuKernelGetFunction");
  const AttributedLaunch launch(kernel, {.grid_x = cluster_x, .cluster_x = cluster_x});
  int count = 0;
  // A size that the device does not have is an error there, and 0 here.
  return api.occupancy_max_active_clusters(&count, function, &launch.config) == kCudaSuccess ? count : 0;
}

void launch(const LoadedKernel& kernel, const LaunchConfig& config, const void* params) {
  const DriverApi& api = required_driver();
  constexpr int64_t kMostX = INT32_MAX;
  constexpr int64_t kMostYZ = 65535;
  if (config.grid_x < 1 || config.grid_x > kMostX || config.grid_y < 1 || config.grid_y > kMostYZ ||
      config.grid_z < 1 || config.grid_z > kMostYZ) {
    throw std::runtime_error("kernel launch: got a grid of " + std::to_string(config.grid_x) + " x " +
                             std::to_string(config.grid_y) + " x " + std::to_string(config.grid_z) +
                             " blocks, expected 1 to 2^31 - 1, 65535, 65535");
  }
  void* arguments[] = {const_cast<void*>(params)};
  if (config.cluster_x != 1 || config.overlaps_previous) {
    launch_with_attributes(api, kernel, config, arguments);
    return;
  }
  // A CUkernel stands for the function of whichever context the stream belongs to.
  check(api.launch_kernel(static_cast<CUfunction>(kernel.handle), static_cast<unsigned>(config.grid_x),
                          static_cast<unsigned>(config.grid_y), static_cast<unsigned>(config.grid_z),
                          static_cast<unsigned>(kernel.num_threads), 1, 1, static_cast<unsigned>(kernel.shared_bytes),
                          static_cast<CUstream>(config.stream), arguments, nullptr),
        "cuLaunchKernel");
}

}  // namespace heed::cuda
