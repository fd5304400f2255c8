// Tensor maps of attention's operands: boxes of 64 columns and some rows of one head, swizzled for tensor core
// instructions. Which views can be had that way, and the maps of those.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "cuda/attention_spec.h"
#include "cuda/tensor_map.h"

namespace heed::cuda {

// Columns of a box: 128 bytes, the widest that are swizzled.
inline constexpr int kTensorMapColumns = 64;

// An operand of 16-bit elements, as far as its map is concerned.
struct MappedOperand {
  const DeviceOperand& operand;
  Element element;
  int64_t num_tokens, num_heads, head_dim;
  int box_rows;
  int64_t packed_heads = 1;  // dense: the rows of a box are those of so many heads of a token, then of the next token
};

// What keeps TMA from reading or writing an operand where it lies, such as "rows that do not start at multiples of 16
// bytes", and what it would take.
struct Misfit {
  std::string_view got, expected;
  bool exists() const { return !got.empty(); }
};

// Make the map, unless there is a misfit. Throw std::runtime_error if CUDA refuses a map that should be fine.
//
// Dense: [problem][head][token][column], where the leading axes and the batch of `params` are one axis of problems, the
// last of them fastest. Rows from num_tokens on are outside: read as zeros, never written. With packed heads:
// [problem][pack][token][head of the pack][column].
Misfit make_dense_map(TensorMap& map, const MappedOperand& mapped, const AttentionParams& params);

// Packed sequences: the coordinates (column, kRaggedRows - length + row, head, start + length, kRaggedRows) stand for
// row `row` of the sequence of `length` rows from `start` on. Rows from `length` on are outside, whatever length each
// sequence has.
//
// The axis of rows is as long as any sequence may be, and a sequence's rows are its last ones. Two more axes put the
// box where those rows are in memory: one forward to the sequence's end, the other one back by kRaggedRows rows.
// Strides cannot be negative: this one is 2^34 bytes less a row, so that kRaggedRows, 2^30, of it are 2^64 bytes less
// kRaggedRows rows, and addresses wrap around.
Misfit make_ragged_map(TensorMap& map, const MappedOperand& mapped);

}  // namespace heed::cuda
