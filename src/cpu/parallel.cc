// The shared thread arena, on oneTBB.
#include "cpu/parallel.h"

#include <pthread.h>
#include <tbb/global_control.h>
#include <tbb/info.h>
#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <xmmintrin.h>
#endif

#include "heed/heed.h"

namespace heed::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Floating-point state.

// FTZ and DAZ of the calling thread, given to the workers that help it.
class DenormalMode {
 public:
#if defined(__x86_64__) || defined(__i386__)
  static constexpr unsigned kFlushToZero = 0x8000u;
  static constexpr unsigned kDenormalsAreZero = 0x0040u;
  static constexpr unsigned kMask = kFlushToZero | kDenormalsAreZero;
  static DenormalMode current() { return DenormalMode(_mm_getcsr() & kMask); }
  void apply() const { _mm_setcsr((_mm_getcsr() & ~kMask) | bits_); }
#else
  static DenormalMode current() { return DenormalMode(0); }
  void apply() const {}
#endif

 private:
  explicit DenormalMode(unsigned bits) : bits_(bits) {}
  [[maybe_unused]] unsigned bits_;
};

class ScopedDenormalMode {
 public:
  explicit ScopedDenormalMode(DenormalMode mode) : saved_(DenormalMode::current()) { mode.apply(); }
  ~ScopedDenormalMode() { saved_.apply(); }
  ScopedDenormalMode(const ScopedDenormalMode&) = delete;
  ScopedDenormalMode& operator=(const ScopedDenormalMode&) = delete;

 private:
  DenormalMode saved_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The number of threads.

constexpr long kMaxThreads = 1024;

int default_threads() { return std::max(1, tbb::info::default_concurrency()); }  // respects the affinity mask

int configured_threads() {
  static const int threads = [] {  // a throw leaves it unset: the next call throws again
    const char* text = std::getenv("HEED_NUM_THREADS");
    if (text == nullptr || *text == '\0') return default_threads();
    char* end = nullptr;
    errno = 0;
    const long value = std::strtol(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || value < 1 || value > kMaxThreads) {
      throw ValueError("HEED_NUM_THREADS: got '" + std::string(text) + "', expected an integer from 1 to " +
                       std::to_string(kMaxThreads));
    }
    return static_cast<int>(value);
  }();
  return threads;
}

// ---------------------------------------------------------------------------------------------------------------------
// One parallel loop: threads take the next index until none is left.

struct Loop {
  int64_t count;
  const std::function<void(int64_t)>& body;
  DenormalMode mode;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  // Runs on every helping thread. Keeps the first exception; the others then stop at their next index.
  void help() {
    const ScopedDenormalMode scoped(mode);
    while (!failed.load(std::memory_order_relaxed)) {
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      try {
        body(index);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
  // After all helpers have returned.
  void finish() const {
    if (error) std::rethrow_exception(error);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The arena. Application threads that find it full hand their loop to it and wait, so that callers never add up.

struct Arena {
  explicit Arena(int threads) : task_arena(threads) {
    if (threads > default_threads()) {
      limit = std::make_unique<tbb::global_control>(tbb::global_control::max_allowed_parallelism,
                                                    static_cast<size_t>(threads));
    }
    task_arena.initialize();
  }
  std::unique_ptr<tbb::global_control> limit;
  tbb::task_arena task_arena;
};

// Never destroyed: other threads may still be inside while the process ends, and a forked child must not touch it.
std::atomic<Arena*> shared_arena{nullptr};
std::atomic<bool> is_forked_child{false};
std::atomic<int> forked_helpers{0};  // threads that help loops of a forked child

Arena& arena(int threads) {
  if (Arena* made = shared_arena.load(std::memory_order_acquire)) return *made;
  static std::mutex making;
  const std::lock_guard<std::mutex> lock(making);
  if (Arena* made = shared_arena.load(std::memory_order_acquire)) return *made;
  pthread_atfork(nullptr, nullptr, [] {
    is_forked_child.store(true);
    forked_helpers.store(0);  // a grandchild has none of its parent's
  });
  auto* made = new Arena(threads);
  shared_arena.store(made, std::memory_order_release);
  return *made;
}

// oneTBB cannot be used in the child of a process that used it: its workers are gone and a lock may have been held when
// they went. There the arena is this: threads that live as long as one loop, and no more of them at a time than
// configured.
void run_in_forked_child(Loop& loop, int threads) {
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(threads));
  for (int i = 1; i < threads; ++i) {
    if (forked_helpers.fetch_add(1) >= threads - 1) {
      forked_helpers.fetch_sub(1);
      break;
    }
    try {
      helpers.emplace_back([&loop] {
        loop.help();
        forked_helpers.fetch_sub(1);
      });
    } catch (const std::system_error&) {  // no more threads to be had: fewer help
      forked_helpers.fetch_sub(1);
      break;
    }
  }
  loop.help();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void parallel_for(int64_t count, bool is_small, const std::function<void(int64_t)>& body) {
  const int threads = static_cast<int>(std::min<int64_t>(configured_threads(), count));
  if (is_small || threads <= 1) {
    for (int64_t index = 0; index < count; ++index) body(index);
    return;
  }
  Loop loop{count, body, DenormalMode::current()};
  if (is_forked_child.load(std::memory_order_relaxed)) {
    run_in_forked_child(loop, threads);
  } else {
    arena(configured_threads()).task_arena.execute([&] {
      // Isolated: while it waits for its helpers, a thread must not start an unrelated call's item, whose scratch is
      // its own.
      tbb::this_task_arena::isolate([&] {
        tbb::parallel_for(
            0, threads, [&](int) { loop.help(); }, tbb::simple_partitioner());
      });
    });
  }
  loop.finish();
}

void* thread_scratch(size_t bytes) {
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity_bytes = 0;
  if (bytes > capacity_bytes) {
    memory.reset();
    capacity_bytes = 0;
    memory.reset(::operator new(bytes, kAlignment));
    capacity_bytes = bytes;
  }
  return memory.get();
}

}  // namespace heed::cpu

namespace heed {

int num_threads() { return cpu::configured_threads(); }

}  // namespace heed
