// A block of GPU threads on the CPU, so that device code runs and is tested where there is no GPU: every thread is a
// fiber, and CUDA's built-in functions are ordinary ones that wait for the other fibers. Warps take turns at random,
// and so do the lanes of a warp: a barrier that is missing shows as a wrong result. The instructions are in
// cuda/device/ptx.cuh beside this file.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "fibers.h"

#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct ThreadIndex {
  unsigned x = 0;
};
inline ThreadIndex threadIdx;
inline ThreadIndex blockIdx;
inline ThreadIndex gridDim;

namespace heed::device_emulation {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxWarps = 16;
inline constexpr int kMaxThreads = kMaxWarps * kWarpSize;
inline constexpr size_t kStackBytes = size_t{1} << 18;
inline constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block, on the GPUs that have most

alignas(1024) inline char shared_memory[kMaxSharedBytes];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "device emulation: %s\n", what);
  std::abort();
}

// What the lanes of a warp do together.
enum class Collective : char { kSyncWarp, kShuffle, kBallot, kLoadMatrix, kLoadedMatrix, kStoreMatrix, kMultiply };
using LaneValues = std::array<uint32_t, 6>;

struct Exchange {
  Collective kinds[kWarpSize];
  LaneValues values[kWarpSize];
  unsigned num_arrived;  // over all rounds
};

struct AsyncCopy {
  uint32_t to;
  const void* from;
  int num_bytes;
  uint32_t size;   // the rest is filled with zeros
  unsigned group;  // of the thread's copies
};

struct Thread {
  Fiber fiber;
  std::unique_ptr<char[]> stack;
  bool is_done;
  bool (*is_ready)(const void* condition);  // null: it can go on
  const void* condition;
  const char* waits_for;
  uint32_t waits_at;  // an address of shared memory or the like
  unsigned num_collectives;
  std::vector<AsyncCopy> copies;  // in flight
  unsigned num_copy_groups;       // committed
  int num_cluster_waits;
};

struct Block {
  std::function<void()> body;
  Fiber scheduler;
  int num_threads = 0;
  Thread threads[kMaxThreads];
  int current = 0;
  bool is_turn_over = false;         // the warp stops here
  Exchange exchanges[kMaxWarps][2];  // used in turn: nobody is two rounds ahead of a lane that still reads
  int num_at_barrier = 0;
  unsigned num_barriers = 0;
  bool any_at_barrier[2];
  size_t shared_bytes = 0;
  bool copies_late = false;  // asynchronous copies arrive when they are waited for, else at once
  bool copies_vary = false;  // Hopper's: some early, some late
  std::mt19937 random{1};
};
inline Block block;

// What goes on beside the threads, where a GPU has such things (hopper.h).
struct AsyncEngine {
  virtual void start_block() = 0;
  virtual void turn() = 0;        // now and then
  virtual bool advance() = 0;     // no thread can go on; returns false if nothing is left to do
  virtual void end_thread() = 0;  // of the current one
  virtual void note_write(uint32_t to, uint32_t num_bytes) = 0;   // a thread's, to shared memory
  virtual void note_read(uint32_t from, uint32_t num_bytes) = 0;  // into registers that nobody has used yet
  virtual void end_reads() = 0;                                   // the warp's registers are used
  virtual void end_block() = 0;

 protected:
  ~AsyncEngine() = default;
};
inline AsyncEngine* async_engine = nullptr;

// A cluster of blocks, which run one after the other, twice: the first time up to the barrier after which they read
// what others have sent, only to learn what is sent; the second time they find it there.
struct Cluster {
  struct Store {
    uint32_t to;
    std::array<float, 4> values;
    int count;
  };
  int size = 1, rank = 0;
  bool only_sends = false;
  std::vector<Store> sent[8];  // to each block
};
inline Cluster cluster;

inline int current_lane() { return block.current % kWarpSize; }

inline Thread& current_thread() { return block.threads[block.current]; }
inline void give_way() { switch_fiber(current_thread().fiber, block.scheduler); }
// To other warps too.
inline void end_turn() {
  block.is_turn_over = true;
  give_way();
}

// `ready()` is asked outside of the thread too.
template <class Ready>
void wait_until(const char* waits_for, uint32_t waits_at, const Ready& ready) {
  if (ready()) return;
  Thread& thread = current_thread();
  thread.condition = &ready;
  thread.is_ready = [](const void* condition) { return (*static_cast<const Ready*>(condition))(); };
  thread.waits_for = waits_for;
  thread.waits_at = waits_at;
  do {
    give_way();
  } while (!ready());
  thread.is_ready = nullptr;
}
inline bool can_run(const Thread& thread) {
  return !thread.is_done && (thread.is_ready == nullptr || thread.is_ready(thread.condition));
}

