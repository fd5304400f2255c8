// Which rows on one side of attention rows of the other side may see, by their segment ids.
#pragma once

#include "cuda/device/ptx.cuh"
#include "variants/segment_ids.h"

namespace heed::cuda {

// The part of `others` that rows of `own` may see: the ends that carry no id of these rows are dropped (as
// variants::segment_keys does), which leaves each packed sequence what is its own. Called by the whole block.
template <int kNumThreads>
__device__ __forceinline__ variants::Range segment_range(const int* own_ids, long long own_stride, variants::Range own,
                                                         const int* other_ids, long long other_stride,
                                                         variants::Range others) {
  __shared__ int ends[4];  // smallest and largest id of the rows, first and last of the others
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ends[0] = ends[2] = 0x7fffffff;
    ends[1] = ends[3] = -0x7fffffff - 1;
  }
  __syncthreads();
  for (variants::Index row = own.begin + thread; row < own.end; row += kNumThreads) {
    const int id = own_ids[row * own_stride];
    atomicMin(&ends[0], id);
    atomicMax(&ends[1], id);
  }
  __syncthreads();
  const int smallest = ends[0], largest = ends[1];
  int first = 0x7fffffff, last = -1;
  for (variants::Index other = others.begin + thread; other < others.end; other += kNumThreads) {
    const int id = other_ids[other * other_stride];
    if (id >= smallest && id <= largest) {
      first = min(first, static_cast<int>(other));
      last = max(last, static_cast<int>(other));
    }
  }
  if (last >= 0) {
    atomicMin(&ends[2], first);
    atomicMax(&ends[3], last);
  }
  __syncthreads();
  return variants::intersect(others, {ends[2], static_cast<variants::Index>(ends[3]) + 1});
}

}  // namespace heed::cuda
