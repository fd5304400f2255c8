// What a Hopper GPU does beside its threads: barriers in shared memory that count arrivals and bytes, tensor copies,
// registers that move between warpgroups, and the products of hopper_products.h. hopper_memory.h says when.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "device_emulation/emulation.h"
#include "device_emulation/hopper_memory.h"
#include "device_emulation/hopper_products.h"
#include "device_emulation/tensor_map.h"

namespace heed::device_emulation {

inline constexpr int kMaxNamedBarriers = 16;
inline constexpr uint32_t kRegistersOfSm = 65536;

// A barrier of shared memory. Its 8 bytes hold a mark, to notice that something else was written there.
struct Mbarrier {
  static constexpr uint64_t kMark = 0x6272726965723A29;
  int count, pending;
  int64_t bytes;  // expected and not there yet
  unsigned phase;
  int owner;       // who made it
  bool is_fenced;  // known to tensor copies
};

struct NamedBarrier {
  int num_threads, num_arrived;
  unsigned generation;
};

struct HopperThread {
  unsigned num_store_groups, num_read_groups;
  bool has_open_stores;
  uint32_t num_registers;
};

struct BulkStore {
  int thread;
  unsigned group;
  TensorMapContents map;
  std::array<int, kMaxTensorRank> coordinates;
  uint32_t from;
};
struct BulkLoad {
  TensorMapContents map;
  std::array<int, kMaxTensorRank> coordinates;
  uint32_t to, barrier;
};

class Hopper final : public AsyncEngine {
 public:
  Products products{memory_};

  Hopper() { async_engine = this; }

  // -------------------------------------------------------------------------------------------------------------------
  // The block.

  void start_block() override {
    barriers_.clear();
    loads_.clear();
    stores_.clear();
    memory_.start_block();
    products.start_block();
    for (NamedBarrier& barrier : named_) barrier = {};
    const auto num_threads = static_cast<uint32_t>(block.num_threads);
    const uint32_t registers = std::min(kRegistersOfSm / num_threads / 8 * 8, 255u);
    free_registers_ = 0;
    for (HopperThread& thread : threads_) {
      thread = {};
      thread.num_registers = registers;
    }
  }
  void turn() override {
    if (block.copies_vary && block.random() % 4 == 0) advance();
  }
  // Any of what can be done next. Stores come last unless all is at random: nothing but a wait for them makes them
  // read.
  bool advance() override {
    size_t num_products = 0;
    for (int warp = 0; warp < kMaxWarps; ++warp) num_products += products.has_next(warp) ? 1 : 0;
    const size_t num_first = loads_.size() + num_products;
    const size_t num_choices = num_first + (block.copies_vary || num_first == 0 ? stores_.size() : 0);
    if (num_choices == 0) return false;
    size_t choice = block.random() % num_choices;
    if (choice < loads_.size()) {
      finish_load(choice);
    } else if (choice < num_first) {
      choice -= loads_.size();
      int warp = 0;
      while (!products.has_next(warp) || choice-- != 0) ++warp;
      products.multiply_next(warp);
    } else {
      finish_store(choice - num_first);
    }
    return true;
  }
  void end_thread() override {
    const HopperThread& self = thread();
    products.end_thread();
    if (self.has_open_stores || self.num_store_groups != self.num_read_groups) {
      fail("a thread ends before its bulk stores have read shared memory");
    }
  }
  void end_block() override {
    if (!loads_.empty()) fail("a block ends before its tensor copies have arrived");
    for (const auto& [address, barrier] : barriers_) {
      if (barrier.bytes != 0) fail("a block ends while a barrier expects bytes");
    }
  }

