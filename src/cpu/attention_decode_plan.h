// What the CPU kernel of attention of one query is told, whatever the instruction set. Strides count elements.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/attention_fwd_plan.h"
#include "cpu/rotation.h"
#include "cpu/row_walk.h"

namespace heed::cpu {

struct DecodeTensor {
  void* data = nullptr;  // nullptr: absent
  int64_t token = 0, head = 0, dim = 0;
};

// Keys are cut into chunks that threads take by themselves; their results are merged in the order of the chunks. Chunks
// depend on the number of keys alone, and so a result does not depend on threads or on other leading indices.
inline constexpr int64_t kMinChunkKeys = 256;
inline constexpr int64_t kMaxChunks = 64;

struct DecodeChunks {
  int64_t first_key = 0;  // the first one that the window keeps
  int64_t num_keys = 0;
  int64_t keys_per_chunk = kMinChunkKeys;
  int64_t count = 1;  // 1 even without keys: somebody writes the result
};
DecodeChunks make_chunks(int64_t kv_len, int64_t window_left);

struct DecodePlan {
  enum Tensor : int { kQ, kK, kV, kSinks, kSlopes, kOut, kLse, kNumTensors };
  using Walk = RowWalk<kNumTensors>;

  DType dtype;
  Walk walk;  // a row is everything of one leading index
  std::array<DecodeTensor, kNumTensors> tensors;
  int64_t kv_len, num_kv_heads, group;  // group: query heads per KV head
  int head_dim_qk, head_dim_v;
  DecodeChunks chunks;
  int64_t heads_per_item;  // KV heads
  float* workspace;        // [leading indices][Hq][chunks][Dv + 2] if there are several chunks

  float scale;  // of either sign
  SoftCap softcap;
  bool has_rope;
  Frequencies frequencies;  // if has_rope

  int64_t floats_per_chunk() const { return head_dim_v + 2; }
  int64_t num_bytes() const;  // of K and V that the call reads
};

}  // namespace heed::cpu
