// What the GPU kernels of attention have in common: storage types, operands and the parameters of one call, shared by
// the host side and the device code. Includes nothing from std: NVRTC compiles it too.
#pragma once

#include "variants/band.h"

namespace heed::cuda {

enum class Element : unsigned char { kFloat32, kFloat16, kBFloat16 };

HEED_HOST_DEVICE constexpr int bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }
HEED_HOST_DEVICE constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Rows of shared memory tiles are whole multiples of 128 bytes, so that 16-byte chunks can be swizzled inside them.
HEED_HOST_DEVICE constexpr int sm80_row_bytes(Element element, int dim) {
  return round_up(dim * bytes_of(element), 128);
}

inline constexpr int kMaxLeadAxes = 8;

// One operand; axes that it lacks, and leading axes that it broadcasts over, have stride 0. Strides count elements.
struct DeviceOperand {
  void* data;  // null: absent
  long long lead[kMaxLeadAxes];
  long long batch, token, head, dim;
};

struct AttentionParams {
  DeviceOperand q;               // [.., B, Lq, Hq, D]; varlen [.., Tq, Hq, D]
  DeviceOperand k;               // [.., B, Lk, Hk, D]; varlen [.., Tk, Hk, D]
  DeviceOperand v;               // [.., B, Lk, Hk, Dv]; varlen [.., Tk, Hk, Dv]
  DeviceOperand sinks;           // [.., Hq] float32, optional
  DeviceOperand alibi_slopes;    // [.., Hq] float32, optional
  DeviceOperand q_segment_ids;   // [.., B, Lq] int32, optional
  DeviceOperand kv_segment_ids;  // [.., B, Lk] int32, optional
  DeviceOperand cu_seqlens_q;    // [.., B + 1] int32, varlen; `token` strides over entries
  DeviceOperand cu_seqlens_k;    // [.., B + 1] int32, varlen
  DeviceOperand seqused_k;       // [.., B] int32, varlen, optional

  int lead_sizes[kMaxLeadAxes];
  int num_lead_axes;
  int batch;                    // varlen: number of sequences
  int q_len, kv_len;            // varlen: rows of all sequences
  int num_q_heads, group;       // query heads, query heads per KV head
  int head_dim_qk, head_dim_v;  // as the caller gave them

  variants::Index window_left, window_right;
  bool is_bottom_right;
  float scale;       // of the raw products; with score transforms only
  float scale_log2;  // scale * log2(e): raw products to base-2 exponents; without score transforms
  float softcap, scale_over_cap;

  // The order of the work, one block of threads for each tile of rows of each head: query rows and query heads in the
  // forward pass, key rows and KV heads in the backward pass.
  unsigned num_heads;  // of all problems; dense: of all sequences too
  int section_heads;   // dense: sections of so many heads, each from its longest tiles to its shortest ones
  int num_tiles;       // varlen: an upper bound of the tiles of all sequences
};

}  // namespace heed::cuda
