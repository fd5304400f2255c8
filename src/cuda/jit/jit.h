// What the host side of every GPU kernel uses: name a kernel, compile or find it, load it on a device, launch it.
//
// Compiling needs NVRTC and no GPU; loading needs the driver. Both are reached through dlopen, the first time that they
// are needed: the library builds, loads and serves the CPU on a machine that has neither.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "heed/heed.h"

namespace heed::cuda {

// One specialised kernel, before it is compiled. `family` names its header, cuda/device/<family>.cuh; `instance` is a
// C++ type of that header in namespace heed::cuda, such as "Sm80AttentionFwd<Sm80AttentionFwdSpec{...}>", with
//   kNumThreads, kMinBlocksPerSm, kSharedBytes (constants), Params (a type), run(const Params&) (a device function).
// Its text, "<family> <instance>" on one line, is an entry of the ahead-of-time list and of recorded lists.
struct KernelSpec {
  std::string family;
  std::string instance;
  friend bool operator==(const KernelSpec&, const KernelSpec&) = default;
};
HEED_API std::string to_text(const KernelSpec& spec);
// Throws ValueError unless the text is "<family> <instance>" of a family that this build contains.
HEED_API KernelSpec parse_kernel_spec(std::string_view text);

// A kernel's machine code for one architecture.
struct CompiledKernel {
  std::string cubin;     // bytes
  std::string log;       // what the compiler said (registers, spills), where it ran or was stored
  std::string origin;    // "ahead of time", "cache" or "compiled"
  double seconds = 0.0;  // of the whole lookup
  int num_threads = 0;   // of a block, as the cubin says
  int shared_bytes = 0;  // dynamic shared memory of a block, as the cubin says
};

// The architecture to compile for on a device of that compute capability: "sm_80", "sm_89", "sm_90a", "sm_100", ...
HEED_API std::string arch_for(int compute_capability_times_ten);

// Finds the kernel ahead of time or in the user's cache, or compiles it. Throws std::runtime_error with the compiler's
// log, the spec and the flags if it does not compile, and with what was searched if there is no compiler.
HEED_API CompiledKernel compile(const KernelSpec& spec, const std::string& arch);

// A kernel that is ready on some devices. Never destroyed.
class LoadedKernel {
 public:
  void* handle = nullptr;  // CUkernel: valid on every device it is loaded on
  int num_threads = 0;
  int shared_bytes = 0;
  bool is_loaded_on(int device) const {
    return device >= 0 && device < 64 && (loaded_devices.load(std::memory_order_acquire) >> device & 1) != 0;
  }
  std::atomic<uint64_t> loaded_devices{0};
};

// Makes the kernel ready on the device (CUDA's ordinal): compiles it if need be, loads its code there and grants its
// shared memory. Idempotent and thread-safe; at most 1 us when there is nothing to do. Leaves the calling thread's
// current CUDA context as it was. Throws std::runtime_error.
HEED_API const LoadedKernel& load(const KernelSpec& spec, int device);

// The one launch site. `params` points to the kernel's Params. `stream` is a CUstream of the device (null: the default
// stream of the current context). Throws std::runtime_error with the driver's message.
struct LaunchConfig {
  int64_t grid_x = 1, grid_y = 1, grid_z = 1;
  void* stream = nullptr;
  int cluster_x = 1;               // blocks of a cluster, which divide grid_x; more than 1: sm_90 and newer
  bool overlaps_previous = false;  // may start before the stream's previous kernel ends: the kernel itself waits for it
};
HEED_API void launch(const LoadedKernel& kernel, const LaunchConfig& config, const void* params);

// How many clusters of `cluster_x` blocks can run on the device at once; 0 where there are none of that size. The
// kernel is loaded there. Throws std::runtime_error.
HEED_API int max_active_clusters(const LoadedKernel& kernel, int device, int cluster_x);

// Devices. None of them throws where there is no driver: the count is then 0. The first call initialises CUDA.
HEED_API int device_count();
HEED_API bool is_driver_installed();   // whether it can be used or not
HEED_API std::string why_no_driver();  // empty where there is one that can
HEED_API int driver_version();         // the newest CUDA that it serves, such as 13000; 0 without a driver
HEED_API std::string device_name(int device);
HEED_API int compute_capability(int device);    // times ten, such as 90; 0 for a device that is not there
HEED_API int multiprocessor_count(int device);  // 0 for a device that is not there

// Makes a device's primary context current for a scope. Does nothing where it is current already.
class HEED_API DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace heed::cuda
