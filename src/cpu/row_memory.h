// When a kernel whose time is that of its memory traffic writes past the caches, and when it stays on one thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace heed::cpu {

// An ordinary store first reads the line that it overwrites: a third of the traffic of a copy. A streaming store does
// not, but what it writes is in no cache for the next reader. From this size on, of all that a call reads and writes,
// the results would not be in the caches anyway. Measured on 2 cores of a CPU with 32 MB of L3, GB/s of a copy with
// ordinary and with streaming stores: 93 and 77 at 32 MiB read and written, 57 and 67 at 64 MiB, 48 and 61 at 128 MiB.
inline constexpr int64_t kStreamingBytes = int64_t{48} << 20;

// Below some 10 us of work, waking other threads costs more than it gains.
inline constexpr int64_t kSmallBytes = int64_t{192} << 10;

// What one work item reads and writes, about: enough that taking it costs nothing, little enough that threads finish
// together.
inline constexpr int64_t kItemBytes = int64_t{128} << 10;

// Elements that a kernel holds at a time of a row whose elements are not adjacent.
inline constexpr int64_t kChunk = 2048;

// Elements that it computes before it streams them.
inline constexpr int64_t kStreamedColumns = 256;

// The item that comes `index`-th: threads that take items in turn are sent to different parts of the tensors. In memory
// that is touched for the first time, as XLA's results above 32 MiB always are, neighbours would wait for each other's
// page faults.
inline int64_t spread_item(int64_t index, int64_t count, int num_threads) {
  const int64_t part = index % num_threads;
  return part * (count / num_threads) + std::min(part, count % num_threads) + index / num_threads;
}

}  // namespace heed::cpu