// Every lane leaves its values and gets those of all.
inline const LaneValues* exchange(Collective kind, const LaneValues& values) {
  const int lane = current_lane();
  const unsigned round = block.threads[block.current].num_collectives++;
  Exchange& shared = block.exchanges[block.current / kWarpSize][round % 2];
  shared.kinds[lane] = kind;
  shared.values[lane] = values;
  ++shared.num_arrived;
  wait_until("the other lanes", round, [&] { return shared.num_arrived >= kWarpSize * (round / 2 + 1); });
  for (const Collective other : shared.kinds) {
    if (other != kind) fail("the lanes of a warp meet at different instructions");
  }
  return shared.values;
}

inline bool wait_for_block(bool value) {
  const unsigned round = block.num_barriers;
  block.any_at_barrier[round % 2] |= value;
  if (++block.num_at_barrier == block.num_threads) {
    block.num_at_barrier = 0;
    block.any_at_barrier[(round + 1) % 2] = false;
    ++block.num_barriers;
  }
  wait_until("the whole block", round, [&] { return block.num_barriers != round; });
  return block.any_at_barrier[round % 2];
}

[[noreturn]] inline void run_thread() {
  block.body();
  if (async_engine != nullptr) async_engine->end_thread();
  current_thread().is_done = true;
  give_way();
  fail("a thread that is done runs on");
}

inline void start_thread(Thread& thread) {
  if (thread.stack == nullptr) thread.stack.reset(new char[kStackBytes]);
  thread.is_done = false;
  thread.is_ready = nullptr;
  thread.num_collectives = 0;
  thread.copies.clear();
  thread.num_copy_groups = 0;
  thread.num_cluster_waits = 0;
  start_fiber(thread.fiber, thread.stack.get(), kStackBytes, run_thread);
}

// A warp runs alone for a few rounds or many, its lanes in either order from any of them on, until all of them wait.
// Returns whether any ran.
inline bool run_some_warp() {
  const int warp = static_cast<int>(block.random() % static_cast<unsigned>(block.num_threads / kWarpSize));
  const int num_rounds = 1 << block.random() % 7;
  const int first = static_cast<int>(block.random() % kWarpSize);
  const int step = block.random() % 2 == 0 ? 1 : kWarpSize - 1;
  bool has_run = false;
  for (int round = 0; round < num_rounds; ++round) {
    bool runs = false;
    for (int turn = 0; turn < kWarpSize; ++turn) {
      const int thread = warp * kWarpSize + (first + turn * step) % kWarpSize;
      if (!can_run(block.threads[thread])) continue;
      runs = true;
      block.current = thread;
      threadIdx.x = static_cast<unsigned>(thread);
      switch_fiber(block.scheduler, block.threads[thread].fiber);
      if (!std::exchange(block.is_turn_over, false)) continue;
      return true;
    }
    if (!runs) break;
    has_run = true;
  }
  return has_run;
}

[[noreturn]] inline void fail_hanging() {
  for (int index = 0; index < block.num_threads; ++index) {
    const Thread& thread = block.threads[index];
    const bool is_first = index % kWarpSize == 0 || block.threads[index - 1].is_done ||
                          block.threads[index - 1].waits_for != thread.waits_for ||
                          block.threads[index - 1].waits_at != thread.waits_at;
    if (thread.is_done || !is_first) continue;
    std::fprintf(stderr, "from thread %d (lane %d of warp %d) on: waits for %s (%u)\n", index, index % kWarpSize,
                 index / kWarpSize, thread.waits_for, thread.waits_at);
  }
  fail("threads wait for one another for ever");
}