  void note_write(uint32_t to, uint32_t num_bytes) override { memory_.note_write(to, num_bytes); }
  void note_read(uint32_t from, uint32_t num_bytes) override { memory_.note_read(from, num_bytes); }
  void end_reads() override { memory_.end_reads(); }
  void fence_proxy() {
    memory_.fence();
    fence_barriers();
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Barriers.

  void init_barrier(uint32_t address, int count) {
    if (count < 1 || count >= 1 << 20) fail("a barrier for a number of arrivals that it cannot count");
    if (address % 8 != 0 || address + 8 > block.shared_bytes) fail("a barrier that is not 8 bytes of shared memory");
    if (barriers_.count(address) != 0) fail("a barrier is made twice");
    barriers_[address] = {count, count, 0, 0, block.current, false};
    std::memcpy(shared_memory + address, &Mbarrier::kMark, 8);
  }
  void fence_barriers() {
    for (auto& [address, barrier] : barriers_) barrier.is_fenced = barrier.is_fenced || barrier.owner == block.current;
  }
  void arrive(uint32_t address, int64_t expected_bytes = 0) {
    Mbarrier& barrier = at(address);
    if (expected_bytes < 0 || expected_bytes >= 1 << 20) fail("a barrier expects more bytes than it can count");
    if (barrier.pending == 0) fail("more arrivals than a barrier counts");
    barrier.bytes += expected_bytes;
    --barrier.pending;
    end_phase_if_complete(barrier);
    if (block.random() % 4 == 0) end_turn();  // those who waited may go on before the one that came last
  }
  void wait(uint32_t address, uint32_t parity) {
    at(address);
    if (parity > 1) fail("a parity that is neither 0 nor 1");
    if (block.random() % 4 == 0) give_way();
    wait_until(parity == 0 ? "phase 0 of the mbarrier" : "phase 1 of the mbarrier", address,
               [&] { return at(address).phase % 2 != parity; });
  }
  bool has_ended(uint32_t address, uint32_t parity) {
    at(address);
    if (parity > 1) fail("a parity that is neither 0 nor 1");
    if (block.random() % 4 == 0) give_way();
    return at(address).phase % 2 != parity;
  }

  void sync_named(int id, int num_threads) {
    const unsigned generation = arrive_named(id, num_threads);
    wait_until("named barrier", static_cast<uint32_t>(id), [&] { return named_[id].generation != generation; });
  }
  unsigned arrive_named(int id, int num_threads) {
    if (id < 1 || id >= kMaxNamedBarriers) fail("named barriers are 1..15; 0 is __syncthreads's");
    if (num_threads % kWarpSize != 0 || num_threads <= 0) fail("a named barrier counts whole warps");
    NamedBarrier& barrier = named_[id];
    if (barrier.num_arrived != 0 && barrier.num_threads != num_threads) fail("a named barrier's threads disagree");
    barrier.num_threads = num_threads;
    const unsigned generation = barrier.generation;
    if (++barrier.num_arrived == num_threads) {
      barrier.num_arrived = 0;
      ++barrier.generation;
    }
    return generation;
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Tensor copies.

  void load(uint32_t to, const void* map, uint32_t barrier, std::array<int, kMaxTensorRank> coordinates, int rank) {
    BulkLoad load{decode(map, rank), coordinates, to, barrier};
    check_box(load.map, to);
    if (!at(barrier).is_fenced) fail("a tensor copy uses a barrier before the fence after its making");
    memory_.check_overwritten(
        to, static_cast<uint32_t>(tensor_map_box_rows(load.map) * tensor_map_box_row_bytes(load.map)));
    loads_.push_back(load);
    if (is_done_at_once(block.copies_late)) finish_load(loads_.size() - 1);
  }
  void store(const void* map, uint32_t from, std::array<int, kMaxTensorRank> coordinates, int rank) {
    const BulkStore store{block.current, thread().num_store_groups, decode(map, rank), coordinates, from};
    check_box(store.map, from);
    thread().has_open_stores = true;
    stores_.push_back(store);
    if (is_done_at_once(!block.copies_late)) finish_store(stores_.size() - 1);
  }
  void commit_stores() {
    ++thread().num_store_groups;
    thread().has_open_stores = false;
  }
  void wait_for_stores(unsigned num_pending) {
    HopperThread& self = thread();
    const int current = block.current;
    const unsigned end = self.num_store_groups > num_pending ? self.num_store_groups - num_pending : 0;
    wait_until("bulk stores", end, [&] {
      return std::none_of(stores_.begin(), stores_.end(),
                          [&](const BulkStore& store) { return store.thread == current && store.group < end; });
    });
    self.num_read_groups = std::max(self.num_read_groups, end);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Registers.

  void set_registers(uint32_t wanted, bool is_more) {
    uint32_t& have = thread().num_registers;
    if (is_more ? wanted < have : wanted > have) fail("setmaxnreg in the wrong direction");
    if (is_more) wait_until("registers", wanted, [&] { return free_registers_ >= wanted - have; });
    free_registers_ += have;
    free_registers_ -= wanted;
    have = wanted;
  }

 private:
  HopperThread& thread() { return threads_[block.current]; }
  Mbarrier& at(uint32_t address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) fail("not a barrier, or not yet");
    if (std::memcmp(shared_memory + address, &Mbarrier::kMark, 8) != 0) fail("a barrier was overwritten");
    return found->second;
  }
  static void end_phase_if_complete(Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.pending = barrier.count;
  }

  static TensorMapContents decode(const void* map, int rank) {
    TensorMapContents contents;
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("a tensor map is not aligned to 64 bytes");
    if (!decode_tensor_map(map, contents)) fail("not a tensor map");
    if (contents.rank != rank) fail("a tensor map of another rank");
    return contents;
  }
  static void check_box(const TensorMapContents& map, uint32_t address) {
    const int row_bytes = tensor_map_box_row_bytes(map);
    const bool is_swizzled = map.swizzle == kTensorMapSwizzle128;
    if (is_swizzled && row_bytes != 128) fail("rows of less than 128 bytes, swizzled by 128, are not emulated");
    if (address % 128 != 0) fail("a tensor copy's shared memory is not aligned to 128 bytes");
    if (address + static_cast<uint32_t>(tensor_map_box_rows(map) * row_bytes) > block.shared_bytes) {
      fail("a tensor copy reaches beyond shared memory");
    }
  }
  // Calls f(shared memory address, global address or null: outside, bytes) for pieces of a box of at most 16 bytes.
  template <class F>
  static void for_pieces(const TensorMapContents& map, const int* coordinates, uint32_t box, const F& f) {
    const int row_bytes = tensor_map_box_row_bytes(map);
    for_box_rows(map, coordinates, [&](int row, int begin, int num_bytes, char* global) {
      for (int chunk = 0; chunk < row_bytes; chunk += 16) {
        uint32_t address = box + static_cast<uint32_t>(row * row_bytes + chunk);
        if (map.swizzle == kTensorMapSwizzle128) address ^= (address >> 7 & 7) << 4;
        const int first = std::max(chunk, begin);
        const int last = std::min(chunk + 16, begin + num_bytes);
        if (first >= last) {
          f(address, nullptr, 16);
          continue;
        }
        if (first > chunk) f(address, nullptr, first - chunk);
        f(address + static_cast<uint32_t>(first - chunk), global + (first - begin), last - first);
        if (last < chunk + 16) f(address + static_cast<uint32_t>(last - chunk), nullptr, chunk + 16 - last);
      }
    });
  }
  void finish_load(size_t index) {
    const BulkLoad load = loads_[index];
    loads_.erase(loads_.begin() + static_cast<std::ptrdiff_t>(index));
    for_pieces(load.map, load.coordinates.data(), load.to, [&](uint32_t to, const char* from, int num_bytes) {
      const auto size = static_cast<size_t>(num_bytes);
      if (from == nullptr) {
        std::memset(shared_memory + to, 0, size);
      } else {
        std::memcpy(shared_memory + to, from, size);
      }
      memory_.update(to, static_cast<uint32_t>(num_bytes));
    });
    Mbarrier& barrier = at(load.barrier);
    barrier.bytes -= tensor_map_box_rows(load.map) * tensor_map_box_row_bytes(load.map);
    end_phase_if_complete(barrier);
  }
  void finish_store(size_t index) {
    const BulkStore store = stores_[index];
    stores_.erase(stores_.begin() + static_cast<std::ptrdiff_t>(index));
    for_pieces(store.map, store.coordinates.data(), store.from, [&](uint32_t from, char* to, int num_bytes) {
      if (to != nullptr)
        std::memcpy(to, memory_.at(from, static_cast<uint32_t>(num_bytes)), static_cast<size_t>(num_bytes));
    });
  }

  AsyncView memory_;
  std::map<uint32_t, Mbarrier> barriers_;
  NamedBarrier named_[kMaxNamedBarriers];
  std::deque<BulkLoad> loads_;
  std::deque<BulkStore> stores_;
  HopperThread threads_[kMaxThreads];
  uint32_t free_registers_ = 0;
};
inline Hopper hopper;

}  // namespace heed::device_emulation
