// What the CPU kernel of rotary embeddings is told, whatever the instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/rotation.h"
#include "cpu/row_memory.h"
#include "cpu/row_walk.h"

namespace heed::cpu {

// Strides count elements.
struct RopeTensor {
  void* data = nullptr;  // nullptr: absent
  int64_t token = 0;     // or the only axis of a list
  int64_t head = 0;
  int64_t dim = 1;
};

struct RopePlan {
  enum Tensor : int { kQ, kK, kQRope, kKRope, kIndptr, kOffsets, kPosIds, kCosSinCache, kNumTensors };
  using Walk = RowWalk<kNumTensors>;

  DType dtype;
  Walk walk;  // a row is everything of one leading index
  std::array<RopeTensor, kNumTensors> tensors;
  int64_t num_tokens, num_q_heads, num_kv_heads;
  int head_dim;
  int64_t num_sequences;  // with indptr
  int64_t max_position;   // rows of the cache
  bool interleaves, is_inverse;
  Frequencies frequencies;
  int64_t token_bytes;  // read and written per token
  bool is_streaming;    // results go past the caches

  int rotary_dim() const { return 2 * frequencies.num_pairs; }
};

// One leading index's positions.
class Positions {
 public:
  Positions(const RopePlan& plan, const RopePlan::Walk::Offsets& offsets)
      : num_sequences_(plan.num_sequences),
        pos_ids_(list(plan, RopePlan::kPosIds, offsets)),
        indptr_(list(plan, RopePlan::kIndptr, offsets)),
        offsets_(list(plan, RopePlan::kOffsets, offsets)) {}

  // Whether the token is in a sequence, and if so its position. Whatever the lists hold, nothing outside them is read.
  bool find(int64_t token, int64_t& position) {
    if (pos_ids_.data != nullptr) {
      position = pos_ids_.at(token);
      return true;
    }
    if (token < begin_ || token >= end_) {
      // The last sequence that begins at or before the token.
      int64_t low = 0;
      int64_t high = num_sequences_;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (indptr_.at(middle) <= token) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low == 0 || token >= indptr_.at(low)) return false;
      begin_ = indptr_.at(low - 1);
      end_ = indptr_.at(low);
      first_position_ = offsets_.at(low - 1);
    }
    position = first_position_ + (token - begin_);
    return true;
  }

 private:
  struct List {
    const int32_t* data;
    int64_t stride;
    int64_t at(int64_t index) const { return data[index * stride]; }
  };
  static List list(const RopePlan& plan, RopePlan::Tensor tensor, const RopePlan::Walk::Offsets& offsets) {
    const RopeTensor& from = plan.tensors[tensor];
    if (from.data == nullptr) return {nullptr, 0};
    return {static_cast<const int32_t*>(from.data) + offsets[tensor], from.token};
  }

  int64_t num_sequences_;
  List pos_ids_, indptr_, offsets_;
  int64_t begin_ = 0, end_ = 0, first_position_ = 0;  // of the sequence found last
};

}  // namespace heed::cpu
