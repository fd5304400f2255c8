// What the CPU kernels of RMS norms are told, whatever the instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/row_memory.h"
#include "cpu/row_walk.h"
#include "heed/heed.h"

namespace heed::cpu {

// A tensor of rows; absent if `data` is null.
struct NormTensor {
  void* data = nullptr;
  int64_t stride = 1;  // between elements of a row
  bool is_adjacent() const { return data == nullptr || stride == 1; }
};

struct RmsNormPlan {
  enum Tensor : int { kX, kResidual, kWeight, kOut, kSum, kNumTensors };
  using Walk = RowWalk<kNumTensors>;

  DType dtype;
  Walk walk;
  std::array<NormTensor, kNumTensors> tensors;  // [rows][hidden]
  int64_t hidden;
  double eps;
  int64_t row_bytes;  // read and written per row
  bool is_streaming;  // results go past the caches
};

struct RmsNormBackwardPlan {
  enum Tensor : int { kX, kWeight, kDout, kDsum, kDx, kNumTensors };
  using Walk = RowWalk<kNumTensors>;
  using DweightWalk = RowWalk<1>;

  DType dtype;
  Walk walk;                                    // the rows of a problem follow each other
  std::array<NormTensor, kNumTensors> tensors;  // [rows][hidden]
  DweightWalk dweight_walk;                     // a row per problem
  NormTensor dweight;                           // [problems][hidden] float32
  float* workspace;                             // [problems][blocks_per_problem][hidden] if there are several blocks
  int64_t num_problems, rows_per_problem, rows_per_block, blocks_per_problem;
  int64_t hidden;
  double eps;
  int64_t row_bytes;
  bool is_streaming;
};

// Rows whose shares of the gradient of the weight are summed by one thread, in their order. Depends on the problem's
// sizes alone, and so do results.
inline constexpr int64_t kMaxBlocks = 64;
inline int64_t rows_per_norm_block(int64_t num_rows, int64_t row_bytes) {
  const int64_t enough_work = std::max<int64_t>(8, kItemBytes / std::max<int64_t>(row_bytes, 1));
  return std::max(enough_work, (num_rows + kMaxBlocks - 1) / kMaxBlocks);
}

}  // namespace heed::cpu
