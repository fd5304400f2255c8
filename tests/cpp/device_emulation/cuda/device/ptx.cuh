// The instructions of src/cuda/device/ptx.cuh as the PTX manual defines them, for device code that runs on the CPU: the
// test that emulates a GPU finds this file first. Addresses of shared memory are checked.
#pragma once

#include <cmath>

#include "device_emulation/emulation.h"

namespace heed::cuda {

using uint32 = unsigned int;
using device_emulation::shared_memory;
inline auto& tight_shared_memory = device_emulation::shared_memory;
// Which architecture's tiles are emulated.
#ifdef HEED_EMULATED_ARCH
inline constexpr int kDeviceArch = HEED_EMULATED_ARCH;
#else
inline constexpr int kDeviceArch = 90;
#endif

namespace ptx {

namespace emulation = device_emulation;

inline int thread_index() { return static_cast<int>(threadIdx.x); }

inline uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(static_cast<const char*>(pointer) - shared_memory);
}

inline char* shared_pointer(uint32 address, uint32 num_bytes) {
  if (address % num_bytes != 0) emulation::fail("an address of shared memory is not aligned");
  if (address + num_bytes > emulation::block.shared_bytes) emulation::fail("an address is beyond shared memory");
  return shared_memory + address;
}

inline void finish_copy(const emulation::AsyncCopy& copy) {
  char* to = shared_pointer(copy.to, copy.size);
  std::memset(to, 0, copy.size);
  if (copy.num_bytes == 0) return;
  if (reinterpret_cast<uintptr_t>(copy.from) % copy.size != 0)
    emulation::fail("cp.async reads an address that is not aligned");
  std::memcpy(to, copy.from, static_cast<size_t>(copy.num_bytes));
}
using emulation::current_thread;
inline void start_copy(const emulation::AsyncCopy& copy) {
  if (emulation::block.copies_late) {
    current_thread().copies.push_back(copy);
  } else {
    finish_copy(copy);
  }
}
inline void cp_async_16(uint32 to, const void* from, int num_bytes) {
  start_copy({to, from, num_bytes, 16, current_thread().num_copy_groups});
}
using CachePolicy = unsigned long long;
inline CachePolicy evict_first_policy() { return 0; }
inline void cp_async_16_once(uint32 to, const void* from, int num_bytes, CachePolicy /*policy*/) {
  cp_async_16(to, from, num_bytes);
}
inline void cp_async_8(uint32 to, const void* from) { start_copy({to, from, 8, 8, current_thread().num_copy_groups}); }
inline void cp_async_commit() { ++current_thread().num_copy_groups; }
// Finishes no more than it has to.
template <int kPending>
inline void cp_async_wait() {
  emulation::Thread& thread = current_thread();
  const auto is_pending = [&](const emulation::AsyncCopy& copy) {
    return copy.group + kPending >= thread.num_copy_groups;
  };
  for (const emulation::AsyncCopy& copy : thread.copies) {
    if (!is_pending(copy)) finish_copy(copy);
  }
  std::erase_if(thread.copies, [&](const emulation::AsyncCopy& copy) { return !is_pending(copy); });
}

inline void store_shared(uint32 to, const void* from, uint32 num_bytes) {
  std::memcpy(shared_pointer(to, num_bytes), from, num_bytes);
  if (emulation::async_engine != nullptr) emulation::async_engine->note_write(to, num_bytes);
}
inline void store_shared_16(uint32 to, uint4 value) { store_shared(to, &value, 16); }
inline void store_shared_8(uint32 to, uint32 a, uint32 b) {
  const uint32 both[2] = {a, b};
  store_shared(to, both, 8);
}
inline void store_shared_4(uint32 to, uint32 value) { store_shared(to, &value, 4); }
inline uint4 load_shared_16(uint32 from) {
  uint4 value;
  std::memcpy(&value, shared_pointer(from, 16), 16);
  return value;
}
inline uint32 load_shared_4(uint32 from) {
  uint32 value;
  std::memcpy(&value, shared_pointer(from, 4), 4);
  return value;
}

// All lanes read before one goes on, which may overwrite what others are to read.
inline void ldmatrix_x4(uint32 (&to)[4], uint32 from) {
  const emulation::LaneValues* rows = emulation::exchange(emulation::Collective::kLoadMatrix, {from});
  const int lane = emulation::current_lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    const char* row = shared_pointer(rows[8 * matrix + lane / 4][0], 16);
    std::memcpy(&to[matrix], row + lane % 4 * 4, 4);
  }
  if (emulation::async_engine != nullptr) emulation::async_engine->note_read(from, 16);
  emulation::exchange(emulation::Collective::kLoadedMatrix, {});
}
inline void ldmatrix_x4_trans(uint32 (&to)[4], uint32 from) {
  const emulation::LaneValues* rows = emulation::exchange(emulation::Collective::kLoadMatrix, {from});
  const int lane = emulation::current_lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const char* row = shared_pointer(rows[8 * matrix + lane % 4 * 2 + i][0], 16);
      std::memcpy(&pair[i], row + lane / 4 * 2, 2);
    }
    std::memcpy(&to[matrix], pair, 4);
  }
  if (emulation::async_engine != nullptr) emulation::async_engine->note_read(from, 16);
  emulation::exchange(emulation::Collective::kLoadedMatrix, {});
}

// Kernels run one after the other.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

