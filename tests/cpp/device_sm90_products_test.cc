// Hopper's warpgroup products as they are emulated (device_emulation/hopper_products.h), on which the tests of its
// kernels rest: against plain loops, and that mistakes in their use show.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "emulated_hopper.h"

namespace heed {
namespace {

using namespace testing_hopper;  // NOLINT(google-build-using-namespace): this file's vocabulary

// As the made-up operands are: small integers, whose products and sums are exact in every type.
uint16_t bits_of_integer(int value, bool is_bf16) {
  const auto x = static_cast<float>(value);
  return static_cast<uint16_t>(is_bf16 ? ptx::bf16_bits(x) : ptx::f16_bits(x));
}

int number_at(int row, int column) { return (row * 5 + column * 3) % 7 - 3; }

// A tile of rows of `columns` numbers, 128 bytes a row of each part of 64 columns, written and fenced by all threads.
void write_tile(uint32 tile, int rows, int columns, bool is_bf16, int seed, int part_bytes) {
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += 128) {
    for (int column = 0; column < columns; column += 2) {
      const uint32 low = bits_of_integer(number_at(row + seed, column), is_bf16);
      const uint32 high = bits_of_integer(number_at(row + seed, column + 1), is_bf16);
      const auto part = static_cast<uint32>(column / 64 * part_bytes);
      ptx::store_shared_4(tile + part + swizzled_offset(row, column % 64), low | high << 16);
    }
  }
  ptx::fence_async_shared();
}

// Operand a of step `step` of k from registers.
void fill_a(uint32 (&a)[4], int step, bool is_bf16, int seed) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  for (int i = 0; i < 4; ++i) {
    const int k = 16 * step + i / 2 * 8 + lane % 4 * 2;
    const uint32 low = bits_of_integer(number_at(row + i % 2 * 8 + seed, k), is_bf16);
    a[i] = low | static_cast<uint32>(bits_of_integer(number_at(row + i % 2 * 8 + seed, k + 1), is_bf16)) << 16;
  }
}

// Calls f(value, row of 64, column) for each accumulator of the thread.
template <int kSize, class F>
void for_accumulators(float (&d)[kSize], const F& f) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < kSize; ++i) {
    f(d[i], static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
  }
}

enum class Operands { kRegistersAndRows, kRegistersAndColumns, kShared };

