// What the tests of the emulated instructions of Hopper share.
#pragma once

#include <gtest/gtest.h>

#include <cstring>

#include "cuda/device/ptx_sm90.cuh"

namespace heed::testing_hopper {

namespace ptx = cuda::ptx;
namespace emulation = device_emulation;
using cuda::uint32;

enum class Timing { kEarly, kLate, kMixed };
inline constexpr Timing kTimings[] = {Timing::kEarly, Timing::kLate, Timing::kMixed};

inline void set_timing(Timing timing) {
  emulation::block.copies_late = timing == Timing::kLate;
  emulation::block.copies_vary = timing == Timing::kMixed;
}

inline constexpr size_t kSharedBytes = 96 << 10;

template <class Body>
void run(int num_threads, const Body& body) {
  emulation::run_block(0, num_threads, kSharedBytes, body);
}

// The element at a row and column of a part of 64 columns, as a 128-byte swizzle places it.
inline uint32 swizzled_offset(int row, int column) {
  return static_cast<uint32>(row * 128 + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2);
}
inline uint16_t shared_element(uint32 address) {
  uint16_t bits;
  std::memcpy(&bits, emulation::shared_memory + address, 2);
  return bits;
}

// Emulated by all threads of a warpgroup.
using Lanes = void (*)();
inline void run_warpgroup(Lanes lanes) { run(128, lanes); }

}  // namespace heed::testing_hopper
