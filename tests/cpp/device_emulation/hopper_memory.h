// What Hopper's asynchronous operations see of shared memory, and when they happen. Each is done as early or as late as
// it may be, so that a wait that is missing shows: with Block::copies_late what is copied to shared memory arrives only
// when no thread can go on without it, while operations that read shared memory do so at once; otherwise the other way
// round; with Block::copies_vary each is one or the other or in between, at random.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "device_emulation/emulation.h"

namespace heed::device_emulation {

// Whether an operation that is late in this mode is done at once.
inline bool is_done_at_once(bool is_late) { return block.copies_vary ? block.random() % 2 == 0 : !is_late; }

// What threads write to shared memory is seen after a fence of the writer.
class AsyncView {
 public:
  void start_block() {
    std::memset(bytes_, 0xFF, sizeof bytes_);
    for (auto& written : written_) written.clear();
    for (auto& read : read_) read.clear();
  }
  void note_write(uint32_t to, uint32_t num_bytes) {
    auto& written = written_[block.current];
    if (!written.empty() && written.back().first + written.back().second == to) {
      written.back().second += num_bytes;
    } else {
      written.emplace_back(to, num_bytes);
    }
  }
  // A warp's load is done when its registers are used, or at a fence. An arrival on a barrier does not wait for it, and
  // a copy that is let go by that barrier may overwrite what is still to be read.
  void note_read(uint32_t from, uint32_t num_bytes) { read_[block.current / kWarpSize].emplace_back(from, num_bytes); }
  void end_reads() { read_[block.current / kWarpSize].clear(); }
  void check_overwritten(uint32_t to, uint32_t num_bytes) const {
    for (const auto& read : read_) {
      for (const auto& [from, size] : read) {
        if (from < to + num_bytes && to < from + size) fail("a copy overwrites what a load may still have to read");
      }
    }
  }
  // Of the current thread.
  void fence() {
    end_reads();
    for (const auto& [address, num_bytes] : written_[block.current]) update(address, num_bytes);
    written_[block.current].clear();
  }
  void update(uint32_t address, uint32_t num_bytes) {
    std::memcpy(bytes_ + address, shared_memory + address, num_bytes);
  }
  const char* at(uint32_t address, uint32_t num_bytes) const {
    if (address + num_bytes > block.shared_bytes) fail("an asynchronous operation reads beyond shared memory");
    return bytes_ + address;
  }

 private:
  char bytes_[kMaxSharedBytes];
  using Ranges = std::vector<std::pair<uint32_t, uint32_t>>;  // addresses and bytes
  Ranges written_[kMaxThreads];                               // since the thread's last fence
  Ranges read_[kMaxWarps];                                    // loads that may be in flight
};

}  // namespace heed::device_emulation
