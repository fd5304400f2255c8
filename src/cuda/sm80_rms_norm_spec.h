// What the portable kernels of RMS norms are specialised for, how they divide the work, and their parameters: shared by
// the host side (sm80_rms_norm.cc) and the device code (device/sm80_rms_norm*.cuh). Includes nothing from std: NVRTC
// compiles it too.
#pragma once

#include "cuda/row_spec.h"

namespace heed::cuda {

struct Sm80RmsNormSpec {
  Element element = Element::kBFloat16;
  bool is_aligned = true;     // rows start at multiples of 16 bytes
  int threads_per_row = 256;  // a power of two below a warp, else whole warps
  int chunks = 2;             // of a row for each thread, kept in registers; 0: rows are too long, and read twice
  bool has_addend = false;    // forward: a residual; backward: the gradient of the returned sum

  HEED_HOST_DEVICE friend constexpr bool operator==(const Sm80RmsNormSpec&, const Sm80RmsNormSpec&) = default;
  HEED_HOST_DEVICE constexpr bool is_long() const { return chunks == 0; }
  // A block of one row is as large as the row asks for; several short ones share a block of 256 threads.
  HEED_HOST_DEVICE constexpr int rows_at_once() const { return threads_per_row >= 128 ? 1 : 256 / threads_per_row; }
  HEED_HOST_DEVICE constexpr int num_threads() const { return rows_at_once() * threads_per_row; }
};

// Fills in threads_per_row and chunks for rows of `hidden` elements. Backward, a chunk takes three times the registers:
// two operands and a sum of floats.
HEED_HOST_DEVICE constexpr Sm80RmsNormSpec with_row_length(Sm80RmsNormSpec spec, long long hidden, bool is_backward) {
  const int width = chunk_width(spec.element, spec.is_aligned);
  const long long chunks = (hidden + width - 1) / width;
  if (chunks <= 32) {
    spec.threads_per_row = 1;
    while (spec.threads_per_row < chunks) spec.threads_per_row *= 2;
    spec.chunks = 1;
    return spec;
  }
  spec.chunks = chunks <= 128 ? 1 : chunks <= 1024 ? 2 : chunks <= 2048 && !is_backward ? 4 : 0;
  spec.threads_per_row =
      spec.is_long() ? 512 : round_up(static_cast<int>((chunks + spec.chunks - 1) / spec.chunks), 32);
  return spec;
}

// As many blocks on a multiprocessor as leave each thread the registers that it needs.
HEED_HOST_DEVICE constexpr int sm80_rms_norm_min_blocks(const Sm80RmsNormSpec& spec, bool is_backward) {
  int registers = spec.has_addend && spec.num_threads() < 512 ? 80 : spec.has_addend ? 64 : 56;
  if (spec.chunks > 2) registers = 128;
  if (is_backward) registers = spec.chunks >= 2 ? 128 : 80;
  const int blocks = 65536 / (spec.num_threads() * registers);
  return blocks < 1 ? 1 : blocks;
}

// Rows that one block takes one after the other, so that it reads the weights once and one row arrives while another is
// computed: up to 3, if enough blocks remain to fill a GPU several times.
HEED_HOST_DEVICE constexpr long long sm80_rms_norm_rows_per_block(const Sm80RmsNormSpec& spec, long long num_rows) {
  constexpr long long kManyBlocks = 2048;
  const long long steps = num_rows / (kManyBlocks * spec.rows_at_once());
  return spec.rows_at_once() * (steps < 1 ? 1 : steps > 3 ? 3 : steps);
}

// Backward, each block also sums the gradient of the weights over its rows. As many blocks as run at the same time on
// an H200 (132 multiprocessors), for all leading indices together; their number must not depend on the GPU, since it
// decides about rounding.
HEED_HOST_DEVICE constexpr long long sm80_rms_norm_bwd_rows_per_block(const Sm80RmsNormSpec& spec, long long num_rows,
                                                                      long long num_leads) {
  const long long at_once = 132 * sm80_rms_norm_min_blocks(spec, true);
  const long long blocks = num_leads < at_once ? at_once / (num_leads < 1 ? 1 : num_leads) : 1;
  const long long steps = (num_rows + blocks * spec.rows_at_once() - 1) / (blocks * spec.rows_at_once());
  return spec.rows_at_once() * (steps < 1 ? 1 : steps);
}

struct Sm80RmsNormParams {
  enum Operand : int { kX, kWeight, kAddend, kDout, kResult, kSum, kDweight, kNumOperands };

  void* data[kNumOperands];  // x, addend, dout, result (out or dx), sum: [lead.., rows.., H]; weight, dweight: [lead..,
                             // H]
  long long element_strides[kNumOperands];
  RowAxes<kNumOperands> leads, rows;  // `rows` of the weights have strides of 0
  Divisor blocks_per_lead;
  int num_rows, rows_per_block;  // of a leading index
  int hidden;                    // H
  float eps;

  float* partial_sums;    // [lead.., blocks_per_lead, H], backward
  Divisor column_blocks;  // of the pass that adds them up
};

// The pass that adds up the partial sums: 32 columns a block, and so many threads for each.
inline constexpr int kRmsNormSumColumns = 32;
inline constexpr int kRmsNormSumStrips = 16;

}  // namespace heed::cuda
