// The shared thread arena: coverage, order, exceptions, callers at once, nesting, fork, floating-point state, scratch.
#include "cpu/parallel.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "heed/heed.h"

namespace heed::cpu {
namespace {

// How often each index of a loop was handed out.
std::vector<int> counts_of(int64_t count, bool is_small) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
  parallel_for(count, is_small, [&](int64_t i) { ++seen[static_cast<size_t>(i)]; });
  return {seen.begin(), seen.end()};
}

TEST(ParallelFor, EveryIndexOnce) {
  for (int64_t count : {0, 1, 2, 3, 1000}) {
    for (bool is_small : {false, true}) {
      EXPECT_EQ(counts_of(count, is_small), std::vector<int>(static_cast<size_t>(count), 1));
    }
  }
}

TEST(ParallelFor, SmallLoopsStayOnTheCallersThreadInOrder) {
  std::vector<int64_t> order;
  const std::thread::id caller = std::this_thread::get_id();
  parallel_for(100, true, [&](int64_t i) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    order.push_back(i);
  });
  EXPECT_EQ(order.size(), 100U);
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
}

TEST(ParallelFor, EachThreadSeesIncreasingIndices) {
  std::mutex mutex;
  std::vector<std::pair<std::thread::id, int64_t>> seen;
  parallel_for(500, false, [&](int64_t i) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto it = seen.rbegin(); it != seen.rend(); ++it) {
      if (it->first != std::this_thread::get_id()) continue;
      EXPECT_LT(it->second, i);
      break;
    }
    seen.emplace_back(std::this_thread::get_id(), i);
  });
}

TEST(ParallelFor, ThrowsWhatTheBodyThrew) {
  for (bool is_small : {false, true}) {
    EXPECT_THROW(parallel_for(100, is_small,
                              [](int64_t i) {
                                if (i == 37) throw std::out_of_range("37");
                              }),
                 std::out_of_range);
    EXPECT_EQ(counts_of(50, is_small), std::vector<int>(50, 1));  // still works
  }
}

TEST(ParallelFor, CallersAtTheSameTimeShareTheArena) {
  std::atomic<int> inside{0};
  std::atomic<int> most{0};
  std::atomic<int64_t> total{0};
  std::atomic<int> thrown{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 8; ++c) {
    callers.emplace_back([&, c] {
      for (int repeat = 0; repeat < 30; ++repeat) {
        try {
          parallel_for(20, false, [&](int64_t i) {
            const int now = ++inside;
            for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
            }
            std::this_thread::sleep_for(std::chrono::microseconds(50));
            --inside;
            if (c == 3 && i == 19) throw std::runtime_error("caller 3");
            ++total;
          });
        } catch (const std::runtime_error&) {
          ++thrown;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_LE(most, num_threads());
  EXPECT_EQ(thrown, 30);
  EXPECT_EQ(total, 8 * 30 * 20 - 30);
}

TEST(ParallelFor, Nests) {
  std::atomic<int64_t> total{0};
  parallel_for(10, false, [&](int64_t i) { parallel_for(10, false, [&](int64_t j) { total += i * 10 + j; }); });
  EXPECT_EQ(total, 99 * 100 / 2);
}

TEST(ParallelFor, WorksInAForkedChild) {
  EXPECT_EQ(counts_of(100, false), std::vector<int>(100, 1));  // the arena exists, with workers
  for (int repeat = 0; repeat < 5; ++repeat) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      bool is_good = counts_of(1000, false) == std::vector<int>(1000, 1);
      try {
        parallel_for(100, false, [](int64_t i) {
          if (i == 5) throw std::out_of_range("5");
        });
        is_good = false;
      } catch (const std::out_of_range&) {
      }
      _exit(is_good ? 0 : 1);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  }
  EXPECT_EQ(counts_of(100, false), std::vector<int>(100, 1));  // and the parent goes on
}

#if defined(__x86_64__)
TEST(ParallelFor, WorkersTakeTheCallersDenormalModeAndGiveTheirsBack) {
  const unsigned before = _mm_getcsr();
  for (unsigned mode : {0U, 0x8000U, 0x0040U, 0x8040U}) {
    _mm_setcsr((before & ~0x8040U) | mode);
    parallel_for(200, false, [&](int64_t) {
      EXPECT_EQ(_mm_getcsr() & 0x8040U, mode);
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    });
    EXPECT_EQ(_mm_getcsr() & 0x8040U, mode);
  }
  _mm_setcsr(before);
}
#endif

TEST(ThreadScratch, IsAlignedReusedAndPerThread) {
  void* first = thread_scratch(1000);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(first) % 64, 0U);
  EXPECT_EQ(thread_scratch(10), first);
  auto* large = static_cast<char*>(thread_scratch(1 << 20));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(large) % 64, 0U);
  std::memset(large, 1, 1 << 20);
  void* other = nullptr;
  std::thread([&] { other = thread_scratch(1000); }).join();
  EXPECT_NE(other, nullptr);
  EXPECT_EQ(thread_scratch(1000), large);
}

// Each of these reads the environment at first use, so it runs in a process of its own.
class Environment : public testing::Test {
 protected:
  void SetUp() override { testing::GTEST_FLAG(death_test_style) = "threadsafe"; }

  static void run_with(const char* value) {
    setenv("HEED_NUM_THREADS", value, 1);
    try {
      const int threads = num_threads();
      std::mutex mutex;
      std::set<std::thread::id> ids;
      parallel_for(200, false, [&](int64_t) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        const std::lock_guard<std::mutex> lock(mutex);
        ids.insert(std::this_thread::get_id());
      });
      std::exit(static_cast<int>(ids.size()) == threads ? threads : 100);
    } catch (const ValueError& error) {
      std::fputs(error.what(), stderr);
      std::exit(101);
    }
  }
};

TEST_F(Environment, NumThreads) {
  EXPECT_EXIT(run_with("1"), testing::ExitedWithCode(1), "");
  EXPECT_EXIT(run_with("2"), testing::ExitedWithCode(2), "");
  EXPECT_EXIT(run_with("5"), testing::ExitedWithCode(5), "");
}

TEST_F(Environment, BadNumThreadsIsAnError) {
  EXPECT_EXIT(run_with("0"), testing::ExitedWithCode(101), "HEED_NUM_THREADS: got '0', expected an integer from 1");
  EXPECT_EXIT(run_with("many"), testing::ExitedWithCode(101), "HEED_NUM_THREADS: got 'many'");
}

}  // namespace
}  // namespace heed::cpu
