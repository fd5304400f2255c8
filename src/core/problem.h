// The problem: everything about one attention call that is known before anything runs (shapes, dtypes, options, which
// optional operands are there), as a struct and as the canonical text that compiled programs carry.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "heed/heed.h"

namespace heed {

// A tensor's dtype and shape without its memory. `dtype` is a name, so that an unknown one can still be reported.
struct TensorSpec {
  std::string dtype;
  std::vector<int64_t> shape;
  bool present = false;
};

// Axes of any operand before its own ones.
inline constexpr int kMaxLeadAxes = kMaxRank - 4;

// Operands in the order in which every face passes them. Outputs follow in the same order: out, then lse if wanted,
// then the workspace if there is one.
enum AttentionOperand : int {
  kQ,
  kK,
  kV,
  kSinks,
  kAlibiSlopes,
  kQSegmentIds,
  kKvSegmentIds,
  kCuSeqlensQ,
  kCuSeqlensK,
  kSequsedK,
  kNumAttentionInputs
};
inline constexpr std::array<std::string_view, kNumAttentionInputs> kAttentionOperandNames = {
    "q",        "k", "v", "sinks", "alibi_slopes", "q_segment_ids", "kv_segment_ids", "cu_seqlens_q", "cu_seqlens_k",
    "seqused_k"};

// What a caller asked for, unchecked.
struct AttentionRequest {
  std::array<TensorSpec, kNumAttentionInputs> operands;
  AttentionOptions options;
  bool wants_lse = false;
};

// A validated request. `lead` holds the broadcast sizes of the leading axes.
struct AttentionProblem {
  DType dtype{};
  std::vector<int64_t> lead;
  // With is_varlen the tensors have no batch axis: `batch` counts sequences, q_len and kv_len all rows of q and of k.
  bool is_varlen = false;
  int64_t batch = 0, q_len = 0, kv_len = 0, num_q_heads = 0, num_kv_heads = 0, head_dim_qk = 0, head_dim_v = 0;
  int64_t max_q_len = 0, max_kv_len = 0;  // of one sequence: a hint, at most q_len and kv_len
  double softmax_scale = 0.0;
  bool is_causal = false;
  CausalAlign causal_align = CausalAlign::kBottomRight;
  int64_t window_left = -1, window_right = -1;  // after `is_causal` forced window_right to 0
  double softcap = 0.0;
  bool has_sinks = false, has_alibi = false, has_segment_ids = false, wants_lse = false;
  bool has_cu_seqlens_k = false, has_seqused_k = false;
  bool deterministic = false;
  Backend backend = Backend::kAuto;
  std::array<TensorSpec, kNumAttentionInputs> operands;  // as the caller gave them (leading axes may be 1)

  HEED_API std::vector<int64_t> out_shape() const;
  HEED_API std::vector<int64_t> lse_shape() const;
  HEED_API int num_inputs() const;  // operands that are there
  int num_outputs() const { return wants_lse ? 2 : 1; }
  // Of scratch memory, which a call may have after its outputs: [.., B, Hq, floats] or [.., Hq, floats].
  HEED_API std::vector<int64_t> workspace_shape(int64_t floats_per_head) const;
  HEED_API int64_t num_heads_in_all() const;  // query heads of every leading index and batch row
  Backend asked_backend() const { return backend; }
};

// Canonical text, on one line, such as
//   attention_fwd.v1;q=float32[1,16,4,64];k=float32[1,16,4,64];v=float32[1,16,4,64];scale=default;causal=0;
//   align=bottom_right;window=-1,-1;softcap=0x0p+0;lse=0;deterministic=0;backend=auto
// Absent operands are left out; floats are hexadecimal, so that the text is exact. With cu_seqlens_q, and only then,
// ";max_seqlen=-1,-1" follows the window.
inline constexpr std::string_view kAttentionFwdSchema = "attention_fwd.v1";
HEED_API std::string to_text(const AttentionRequest& request);
// Throws ValueError for anything but the schema above.
HEED_API AttentionRequest parse_attention_request(std::string_view text);

// Every check of the arguments, once, for every face. Throws ValueError or TypeError.
HEED_API AttentionProblem validate(const AttentionRequest& request);

}  // namespace heed