inline void run_block(unsigned index, int num_threads, size_t shared_bytes, std::function<void()> body) {
  if (shared_bytes > kMaxSharedBytes) fail("too much shared memory");
  if (num_threads > kMaxThreads || num_threads % kWarpSize != 0) fail("not a number of threads that fits");
  block.num_threads = num_threads;
  block.body = std::move(body);
  block.shared_bytes = shared_bytes;
  block.num_at_barrier = 0;
  block.num_barriers = 0;
  std::fill(std::begin(block.any_at_barrier), std::end(block.any_at_barrier), false);
  std::memset(block.exchanges, 0, sizeof block.exchanges);
  std::memset(shared_memory, 0xFF, sizeof shared_memory);  // NaN in every type
  blockIdx.x = index;
  Thread* const end = block.threads + num_threads;
  for (Thread* thread = block.threads; thread != end; ++thread) start_thread(*thread);
  if (async_engine != nullptr) async_engine->start_block();
  const auto is_done = [](const Thread& thread) { return thread.is_done; };
  while (!std::all_of(block.threads, end, is_done)) {
    if (async_engine != nullptr) async_engine->turn();
    if (run_some_warp() || std::any_of(block.threads, end, can_run)) continue;
    if (async_engine == nullptr || !async_engine->advance()) fail_hanging();
  }
  if (async_engine != nullptr) async_engine->end_block();
}

// Blocks [size * index, size * index + size), a cluster. `body` waits for the start of the others first, then, after
// its stores, for theirs.
inline void run_cluster(unsigned index, int size, int num_threads, size_t shared_bytes,
                        const std::function<void()>& body) {
  cluster.size = size;
  for (std::vector<Cluster::Store>& stores : cluster.sent) stores.clear();
  for (const bool only_sends : {true, false}) {
    if (only_sends && size == 1) continue;
    cluster.only_sends = only_sends;
    for (cluster.rank = 0; cluster.rank < size; ++cluster.rank) {
      run_block(index * static_cast<unsigned>(size) + static_cast<unsigned>(cluster.rank), num_threads, shared_bytes,
                body);
    }
  }
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
T shuffle(T value, int from) {
  const LaneValues* values = exchange(Collective::kShuffle, {bits_as<uint32_t>(value)});
  return bits_as<T>(values[from][0]);
}

}  // namespace heed::device_emulation

// ---------------------------------------------------------------------------------------------------------------------
// CUDA's built-in functions, under their own names.

using std::max;
using std::min;
inline long long min(long long a, int b) { return std::min<long long>(a, b); }
inline long long min(int a, long long b) { return std::min<long long>(a, b); }
inline long long max(long long a, int b) { return std::max<long long>(a, b); }
inline long long max(int a, long long b) { return std::max<long long>(a, b); }

inline void __syncthreads() { heed::device_emulation::wait_for_block(false); }
inline int __syncthreads_or(int value) { return heed::device_emulation::wait_for_block(value != 0) ? 1 : 0; }
inline void __threadfence() {}
inline void __syncwarp() {
  using heed::device_emulation::Collective;
  heed::device_emulation::exchange(Collective::kSyncWarp, {});
}

template <class T>
T __shfl_sync(unsigned /*mask*/, T value, int from) {
  return heed::device_emulation::shuffle(value, from & 31);
}
template <class T>
T __shfl_xor_sync(unsigned /*mask*/, T value, int mask) {
  return heed::device_emulation::shuffle(value, heed::device_emulation::current_lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned /*mask*/, T value, int distance) {
  const int lane = heed::device_emulation::current_lane();
  return heed::device_emulation::shuffle(value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned /*mask*/, int value) {
  using heed::device_emulation::Collective;
  const auto* values = heed::device_emulation::exchange(Collective::kBallot, {value != 0 ? 1u : 0u});
  unsigned bits = 0;
  for (int lane = 0; lane < heed::device_emulation::kWarpSize; ++lane) bits |= values[lane][0] << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0 ? 1 : 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Fibers change at collectives only, so that these need no more.
inline int atomicMin(int* at, int value) {
  const int old = *at;
  *at = std::min(old, value);
  return old;
}
inline int atomicMax(int* at, int value) {
  const int old = *at;
  *at = std::max(old, value);
  return old;
}
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at += value;
  return old;
}
inline int atomicAdd(int* at, int value) {
  const int old = *at;
  *at += value;
  return old;
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at |= value;
  return old;
}

// Volatile: never contracted or folded, as CUDA promises of them.
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float __fsub_rn(float a, float b) {
  volatile float difference = a - b;
  return difference;
}
inline unsigned __float_as_uint(float x) { return heed::device_emulation::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned bits) { return heed::device_emulation::bits_as<float>(bits); }
inline float __int_as_float(int bits) { return heed::device_emulation::bits_as<float>(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float normcdff(float x) { return static_cast<float>(0.5 * std::erfc(-static_cast<double>(x) / std::sqrt(2.0))); }
