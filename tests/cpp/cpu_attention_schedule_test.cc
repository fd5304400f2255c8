// Work items of the CPU attention forward kernel: every row once, the most work first, all threads busy to the end.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cpu/attention_fwd_schedule.h"

namespace heed {
namespace {

TEST(Schedule, CoversEveryRowOnceAndPutsTheMostWorkFirst) {
  std::mt19937 random(77);
  for (int round = 0; round < 200; ++round) {
    cpu::ForwardPlan plan;
    plan.is_varlen = true;
    plan.batch = 1;
    plan.num_problems = 1;
    plan.num_kv_heads = 1 + random() % 3;
    plan.group = 1 + random() % 4;
    plan.head_dim_qk = plan.head_dim_v = 64;
    plan.window_right = random() % 2 == 0 ? 0 : -1;
    plan.num_sequences = random() % 12;
    std::vector<int32_t> cu = {static_cast<int32_t>(random() % 50)};
    for (int64_t b = 0; b < plan.num_sequences; ++b) {
      const int32_t scale = random() % 3 == 0 ? 1 : random() % 2 == 0 ? 60 : 3000;
      cu.push_back(cu.back() + static_cast<int32_t>(random() % static_cast<uint32_t>(scale)));
    }
    plan.q_len = plan.kv_len = cu.back() + static_cast<int32_t>(random() % 50);
    plan.cu_seqlens_q.data = cu.data();
    plan.cu_seqlens_q.token = 1;
    const cpu::Schedule schedule(plan, 48, 8, 1 + static_cast<int>(random() % 16));
    std::vector<int> count(static_cast<size_t>(plan.q_len * plan.group * plan.num_kv_heads));
    int64_t last_keys = INT64_MAX;
    for (int64_t i = 0; i < schedule.num_items(); ++i) {
      const cpu::WorkItem item = schedule.item(i);
      const int64_t rows = item.rows.end - item.rows.begin;
      ASSERT_GT(rows, 0);
      ASSERT_LE(rows, int64_t{48} * schedule.panels_per_item());
      ASSERT_LE(schedule.panels_per_item(), 8);
      const int64_t keys = item.keys.end - item.keys.begin;
      // From a longer sequence to a shorter one, or on inside one of the same length.
      if (rows == int64_t{48} * schedule.panels_per_item()) {
        ASSERT_LE(keys, last_keys);
        last_keys = keys;
      }
      for (int64_t row = item.rows.begin; row < item.rows.end; ++row) {
        const int64_t query = item.queries.begin + row / plan.group;
        ASSERT_LT(query, item.queries.end);
        ++count[static_cast<size_t>((item.kv_head * plan.q_len + query) * plan.group + row % plan.group)];
      }
    }
    for (int times : count) ASSERT_EQ(times, 1);
  }
}

// Threads that take items as the schedule hands them out, each as long as it has (query, key) pairs, finish together:
// 16 sequences of 64 to 8192 tokens within 1.1 of a perfect split.
TEST(Schedule, UnevenLengthsKeepAllThreadsBusy) {
  for (int64_t num_kv_heads : {1, 8}) {
    for (int64_t window_right : {-1, 0}) {
      for (bool is_geometric : {false, true}) {
        std::vector<int32_t> cu = {0};
        for (int i = 0; i < 16; ++i) {
          const double t = static_cast<double>(i * 7 % 16) / 15;  // in no order
          cu.push_back(cu.back() + static_cast<int32_t>(is_geometric ? 64 * std::exp2(7 * t) : 64 + t * 8128));
        }
        cpu::ForwardPlan plan;
        plan.is_varlen = true;
        plan.batch = plan.num_problems = 1;
        plan.num_kv_heads = num_kv_heads;
        plan.group = 1;
        plan.head_dim_qk = plan.head_dim_v = 64;
        plan.window_right = window_right;
        plan.num_sequences = 16;
        plan.q_len = plan.kv_len = cu.back();
        plan.cu_seqlens_q.data = cu.data();
        plan.cu_seqlens_q.token = 1;
        for (int num_threads : {1, 2, 3, 4, 8, 16}) {
          const cpu::Schedule schedule(plan, 48, 8, num_threads);
          std::vector<double> busy(static_cast<size_t>(num_threads));
          for (int64_t i = 0; i < schedule.num_items(); ++i) {
            const cpu::WorkItem item = schedule.item(i);
            const variants::Band band =
                plan.band(item.queries.end - item.queries.begin, item.keys.end - item.keys.begin);
            double& thread = *std::min_element(busy.begin(), busy.end());
            for (int64_t row = item.rows.begin; row < item.rows.end; ++row) {
              const variants::Range keys =
                  intersect(band.keys_of_any({row, row + 1}), {0, item.keys.end - item.keys.begin});
              thread += static_cast<double>(keys.end - keys.begin);
            }
          }
          double total = 0;
          for (double time : busy) total += time;
          EXPECT_LE(*std::max_element(busy.begin(), busy.end()), 1.1 * total / num_threads)
              << num_threads << " threads, " << num_kv_heads << " heads, window_right " << window_right
              << (is_geometric ? ", geometric" : ", linear");
        }
      }
    }
  }
}

}  // namespace
}  // namespace heed
