// Hopper's barriers, tensor copies and what goes with them as they are emulated (device_emulation/hopper.h), on which
// the tests of its kernels rest: each against plain loops, and that mistakes in their use show.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "attention_oracle.h"
#include "emulated_hopper.h"
#include "guarded.h"

namespace heed {
namespace {

using namespace testing_hopper;  // NOLINT(google-build-using-namespace): this file's vocabulary
using namespace testing_oracle;  // NOLINT(google-build-using-namespace)
using cuda::TensorMap;

struct Encoding {
  std::vector<uint64_t> sizes, strides;
  std::vector<uint32_t> box;
  std::vector<uint32_t> element_strides = std::vector<uint32_t>(5, 1);
  unsigned type = emulation::kTensorMapBFloat16, swizzle = emulation::kTensorMapSwizzle128, oob_fill = 0;

  const char* error(const void* address, const void* map) const {
    return emulation::tensor_map_error(map, type, static_cast<unsigned>(sizes.size()), address, sizes.data(),
                                       strides.data(), box.data(), element_strides.data(), 0, swizzle, 2, oob_fill);
  }
  TensorMap operator()(const void* address) const {
    TensorMap map{};
    EXPECT_EQ(emulation::encode_tensor_map(&map, type, static_cast<unsigned>(sizes.size()), address, sizes.data(),
                                           strides.data(), box.data(), element_strides.data(), 0, swizzle, 2, oob_fill),
              0)
        << error(address, &map);
    return map;
  }
};

Tensor numbered_tensor(std::vector<int64_t> shape) {
  Tensor tensor(DType::kBFloat16, std::move(shape));
  for (int64_t i = 0; i < tensor.count(); ++i) {
    static_cast<uint16_t*>(tensor.view.data)[i] = static_cast<uint16_t>(i * 7 + 1);
  }
  return tensor;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor maps and copies.

TEST(DeviceSm90CopiesTest, TensorMapsAreChecked) {
  alignas(64) char map[128];
  alignas(64) static char memory[64];
  const Encoding good{.sizes = {64, 10, 2}, .strides = {128, 1280}, .box = {64, 8, 1}};
  EXPECT_EQ(good.error(memory, map), nullptr);
  EXPECT_NE(good.error(memory + 8, map), nullptr);
  EXPECT_NE(good.error(memory, map + 32), nullptr);
  EXPECT_NE(good.error(nullptr, map), nullptr);
  Encoding broadcast = good;
  broadcast.strides[1] = 0;
  EXPECT_EQ(broadcast.error(memory, map), nullptr);
  const auto rejects = [&](auto change) {
    Encoding encoding = good;
    change(encoding);
    EXPECT_NE(encoding.error(memory, map), nullptr);
  };
  rejects([](Encoding& e) { e.sizes[1] = 0; });
  rejects([](Encoding& e) { e.sizes[1] = (uint64_t{1} << 32) + 1; });
  rejects([](Encoding& e) { e.strides[0] = 136; });
  rejects([](Encoding& e) { e.strides[1] = uint64_t{1} << 40; });
  rejects([](Encoding& e) { e.box[1] = 257; });
  rejects([](Encoding& e) { e.box[0] = 0; });
  rejects([](Encoding& e) { e.box[0] = 72; });
  rejects([](Encoding& e) { e.box[0] = 20; });
  rejects([](Encoding& e) { e.element_strides[1] = 9; });
  rejects([](Encoding& e) { e.sizes.clear(); });
  rejects([](Encoding& e) { e.sizes.assign(6, 1), e.strides.assign(5, 16), e.box.assign(6, 8); });
  rejects([](Encoding& e) { e.type = 99; });
}

// [batch, token, head, dim] as a map of (dim, token, head, batch).
Encoding dense_encoding(const Tensor& tensor, uint32_t box_rows) {
  const auto size = [&](int axis) { return static_cast<uint64_t>(tensor.view.shape[axis]); };
  const auto bytes = [&](int axis) { return static_cast<uint64_t>(tensor.view.strides[axis]) * 2; };
  return {.sizes = {size(3), size(1), size(2), size(0)},
          .strides = {bytes(1), bytes(2), bytes(0)},
          .box = {64, box_rows, 1, 1}};
}

TEST(DeviceSm90CopiesTest, LoadsFillWithZeros) {
  constexpr int kRows = 16;
  constexpr uint32 kTo = 2048, kBarrier = 0;
  Tensor tensor = numbered_tensor({2, 21, 3, 80});
  const Guarded guarded(tensor);
  const TensorMap map = dense_encoding(tensor, kRows)(tensor.view.data);
  for (const Timing timing : kTimings) {
    set_timing(timing);
    for (const int part : {0, 64, 128, -16}) {
      for (const int first : {0, 5, 16, 21, 40, -3}) {
        for (const int batch : {0, 1, 2, -1}) {
          run(32, [&] {
            if (threadIdx.x == 0) {
              ptx::mbarrier_init(kBarrier, 1);
              ptx::fence_mbarrier_init();
              ptx::mbarrier_arrive_expect(kBarrier, kRows * 128);
              ptx::tma_load(kTo, map, kBarrier, part, first, 2, batch);
            }
            __syncwarp();
            ptx::mbarrier_wait(kBarrier, 0);
          });
          for (int row = 0; row < kRows; ++row) {
            for (int column = 0; column < 64; ++column) {
              const int token = first + row;
              const int dim = part + column;
              const bool is_inside = token >= 0 && token < 21 && dim >= 0 && dim < 80 && batch >= 0 && batch < 2;
              const uint16_t expected = static_cast<uint16_t>((((batch * 21 + token) * 3 + 2) * 80 + dim) * 7 + 1);
              ASSERT_EQ(shared_element(kTo + swizzled_offset(row, column)), is_inside ? expected : 0);
            }
          }
        }
      }
    }
  }
}

// Two axes over rows, whose addresses cancel modulo 2^64: the second one's end is the sequence's.
Encoding ragged_encoding(const Tensor& tensor, uint32_t box_rows) {
  const auto size = [&](int axis) { return static_cast<uint64_t>(tensor.view.shape[axis]); };
  const auto bytes = [&](int axis) { return static_cast<uint64_t>(tensor.view.strides[axis]) * 2; };
  constexpr uint64_t kMany = (uint64_t{1} << 31) - (1 << 16);
  return {.sizes = {size(2), cuda::kRaggedRows, size(1), kMany, kMany},
          .strides = {bytes(0), bytes(1), bytes(0), (uint64_t{1} << 34) - bytes(0)},
          .box = {64, box_rows, 1, 1, 1}};
}
// Nothing remains of 2^64.
static_assert(static_cast<uint64_t>(cuda::kRaggedRows) * (uint64_t{1} << 34) == 0);

TEST(DeviceSm90CopiesTest, RaggedRowsEndWithTheirSequence) {
  constexpr int kRows = 16, kTokens = 40, kHeads = 2, kDim = 64;
  constexpr uint32 kTo = 2048, kBarrier = 0, kFrom = 8192;
  Tensor tensor = numbered_tensor({kTokens, kHeads, kDim});
  const Guarded guarded(tensor);
  const TensorMap map = ragged_encoding(tensor, kRows)(tensor.view.data);
  set_timing(Timing::kMixed);
  for (const int start : {0, 3, 30}) {
    for (const int length : {1, 10, 16}) {
      for (const int first : {0, 4, 16}) {
        if (start + length > kTokens) continue;
        Tensor out = numbered_tensor({kTokens, kHeads, kDim});
        const Guarded guarded_out(out);
        const TensorMap out_map = ragged_encoding(out, kRows)(out.view.data);
        const int ragged[2] = {cuda::kRaggedRows - length + first, start + length};
        run(32, [&] {
          if (threadIdx.x == 0) {
            ptx::mbarrier_init(kBarrier, 1);
            ptx::fence_mbarrier_init();
            ptx::mbarrier_arrive_expect(kBarrier, kRows * 128);
            ptx::tma_load(kTo, map, kBarrier, 0, ragged[0], 1, ragged[1], cuda::kRaggedRows);
            for (uint32 at = 0; at < kRows * 128; at += 4) ptx::store_shared_4(kFrom + at, 0xABCDABCD);
            ptx::fence_async_shared();
            ptx::tma_store(out_map, kFrom, 0, ragged[0], 1, ragged[1], cuda::kRaggedRows);
            ptx::bulk_commit();
            ptx::bulk_wait<0>();
          }
          __syncwarp();
          ptx::mbarrier_wait(kBarrier, 0);
        });
        for (int row = 0; row < kRows; ++row) {
          for (int column = 0; column < kDim; ++column) {
            const int element = ((start + first + row) * kHeads + 1) * kDim + column;
            const uint16_t expected = first + row < length ? static_cast<uint16_t>(element * 7 + 1) : 0;
            ASSERT_EQ(shared_element(kTo + swizzled_offset(row, column)), expected);
          }
        }
        for (int element = 0; element < kTokens * kHeads * kDim; ++element) {
          const int token = element / kDim / kHeads - start;
          const bool is_written = element / kDim % kHeads == 1 && token >= first && token < length;
          ASSERT_EQ(static_cast<uint16_t*>(out.view.data)[element],
                    is_written ? 0xABCD : static_cast<uint16_t>(element * 7 + 1));
        }
      }
    }
  }
}

TEST(DeviceSm90CopiesTest, StoresAreClipped) {
  constexpr int kRows = 16;
  constexpr uint32 kFrom = 4096;
  for (const Timing timing : kTimings) {
    set_timing(timing);
    for (const int part : {0, 64}) {
      for (const int first : {0, 8, 24}) {
        Tensor out = numbered_tensor({2, 21, 3, 80});
        const Guarded guarded(out);
        const TensorMap map = dense_encoding(out, kRows)(out.view.data);
        run(32, [&] {
          const uint32 lane = threadIdx.x;
          for (uint32 at = lane * 64; at < lane * 64 + 64; at += 4) {
            ptx::store_shared_4(kFrom + at, (60000 + at) | (60001 + at) << 16);
          }
          ptx::fence_async_shared();
          __syncwarp();
          if (lane == 0) {
            ptx::tma_store(map, kFrom, part, first, 1, 1);
            ptx::bulk_commit();
            ptx::bulk_wait_read<0>();
          }
        });
        for (int element = 0; element < 2 * 21 * 3 * 80; ++element) {
          const int row = element / 240 - 21 - first;
          const int column = element % 80 - part;
          const bool is_written = element / 80 % 3 == 1 && row >= 0 && row < kRows && column >= 0 && column < 64;
          uint32 expected = static_cast<uint32>(element * 7 + 1);
          if (is_written) {
            const uint32 at = swizzled_offset(row, column);
            expected = 60000 + at / 4 * 4 + at % 4 / 2;
          }
          ASSERT_EQ(static_cast<uint16_t*>(out.view.data)[element], static_cast<uint16_t>(expected));
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers.

// A ring of two slots: one warp fills them, two others read them.
TEST(DeviceSm90CopiesTest, RingOfBarriers) {
  constexpr int kSteps = 20, kSlotBytes = 64 * 128;
  constexpr uint32 kFull = 0, kEmpty = 16, kRing = 1024;
  Tensor tensor = numbered_tensor({1, kSteps * 64, 1, 64});
  const Guarded guarded(tensor);
  const TensorMap map = dense_encoding(tensor, 64)(tensor.view.data);
  for (const Timing timing : kTimings) {
    set_timing(timing);
    int num_wrong = 0;
    run(96, [&] {
      if (threadIdx.x == 0) {
        for (uint32 slot = 0; slot < 2; ++slot) {
          ptx::mbarrier_init(kFull + 8 * slot, 1);
          ptx::mbarrier_init(kEmpty + 8 * slot, 2);
        }
        ptx::fence_mbarrier_init();
      }
      __syncthreads();
      for (int step = 0; step < kSteps; ++step) {
        const uint32 slot = step % 2;
        const uint32 phase = step / 2 % 2;
        const uint32 tile = kRing + slot * kSlotBytes;
        if (threadIdx.x == 64) {
          ptx::mbarrier_wait(kEmpty + 8 * slot, phase ^ 1);
          ptx::mbarrier_arrive_expect(kFull + 8 * slot, kSlotBytes);
          ptx::tma_load(tile, map, kFull + 8 * slot, 0, 64 * step, 0, 0);
        } else if (threadIdx.x < 64) {
          ptx::mbarrier_wait(kFull + 8 * slot, phase);
          const int row = static_cast<int>(threadIdx.x);
          for (int column = 0; column < 64; ++column) {
            const int element = (64 * step + row) * 64 + column;
            num_wrong += shared_element(tile + swizzled_offset(row, column)) != static_cast<uint16_t>(element * 7 + 1);
          }
          __syncwarp();
          if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(kEmpty + 8 * slot);
        }
      }
    });
    EXPECT_EQ(num_wrong, 0);
  }
}

// Without the wait: what is copied late is not there yet, what is copied early has overwritten what is still to be
// read.
TEST(DeviceSm90CopiesTest, CopiesAreLateOrEarly) {
  constexpr uint32 kBarrier = 0, kTo = 1024;
  const Tensor tensor = numbered_tensor({1, 8, 1, 64});
  const TensorMap map = dense_encoding(tensor, 8)(tensor.view.data);
  for (const bool is_late : {false, true}) {
    set_timing(is_late ? Timing::kLate : Timing::kEarly);
    uint16_t before = 0, after = 0;
    run(32, [&] {
      if (threadIdx.x != 0) return;
      ptx::mbarrier_init(kBarrier, 1);
      ptx::fence_mbarrier_init();
      ptx::mbarrier_arrive_expect(kBarrier, 8 * 128);
      ptx::tma_load(kTo, map, kBarrier, 0, 0, 0, 0);
      before = shared_element(kTo);
      ptx::mbarrier_wait(kBarrier, 0);
      after = shared_element(kTo);
    });
    EXPECT_EQ(before, is_late ? 0xFFFF : 1);
    EXPECT_EQ(after, 1);
  }
}

TEST(DeviceSm90CopiesTest, NamedBarriers) {
  constexpr int kRounds = 10;
  std::vector<int> order;
  run(256, [&] {
    const bool is_second = threadIdx.x >= 128;
    if (is_second) ptx::named_barrier_arrive(1, 256);
    for (int round = 0; round < kRounds; ++round) {
      ptx::named_barrier_sync(is_second ? 2 : 1, 256);
      order.push_back(is_second ? 1 : 0);
      if (is_second && round == kRounds - 1) return;
      ptx::named_barrier_arrive(is_second ? 1 : 2, 256);
    }
  });
  for (size_t i = 0; i < order.size(); ++i) ASSERT_EQ(order[i], static_cast<int>(i / 128 % 2));
}

TEST(DeviceSm90CopiesTest, RegistersMoveBetweenWarpgroups) {
  int num_done = 0;
  run(384, [&] {
    if (threadIdx.x >= 256) {
      ptx::decrease_registers<24>();
    } else {
      ptx::increase_registers<240>();
    }
    ++num_done;
  });
  EXPECT_EQ(num_done, 384);
  const auto take_too_many = [] {
    run(384, [] {
      if (threadIdx.x >= 256) {
        ptx::decrease_registers<32>();
      } else {
        ptx::increase_registers<240>();
      }
    });
  };
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(take_too_many(), "waits for registers \\(240\\)");
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrices of shared memory.

TEST(DeviceSm90CopiesTest, StoreMatrixIsLoadMatrixBackwards) {
  constexpr uint32 kTo = 512;
  int num_wrong = 0;
  run(32, [&] {
    const uint32 lane = threadIdx.x;
    ptx::stmatrix_x4(kTo + lane * 48, lane, 100 + lane, 200 + lane, 300 + lane);  // rows 48 bytes apart
    __syncwarp();
    uint32 values[4];
    ptx::ldmatrix_x4(values, kTo + lane * 48);
    for (uint32 i = 0; i < 4; ++i) num_wrong += values[i] != 100 * i + lane;
  });
  EXPECT_EQ(num_wrong, 0);
}

void store_twice(bool waits) {
  Tensor out = numbered_tensor({1, 2, 1, 64});
  const TensorMap map = dense_encoding(out, 1)(out.view.data);
  run(32, [&] {
    if (threadIdx.x != 0) return;
    for (int row = 0; row < 2; ++row) {
      for (uint32 at = 0; at < 128; at += 4) ptx::store_shared_4(at, static_cast<uint32>(row + 5));
      ptx::fence_async_shared();
      ptx::tma_store(map, 0, 0, row, 0, 0);
      ptx::bulk_commit();
      if (waits) ptx::bulk_wait_read<0>();
    }
    ptx::bulk_wait<0>();
  });
  const uint16_t* const rows = static_cast<uint16_t*>(out.view.data);
  EXPECT_EQ(rows[0], waits ? 5 : 6);
  EXPECT_EQ(rows[64], 6);
}

TEST(DeviceSm90CopiesTest, StoresReadLate) {
  set_timing(Timing::kEarly);
  store_twice(true);
  store_twice(false);
}

// ---------------------------------------------------------------------------------------------------------------------
// Mistakes.

void use_a_barrier_too_early() {
  if (threadIdx.x == 40) ptx::mbarrier_init(0, 1);
  ptx::mbarrier_arrive(0);
}
void arrive_too_often() {
  if (threadIdx.x != 0) return;
  ptx::mbarrier_init(0, 1);
  ptx::mbarrier_arrive_expect(0, 16);
  ptx::mbarrier_arrive(0);
}
void wait_for_nothing() {
  if (threadIdx.x == 0) ptx::mbarrier_init(64, 1);
  __syncthreads();
  ptx::mbarrier_wait(64, 0);
}
void overwrite_a_barrier() {
  if (threadIdx.x != 0) return;
  ptx::mbarrier_init(64, 1);
  ptx::store_shared_16(64, {});
  ptx::mbarrier_arrive(64);
}
// An arrival does not wait for what the warp is still loading.
void copy_over_what_is_loaded() {
  alignas(16) static char memory[1024];
  static const TensorMap map =
      Encoding{.sizes = {64, 8, 1, 1}, .strides = {128, 1024, 1024}, .box = {64, 8, 1, 1}}(memory);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(0, 32);
    ptx::mbarrier_init(8, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    uint32 registers[4];
    ptx::ldmatrix_x4(registers, 1024 + threadIdx.x * 16);
    ptx::mbarrier_arrive(0);
  } else if (threadIdx.x == 32) {
    ptx::mbarrier_wait(0, 0);
    ptx::mbarrier_arrive_expect(8, 1024);
    ptx::tma_load(1024, map, 8, 0, 0, 0, 0);
    ptx::mbarrier_wait(8, 0);
  }
}
void end_before_stores() {
  alignas(16) static char memory[128];
  static const TensorMap map =
      Encoding{.sizes = {64, 1, 1, 1}, .strides = {128, 128, 128}, .box = {64, 1, 1, 1}}(memory);
  if (threadIdx.x != 0) return;
  ptx::tma_store(map, 0, 0, 0, 0, 0);
  ptx::bulk_commit();
}

TEST(DeviceSm90CopiesDeathTest, MistakesAreNoticed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  set_timing(Timing::kMixed);
  EXPECT_DEATH(run_warpgroup(use_a_barrier_too_early), "not a barrier, or not yet");
  EXPECT_DEATH(run_warpgroup(arrive_too_often), "more arrivals");
  EXPECT_DEATH(run_warpgroup(wait_for_nothing), "waits for phase 0 of the mbarrier \\(64\\)");
  EXPECT_DEATH(run_warpgroup(overwrite_a_barrier), "a barrier was overwritten");
  EXPECT_DEATH(run_warpgroup(end_before_stores), "before its bulk stores");
  EXPECT_DEATH(run_warpgroup(copy_over_what_is_loaded), "may still have to read");
}

}  // namespace
}  // namespace heed
