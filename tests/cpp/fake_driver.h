// A driver of CUDA without a GPU, for tests of what heed asks of the real one. A program that links it is given it by
// dlopen("libcuda.so.1"). What a GPU does is tested on a GPU.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace heed::test {

inline constexpr int kNumFakeDevices = 3;
inline constexpr int kFakeCapabilities[kNumFakeDevices] = {90, 90, 80};
inline constexpr unsigned kFakeMultiprocessors = 128;  // of each

struct FakeLaunch {
  void* function = nullptr;
  void* stream = nullptr;
  int device = -1;  // of the context that is current
  unsigned grid[3] = {};
  unsigned block = 0;
  unsigned shared_bytes = 0;
  unsigned cluster = 1;
  bool overlaps_previous = false;
  void* params = nullptr;              // the pointer that was given
  std::vector<char> copy_of_params{};  // what it points to, if the test has asked for it
};

// What happened since the test last assigned a new one. May be written by several threads, and read when they are done.
struct FakeDriver {
  std::vector<std::string> calls;         // names of the driver's functions, in order
  std::vector<std::string> device_calls;  // what was done to a kernel on a device, such as "load 0"
  std::vector<FakeLaunch> launches;
  std::vector<int> capture_modes;  // of the thread, when a library was loaded
  int num_libraries = 0;
  int num_unloaded = 0;
  std::string failing_call;  // the function that fails next, once
  // The parameters of launches of blocks of so many threads are copied: other kernels have other parameters.
  size_t num_copied_bytes = 0;
  unsigned copied_block = 0;
};

// The one of this process.
FakeDriver& fake_driver();

// Of the calling thread: its stack of contexts, as device ordinals, and how it takes part in captures.
std::vector<int>& fake_contexts();
int fake_capture_mode();

}  // namespace heed::test
