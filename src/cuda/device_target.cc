// Remembers every device's target, so that no call asks the driver.
#include "cuda/device_target.h"

#include <array>
#include <mutex>
#include <string>

#include "cuda/jit/jit.h"
#include "heed/heed.h"

namespace heed {

const Target& cuda_target(int device) {
  struct Entry {
    std::once_flag once;
    Target target;
  };
  // Never destroyed: other threads may still compute while the process ends.
  static auto* const entries = new std::array<Entry, 64>;
  if (device < 0 || device >= static_cast<int>(entries->size())) {
    throw ValueError("got CUDA device " + std::to_string(device) + ", expected one from 0 to " +
                     std::to_string(entries->size() - 1));
  }
  Entry& entry = (*entries)[static_cast<size_t>(device)];
  std::call_once(entry.once, [&] {
    const int capability = cuda::compute_capability(device);
    entry.target = parse_target(capability > 0 ? cuda::arch_for(capability) : "cuda");
  });
  return entry.target;
}

}  // namespace heed
