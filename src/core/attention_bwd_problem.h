// The problem of attention's backward pass: that of the forward pass with the tensors that come in addition, as a
// struct and as the canonical text that compiled programs carry.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/problem.h"
#include "heed/heed.h"

namespace heed {

// Inputs in the order in which every face passes them: those of the forward pass, then these.
enum AttentionBwdOperand : int { kOut = kNumAttentionInputs, kLse, kDout, kDlse, kNumAttentionBwdInputs };
inline constexpr int kNumAttentionBwdOnlyInputs = int{kNumAttentionBwdInputs} - kNumAttentionInputs;
inline constexpr std::array<std::string_view, kNumAttentionBwdOnlyInputs> kAttentionBwdOnlyNames = {"out", "lse",
                                                                                                    "dout", "dlse"};

constexpr std::string_view attention_bwd_operand_name(int index) {
  return index < kNumAttentionInputs ? kAttentionOperandNames[index]
                                     : kAttentionBwdOnlyNames[index - kNumAttentionInputs];
}

// Outputs in their order. The workspace follows them.
enum AttentionGradient : int { kDq, kDk, kDv, kDsinks, kDalibiSlopes, kNumAttentionGradients };
inline constexpr std::array<std::string_view, kNumAttentionGradients> kAttentionGradientNames = {
    "dq", "dk", "dv", "dsinks", "dalibi_slopes"};

// What a caller asked for, unchecked.
struct AttentionBwdRequest {
  AttentionRequest forward;                                    // `wants_lse` means nothing here
  std::array<TensorSpec, kNumAttentionBwdOnlyInputs> added{};  // out, lse, dout, dlse

  TensorSpec& operand(int index) {  // of AttentionBwdOperand
    return index < kNumAttentionInputs ? forward.operands[index] : added[index - kNumAttentionInputs];
  }
};

// A validated request.
struct AttentionBwdProblem {
  AttentionProblem forward;         // `lead` is that of all inputs of the backward pass
  TensorSpec out, lse, dout, dlse;  // as the caller gave them (leading axes may be 1)
  bool has_dlse = false;
  // With all leading axes in full. Those of sinks and slopes, where these are there, are float32 per batch row:
  // [.., B, Hq] or [.., Hq].
  std::array<TensorSpec, kNumAttentionGradients> gradients;

  HEED_API const TensorSpec& operand(int index) const;  // of AttentionBwdOperand
  HEED_API int num_inputs() const;                      // operands that are there
  HEED_API int num_outputs() const;                     // gradients that are there, and the workspace
  // [.., B, Hq, floats] or [.., Hq, floats]
  HEED_API std::vector<int64_t> workspace_shape(int64_t floats_per_head) const;
  int64_t num_heads_in_all() const { return forward.num_heads_in_all(); }
  Backend asked_backend() const { return forward.backend; }
};

// Canonical text, on one line: the fields of the forward pass's operands, then those of out, lse, dout and, if it is
// there, dlse; then the options as in the forward pass, without "lse=":
//   attention_bwd.v1;q=float32[1,16,4,64];k=float32[1,16,4,64];v=float32[1,16,4,64];out=float32[1,16,4,64];
//   lse=float32[1,4,16];dout=float32[1,16,4,64];scale=default;causal=0;align=bottom_right;window=-1,-1;
//   softcap=0x0p+0;deterministic=0;backend=auto
inline constexpr std::string_view kAttentionBwdSchema = "attention_bwd.v1";
HEED_API std::string to_text(const AttentionBwdRequest& request);
// Throws ValueError for anything but the schema above.
HEED_API AttentionBwdRequest parse_attention_bwd_request(std::string_view text);

// Every check of the arguments, once, for every face. Throws ValueError or TypeError.
HEED_API AttentionBwdProblem validate(const AttentionBwdRequest& request);

}  // namespace heed
