// A driver that is not one: a library named libcuda.so.1 with two "GPUs", which writes down what it is asked to do.
// With it the code that talks to the driver runs on a machine without a GPU. What a GPU does is tested on a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fake_cuda {

inline constexpr int kNumDevices = 3;
inline constexpr int kCapabilities[kNumDevices] = {90, 90, 80};

struct Launch {
  void* function;
  unsigned grid[3], block, shared_bytes;
  void* stream;
  void* params;  // the pointer that was given
};

// What happened since the last reset. Loading, attributes and functions per device, in order.
struct Record {
  int num_libraries = 0;
  int num_unloaded = 0;
  std::vector<std::string> calls;  // such as "load 0" for cuFuncLoad in device 0's context
  std::vector<Launch> launches;
  std::vector<int> capture_modes;  // of the thread, when a library was loaded
  std::string failing_call;        // which one fails next, once
};

}  // namespace fake_cuda

extern "C" {
fake_cuda::Record* fake_cuda_record();
void fake_cuda_reset();
// The stack of contexts of the calling thread, as device ordinals.
std::vector<int>* fake_cuda_contexts();
int fake_cuda_capture_mode();
}
