// What the portable kernels of gated activations are specialised for, how they divide the work, and their parameters:
// shared by the host side (sm80_act_and_mul.cc) and the device code (device/sm80_act_and_mul.cuh). Includes nothing
// from std: NVRTC compiles it too.
#pragma once

#include "cuda/row_spec.h"

namespace heed::cuda {

enum class Gate : unsigned char { kSilu, kGelu, kGeluTanh };

struct Sm80ActAndMulSpec {
  Element element = Element::kBFloat16;
  Gate gate = Gate::kSilu;
  bool is_aligned = true;  // both halves of every row start at multiples of 16 bytes
  bool is_backward = false;

  HEED_HOST_DEVICE friend constexpr bool operator==(const Sm80ActAndMulSpec&, const Sm80ActAndMulSpec&) = default;
};

struct Sm80ActAndMulTile {
  int num_threads;
  int chunks;  // of the result, for each thread
  int min_blocks;

  HEED_HOST_DEVICE constexpr int chunks_per_block() const { return num_threads * chunks; }
};

HEED_HOST_DEVICE constexpr Sm80ActAndMulTile sm80_act_and_mul_tile(const Sm80ActAndMulSpec& spec) {
  // One chunk: a warp has 1 KiB of loads in flight, and 64 warps more than twice what a multiprocessor's share of the
  // memory's bandwidth times its latency is. Small calls get as many blocks as they can fill.
  if (spec.is_aligned) return {512, 1, spec.is_backward ? 2 : 4};
  return {256, 4, 2};
}

struct Sm80ActAndMulParams {
  enum Operand : int { kX, kDout, kResult, kNumOperands };

  const void* x;     // [rows.., 2H]
  const void* dout;  // [rows.., H], backward only
  void* result;      // out [rows.., H]; backward: dx [rows.., 2H]
  long long element_strides[kNumOperands];
  RowAxes<kNumOperands> rows;
  unsigned long long num_chunks;  // of the result, or of dout
  Divisor chunks_per_row;
  long long hidden;  // H
};

}  // namespace heed::cuda
