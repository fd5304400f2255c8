// The instructions of src/cuda/device/ptx_sm90.cuh as the PTX manual defines them, for device code that runs on the
// CPU.
#pragma once

#include "cuda/device/wgmma_tiles.cuh"
#include "cuda/tensor_map.h"
#include "device_emulation/cuda/device/memory.cuh"
#include "device_emulation/hopper.h"

namespace heed::cuda::ptx {

static_assert(sizeof(TensorMap) == emulation::kTensorMapBytes && alignof(TensorMap) == 64);

inline void mbarrier_init(uint32 barrier, int arrivals) { emulation::hopper.init_barrier(barrier, arrivals); }
inline void fence_mbarrier_init() { emulation::hopper.fence_barriers(); }
inline void mbarrier_arrive(uint32 barrier) { emulation::hopper.arrive(barrier); }
inline void mbarrier_arrive_expect(uint32 barrier, int num_bytes) { emulation::hopper.arrive(barrier, num_bytes); }
inline void mbarrier_wait(uint32 barrier, uint32 parity) { emulation::hopper.wait(barrier, parity); }
inline bool mbarrier_has_ended(uint32 barrier, uint32 parity) { return emulation::hopper.has_ended(barrier, parity); }

inline void fence_async_shared() { emulation::hopper.fence_proxy(); }

inline void prefetch_tensor_map(const TensorMap& /*map*/) {}
inline void tma_load(uint32 to, const TensorMap& map, uint32 barrier, int c0, int c1, int c2, int c3) {
  emulation::hopper.load(to, &map, barrier, {c0, c1, c2, c3}, 4);
}
inline void tma_load(uint32 to, const TensorMap& map, uint32 barrier, int c0, int c1, int c2, int c3, int c4) {
  emulation::hopper.load(to, &map, barrier, {c0, c1, c2, c3, c4}, 5);
}
inline void tma_store(const TensorMap& map, uint32 from, int c0, int c1, int c2, int c3) {
  emulation::hopper.store(&map, from, {c0, c1, c2, c3}, 4);
}
inline void tma_store(const TensorMap& map, uint32 from, int c0, int c1, int c2, int c3, int c4) {
  emulation::hopper.store(&map, from, {c0, c1, c2, c3, c4}, 5);
}
inline void bulk_commit() { emulation::hopper.commit_stores(); }
template <int kPending>
inline void bulk_wait_read() {
  emulation::hopper.wait_for_stores(kPending);
}
template <int kPending>
inline void bulk_wait() {
  emulation::hopper.wait_for_stores(kPending);
}

template <int kRegisters>
inline void decrease_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::hopper.set_registers(kRegisters, false);
}
template <int kRegisters>
inline void increase_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::hopper.set_registers(kRegisters, true);
}

inline void named_barrier_sync(int id, int num_threads) { emulation::hopper.sync_named(id, num_threads); }
inline void named_barrier_arrive(int id, int num_threads) { emulation::hopper.arrive_named(id, num_threads); }

// Each lane writes its own pair of every matrix.
inline void stmatrix_x4(uint32 to, uint32 a, uint32 b, uint32 c, uint32 d) {
  const emulation::LaneValues* rows = emulation::exchange(emulation::Collective::kStoreMatrix, {to});
  const int lane = emulation::current_lane();
  const uint32 values[4] = {a, b, c, d};
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint32 row = rows[8 * matrix + lane / 4][0];
    shared_pointer(row, 16);
    store_shared_4(row + static_cast<uint32>(lane % 4 * 4), values[matrix]);
  }
}

inline void store_byte_of_lane_0(int lane, uint32 to, uint32 value) {
  if (lane == 0) *shared_pointer(to, 1) = static_cast<char>(value);
}

inline uint32 take_tile(unsigned* counter) { return atomicAdd(counter, 1u); }
inline void store_release(uint64* to, uint64 value) { *to = value; }
inline uint64 load_acquire(const uint64* from) { return *from; }

// Another block may do the same at the same time, and come first.
inline uint4 compare_and_swap_16(void* at, uint4 expected, uint4 wanted) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) emulation::fail("a swap of 16 bytes that are not aligned");
  for (const bool is_mine : {emulation::block.random() % 2 == 0, true}) {
    uint4 found;
    std::memcpy(&found, at, 16);
    const bool swaps = std::memcmp(&found, &expected, 16) == 0;
    if (swaps) std::memcpy(at, &wanted, 16);
    if (is_mine) return found;
  }
  return {};
}

// Both halves, each rounded once.
inline uint32 multiply_add_bf16(uint32 a, uint32 b, uint32 c) {
  const auto half = [&](int shift) {
    const auto value = [&](uint32 x) { return __uint_as_float((x >> shift) << 16); };
    return std::fmaf(value(a), value(b), value(c));
  };
  return pack_bf16(half(0), half(16));
}
inline uint32 multiply_add_f16(uint32 a, uint32 b, uint32 c) {
  const auto half = [&](int shift) {
    const auto value = [&](uint32 x) { return float_of_f16(static_cast<unsigned short>(x >> shift)); };
    return std::fmaf(value(a), value(b), value(c));
  };
  return pack_f16(half(0), half(16));
}
[[noreturn]] inline void trap() { emulation::fail("a trap"); }

// ---------------------------------------------------------------------------------------------------------------------
// Warpgroup products. Accumulators hold poison until they are waited for.

inline void wgmma_fence() { emulation::hopper.products.fence(); }
inline void wgmma_commit() { emulation::hopper.products.commit(); }

// The registers are those that may be touched afterwards.
template <int kPending, class... Registers>
inline void wgmma_wait(Registers&... registers) {
  emulation::hopper.products.wait(kPending, [&](const float* at) {
    const auto holds = [&](const auto& array) {
      const char* const begin = reinterpret_cast<const char*>(&array);
      const char* const address = reinterpret_cast<const char*>(at);
      return address >= begin && address < begin + sizeof array;
    };
    return (holds(registers) || ...);
  });
}

// a in registers; b k-major, or n-major where its rows are those of k.
template <bool kIsBf16, bool kIsNMajor, int kSize>
inline void wgmma_rs(float (&d)[kSize], const uint32 (&a)[4], uint64 b, bool accumulates) {
  static_assert(kSize % 4 == 0 && kSize <= 128);
  emulation::hopper.products.multiply({2 * kSize, kIsBf16, false, kIsNMajor, accumulates, 0, b}, d,
                                      {a[0], a[1], a[2], a[3]});
}
// Both in shared memory and k-major.
template <bool kIsBf16, int kSize>
inline void wgmma_ss(float (&d)[kSize], uint64 a, uint64 b, bool accumulates) {
  static_assert(kSize % 4 == 0 && kSize <= 128);
  emulation::hopper.products.multiply({2 * kSize, kIsBf16, true, false, accumulates, a, b}, d, {});
}

}  // namespace heed::cuda::ptx