// d = 1 + a b over 96 elements of k, in two groups.
template <int kColumns, bool kIsBf16>
void check_product(Operands operands) {
  constexpr int kSteps = 6, kDepth = 16 * kSteps, kSeedA = 1, kSeedB = 2;
  constexpr uint32 kA = 1024, kB = 1024 + 2 * 64 * 128;
  const bool is_n_major = operands == Operands::kRegistersAndColumns;
  const int b_rows = is_n_major ? kDepth : kColumns;
  const int b_columns = is_n_major ? kColumns : kDepth;
  const int b_part_bytes = b_rows * 128 + 1024;  // not side by side
  int num_wrong = 0;
  run(128, [&] {
    write_tile(kA, 64, kDepth, kIsBf16, kSeedA, 64 * 128);
    write_tile(kB, b_rows, b_columns, kIsBf16, kSeedB, b_part_bytes);
    __syncthreads();
    float d[kColumns / 2];
    std::fill(std::begin(d), std::end(d), 1.0f);
    ptx::wgmma_fence();
    for (int step = 0; step < kSteps; ++step) {
      const auto k_step = [&](uint32 tile, int part_bytes) {
        return ptx::wgmma_k_major(tile + static_cast<uint32>(step / 4 * part_bytes + step % 4 * 32));
      };
      uint32 a[4];
      fill_a(a, step, kIsBf16, kSeedA);
      if (operands == Operands::kShared) {
        ptx::wgmma_ss<kIsBf16>(d, k_step(kA, 64 * 128), k_step(kB, b_part_bytes), true);
      } else if (operands == Operands::kRegistersAndRows) {
        ptx::wgmma_rs<kIsBf16, false>(d, a, k_step(kB, b_part_bytes), true);
      } else {
        const auto rows = static_cast<uint32>(step * 16 * 128);
        ptx::wgmma_rs<kIsBf16, true>(d, a, ptx::wgmma_n_major(kB + rows, b_part_bytes), true);
      }
      if (step == 2) ptx::wgmma_commit();
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(d);
    for (const float& value : d) num_wrong += !std::isnan(value);  // not yet
    ptx::wgmma_wait<0>(d);
    for_accumulators(d, [&](float value, int row, int column) {
      int expected = 1;
      for (int k = 0; k < kDepth; ++k) {
        const int b = is_n_major ? number_at(k + kSeedB, column) : number_at(column + kSeedB, k);
        expected += number_at(row + kSeedA, k) * b;
      }
      num_wrong += value != static_cast<float>(expected);
    });
  });
  EXPECT_EQ(num_wrong, 0) << kColumns << (kIsBf16 ? " bf16 " : " f16 ") << static_cast<int>(operands);
}

template <int kColumns>
void check_products() {
  for (const Timing timing : kTimings) {
    set_timing(timing);
    for (const Operands operands : {Operands::kRegistersAndRows, Operands::kRegistersAndColumns, Operands::kShared}) {
      check_product<kColumns, true>(operands);
      check_product<kColumns, false>(operands);
    }
  }
}

TEST(DeviceSm90ProductsTest, Products) {
  check_products<8>();
  check_products<64>();
  check_products<80>();
  check_products<96>();
  check_products<128>();
  check_products<192>();
  check_products<256>();
}

// Sums are rounded towards zero; the first product of a chain may ignore what the registers hold.
TEST(DeviceSm90ProductsTest, ProductsRoundAndStartAnew) {
  constexpr uint32 kB = 1024;
  set_timing(Timing::kMixed);
  int num_wrong = 0;
  run(128, [&] {
    for (int at = static_cast<int>(threadIdx.x) * 4; at < 64 * 128; at += 512) {
      ptx::store_shared_4(kB + static_cast<uint32>(at), 0x3F803F80);  // 1
    }
    ptx::fence_async_shared();
    __syncthreads();
    float d[4];
    std::fill(std::begin(d), std::end(d), NAN);
    const uint32 tiny = 0x33003300;  // 2^-25
    uint32 a[4] = {tiny, tiny, tiny, tiny};
    const uint32 one = 0x3F803F80;
    uint32 ones[4] = {one, one, one, one};
    ptx::wgmma_fence();
    ptx::wgmma_rs<true, false>(d, ones, ptx::wgmma_k_major(kB), false);  // 16
    ptx::wgmma_rs<true, false>(d, a, ptx::wgmma_k_major(kB), true);      // + 2^-21: a quarter of a unit
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    for (const float value : d) num_wrong += value != 16.0f;
    for (float& value : d) value = -16.0f;
    for (uint32& value : a) value = 0xB600B600;  // -2^-19 each, 16 of them -2^-15
    ptx::wgmma_fence();
    ptx::wgmma_rs<true, false>(d, a, ptx::wgmma_k_major(kB), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    for (const float value : d) num_wrong += value != -16.0f - 0x1p-15f;
  });
  EXPECT_EQ(num_wrong, 0);
}

// Writes ones to b, multiplies, and then overwrites b before or after the wait. Returns what the first thread got.
float product_with_reuse(bool waits_first, bool fences) {
  constexpr uint32 kB = 1024;
  float result = 0.0f;
  run(128, [&] {
    const auto write = [&](uint32 value) {
      for (int at = static_cast<int>(threadIdx.x) * 4; at < 8 * 128; at += 512) {
        ptx::store_shared_4(kB + static_cast<uint32>(at), value);
      }
      if (fences) ptx::fence_async_shared();
    };
    write(0x3F803F80);  // 1
    __syncthreads();
    float d[4] = {};
    const uint32 a[4] = {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
    ptx::wgmma_fence();
    ptx::wgmma_rs<true, false>(d, a, ptx::wgmma_k_major(kB), false);
    ptx::wgmma_commit();
    if (waits_first) ptx::wgmma_wait<0>(d);
    __syncthreads();
    write(0x40004000);  // 2
    __syncthreads();
    if (!waits_first) ptx::wgmma_wait<0>(d);
    if (threadIdx.x == 0) result = d[0];
  });
  return result;
}

TEST(DeviceSm90ProductsTest, ProductsReadLateAndAfterAFence) {
  set_timing(Timing::kEarly);  // of writes; reads are late
  EXPECT_EQ(product_with_reuse(true, true), 16.0f);
  EXPECT_EQ(product_with_reuse(false, true), 32.0f);
  EXPECT_TRUE(std::isnan(product_with_reuse(true, false)));  // what was there before
  set_timing(Timing::kLate);
  EXPECT_EQ(product_with_reuse(true, true), 16.0f);
  EXPECT_EQ(product_with_reuse(false, true), 16.0f);
}

// ---------------------------------------------------------------------------------------------------------------------
// Mistakes.

void multiply_without_a_fence() {
  float d[4] = {};
  ptx::wgmma_rs<true, false>(d, {}, ptx::wgmma_k_major(0), false);
}
void write_accumulators_too_early() {
  float d[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_rs<true, false>(d, {}, ptx::wgmma_k_major(0), false);
  ptx::wgmma_commit();
  d[1] = 0.0f;
  ptx::wgmma_wait<0>(d);
}
void wait_without_the_accumulators() {
  float d[4] = {}, e[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_rs<true, false>(d, {}, ptx::wgmma_k_major(0), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(e);
}
void end_before_products() {
  float d[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_rs<true, false>(d, {}, ptx::wgmma_k_major(0), false);
  ptx::wgmma_commit();
}
void multiply_in_one_warp_only() {
  if (threadIdx.x >= 32) return;
  float d[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_rs<true, false>(d, {}, ptx::wgmma_k_major(0), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
void disagree_about_b() {
  float d[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_rs<true, false>(d, {}, ptx::wgmma_k_major(1024 * (threadIdx.x / 32)), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
}
TEST(DeviceSm90ProductsDeathTest, MistakesAreNoticed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  set_timing(Timing::kMixed);
  EXPECT_DEATH(run_warpgroup(multiply_without_a_fence), "without wgmma.fence");
  EXPECT_DEATH(run_warpgroup(write_accumulators_too_early), "were written before");
  EXPECT_DEATH(run_warpgroup(wait_without_the_accumulators), "does not list");
  EXPECT_DEATH(run_warpgroup(end_before_products), "before its products are done");
  EXPECT_DEATH(run_warpgroup(multiply_in_one_warp_only), "waits for products");
  EXPECT_DEATH(run_warpgroup(disagree_about_b), "disagree about a product");
}

}  // namespace
}  // namespace heed
