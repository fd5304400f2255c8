// The smallest real kernel: y[i] = factor * x[i], through dynamic shared memory. It shows that compiling, loading and
// launching work on a machine (`python -m heed doctor`) and is what the tests of the cache compile.
#pragma once

#include "variants/band.h"

namespace heed::cuda {

// One block per kNumThreads elements.
template <int kThreads, int kExtraSharedBytes = 0>
struct Probe {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "kThreads: expected whole warps, at most 1024 threads");
  static constexpr int kNumThreads = kThreads;
  static constexpr int kMinBlocksPerSm = 1;
  static constexpr int kSharedBytes = kThreads * static_cast<int>(sizeof(float)) + kExtraSharedBytes;

  struct Params {
    const float* x;  // [count]
    float* y;        // [count]
    long long count;
    float factor;
  };

  static __device__ void run(const Params& params) {
    extern __shared__ float tile[];  // [kNumThreads], written and read in opposite orders
    const variants::Range all{0, params.count};
    const variants::Range mine{static_cast<variants::Index>(blockIdx.x) * kNumThreads,
                               static_cast<variants::Index>(blockIdx.x + 1) * kNumThreads};
    const variants::Range range = variants::intersect(all, mine);
    const int lane = static_cast<int>(threadIdx.x);
    if (range.begin + lane < range.end) tile[lane] = params.factor * params.x[range.begin + lane];
    __syncthreads();
    const int other = static_cast<int>(range.end - range.begin) - 1 - lane;
    if (other >= 0) params.y[range.begin + other] = tile[other];
  }
};

}  // namespace heed::cuda
