// Turns: blocks that add to the same floats in a fixed order. A counter says how many have added so far; a warp waits
// until all before it have, and passes the turn on when its own additions are there for all.
#pragma once

#include "cuda/device/ptx.cuh"

namespace heed::cuda {

// One warp's turn at a time.
struct Turn {
  int* counter = nullptr;  // null: no turn to pass on
  int num_before = 0;
  int seen = 0;

  // Reads the counter, ahead of the time when its value is needed.
  __device__ __forceinline__ void begin(int* its_counter, int how_many_before) {
    counter = its_counter;
    num_before = how_many_before;
    seen = ptx::load_relaxed(counter);
  }
  // What contradicts itself (lengths that are device data may) could make it wait for ever: it gives up.
  __device__ __forceinline__ void wait() {
    constexpr int kMaxTries = 1 << 25;
#pragma unroll 1
    for (int i = 0; i < kMaxTries && seen < num_before; ++i) seen = ptx::load_relaxed(counter);
  }
  // The fence waits for the additions: best called some time after them.
  __device__ __forceinline__ void end() {
    if (counter == nullptr) return;
    __threadfence();
    __syncwarp();
    if ((ptx::thread_index() & 31) == 0) ptx::add_relaxed(counter, 1);
    counter = nullptr;
  }
};

}  // namespace heed::cuda