inline void cluster_arrive() {}
inline void cluster_arrive_release() {}
inline void cluster_wait() {
  emulation::Thread& thread = current_thread();
  if (++thread.num_cluster_waits == 1) return;  // for the others to have started
  __syncthreads();                              // everybody has sent
  if (emulation::cluster.only_sends) {
    thread.is_done = true;
    emulation::give_way();  // for good
  }
  if (thread_index() == 0) {
    for (const auto& store : emulation::cluster.sent[emulation::cluster.rank]) {
      const uint32 num_bytes = static_cast<uint32>(store.count * 4);
      std::memcpy(shared_pointer(store.to, num_bytes), store.values.data(), num_bytes);
    }
  }
  __syncthreads();
}
inline void store_cluster(uint32 to, int rank, std::array<float, 4> values, int count) {
  if (current_thread().num_cluster_waits == 0) emulation::fail("a store to a block that may not have started");
  if (rank < 0 || rank >= emulation::cluster.size) emulation::fail("a store to a block that is not in the cluster");
  if (emulation::cluster.only_sends) emulation::cluster.sent[rank].push_back({to, values, count});
}
inline void store_cluster_16(uint32 to, int rank, const float (&values)[4]) {
  store_cluster(to, rank, {values[0], values[1], values[2], values[3]}, 4);
}
inline void store_cluster_8(uint32 to, int rank, float a, float b) { store_cluster(to, rank, {a, b, 0.0f, 0.0f}, 2); }

// Blocks run one after the other, so that there is nobody to wait for.
inline void add_global_4(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::fail("red.v4 adds to an address that is not aligned");
  const float four[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) to[i] += four[i];
}
inline int load_relaxed(const int* from) { return *from; }
inline void add_relaxed(int* to, int value) { *to += value; }

inline float float_of_f16(unsigned short bits) {
  const int exponent = bits >> 10 & 31;
  const float mantissa = static_cast<float>(bits & 1023);
  float size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024.0f + mantissa, exponent - 25);
  if (exponent == 31) size = mantissa == 0.0f ? INFINITY : NAN;
  return bits >> 15 == 0 ? size : -size;
}
inline float float_of_bf16(unsigned short bits) { return __uint_as_float(static_cast<uint32>(bits) << 16); }
inline float float_of_tf32(uint32 bits) { return __uint_as_float(bits & 0xFFFFE000u); }

// Tensor cores truncate the sum.
inline float round_toward_zero(double exact) {
  const float nearest = static_cast<float>(exact);
  if (!std::isfinite(nearest)) return nearest;
  return std::abs(static_cast<double>(nearest)) > std::abs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

// Lane 4 * r + c holds rows r and r + 8 of `acc`, columns 2 * c and 2 * c + 1. `product(row, column)` is one sum.
template <class Product>
inline void add_products(float (&acc)[4], const Product& product) {
  if (emulation::async_engine != nullptr) emulation::async_engine->end_reads();
  const int lane = emulation::current_lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    acc[i] = round_toward_zero(acc[i] + product(row, column));
  }
}

template <class ToFloat>
inline void mma_16_bits(float (&acc)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const ToFloat& to_float) {
  const emulation::LaneValues* values =
      emulation::exchange(emulation::Collective::kMultiply, {a[0], a[1], a[2], a[3], b0, b1});
  const auto element = [&](int lane, int word, int half) {
    return static_cast<double>(to_float(static_cast<unsigned short>(values[lane][word] >> (16 * half))));
  };
  add_products(acc, [&](int row, int column) {
    double sum = 0.0;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2;
      sum += element(row % 8 * 4 + pair, row / 8 + k / 8 * 2, k % 2) * element(column * 4 + pair, 4 + k / 8, k % 2);
    }
    return sum;
  });
}
inline void mma_bf16(float (&acc)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  mma_16_bits(acc, a, b0, b1, float_of_bf16);
}
inline void mma_f16(float (&acc)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  mma_16_bits(acc, a, b0, b1, float_of_f16);
}

// kNumK: 8, or 4, where a[2], a[3] and b1 are not used.
template <int kNumK>
inline void mma_tf32_of(float (&acc)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  const emulation::LaneValues* values =
      emulation::exchange(emulation::Collective::kMultiply, {a[0], a[1], a[2], a[3], b0, b1});
  const auto element = [&](int lane, int word) { return static_cast<double>(float_of_tf32(values[lane][word])); };
  add_products(acc, [&](int row, int column) {
    double sum = 0.0;
    for (int k = 0; k < kNumK; ++k) {
      sum += element(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2) * element(column * 4 + k % 4, 4 + k / 4);
    }
    return sum;
  });
}
inline void mma_tf32(float (&acc)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) { mma_tf32_of<8>(acc, a, b0, b1); }
inline void mma_tf32_half(float (&acc)[4], uint32 a0, uint32 a1, uint32 b) {
  mma_tf32_of<4>(acc, {a0, a1, 0, 0}, b, 0);
}

inline uint32 round_to_tf32(float value) {
  if (std::isnan(value)) return 0x7FFFFFFF;
  const uint32 bits = __float_as_uint(value);
  return std::isinf(value) ? bits : (bits + 0x1000) & 0xFFFFE000u;
}

inline uint32 bf16_bits(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint32 bits = __float_as_uint(value);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32 f16_bits(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint32 sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::abs(value);
  if (size >= 65520.0f) return sign | 0x7C00;
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const float units = std::nearbyint(std::ldexp(size, 10 - exponent));  // the leading 1 adds 1 to the exponent
  return sign | ((static_cast<uint32>(exponent + 14) << 10) + static_cast<uint32>(units));
}
inline uint32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline uint32 pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace ptx
}  // namespace heed::cuda
