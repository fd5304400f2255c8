// A driver of CUDA without a GPU, for tests of what heed asks of the real one. A program that links it is given it by
// dlopen("libcuda.so.1").
#pragma once

#include <string>
#include <vector>

namespace heed::test {

struct FakeLaunch {
  void* function = nullptr;
  void* stream = nullptr;
  int device = -1;  // of the context that is current
  unsigned grid[3] = {};
  unsigned block = 0;
  unsigned shared_bytes = 0;
};

struct FakeDriver {
  std::vector<std::string> calls;  // names, in order
  std::vector<FakeLaunch> launches;
  std::vector<int> devices_loaded;  // of cuFuncLoad's contexts
  int launch_result = 0;            // what cuLaunchKernel returns
};

// The one of this process: two devices of compute capability 9.0. Not for several threads.
FakeDriver& fake_driver();

}  // namespace heed::test
