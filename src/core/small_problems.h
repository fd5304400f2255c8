// The problems of the small ops (heed/ops.h): what is known of one call before anything runs, as structs and as the
// canonical texts that compiled programs carry.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/problem.h"
#include "heed/heed.h"
#include "heed/ops.h"

namespace heed {

// Every problem has `operands` in the order in which all faces pass them, absent ones marked, with the shapes that the
// caller gave (leading axes may be 1), and `lead`, the full sizes of the leading axes.
//
// A request is what a caller asked for, unchecked: parse_..() reads it from the op's canonical text (throws ValueError
// for anything but its schema), to_text() writes it, and validate(), which every face calls, makes it a problem. Throws
// ValueError or TypeError that names the tensor, what it got and what was expected.

// The names of the enumerators in texts and messages.
inline constexpr std::string_view kActivationNames[] = {"silu", "gelu", "gelu_tanh"};
inline constexpr std::string_view kKvLayoutNames[] = {"NHD", "HND"};
inline constexpr double kDefaultRopeScale = 1.0, kDefaultRopeTheta = 1e4;

// act_and_mul.v1;x=bfloat16[16,28672];activation=silu;backend=auto
// act_and_mul_bwd.v1;x=..;dout=..;activation=silu;backend=auto
// The axes of x but the last are all leading ones.
struct ActAndMulProblem {
  enum Operand : int { kX, kDout, kNumInputs };
  static constexpr std::array<std::string_view, kNumInputs> kNames = {"x", "dout"};

  DType dtype{};
  std::vector<int64_t> lead;
  int64_t num_rows = 0, hidden = 0;  // hidden: H
  Activation activation = Activation::kSilu;
  bool is_backward = false;
  Backend backend = Backend::kAuto;
  std::array<TensorSpec, kNumInputs> operands;

  HEED_API std::vector<int64_t> out_shape() const;  // of out, or of dx
  int num_inputs() const { return is_backward ? 2 : 1; }
  int num_outputs() const { return 1; }
  int64_t num_heads_in_all() const { return 1; }
  Backend asked_backend() const { return backend; }
};

struct ActAndMulRequest {
  std::array<TensorSpec, ActAndMulProblem::kNumInputs> operands{};
  Activation activation = Activation::kSilu;
  bool is_backward = false;
  Backend backend = Backend::kAuto;
};
HEED_API std::string to_text(const ActAndMulRequest& request);
HEED_API ActAndMulRequest parse_act_and_mul_request(std::string_view text, bool is_backward);
HEED_API ActAndMulProblem validate(const ActAndMulRequest& request);

// rope.v1;q=..;k=..;indptr=..;offsets=..;rotary_dim=64;interleave=0;scale=0x1p+0;theta=0x1.388p+13;llama31=0;inverse=0;
// backend=auto, or with pos_ids=.. [;cos_sin_cache=..] instead of indptr and offsets; llama31=1 is followed by
// ;low=..;high=..;context=..
struct RopeProblem {
  enum Operand : int { kQ, kK, kIndptr, kOffsets, kPosIds, kCosSinCache, kNumInputs };
  static constexpr std::array<std::string_view, kNumInputs> kNames = {"q",       "k",       "indptr",
                                                                      "offsets", "pos_ids", "cos_sin_cache"};

  DType dtype{};
  std::vector<int64_t> lead;
  int64_t num_tokens = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0, rotary_dim = 0;
  int64_t num_sequences = 0;  // with indptr
  int64_t max_position = 0;   // rows of the cache
  bool has_pos_ids = false, has_cache = false;
  RopeOptions options;  // rotary_dim resolved
  std::array<TensorSpec, kNumInputs> operands;

  HEED_API std::vector<int64_t> q_shape() const;  // with all leading axes in full
  HEED_API std::vector<int64_t> k_shape() const;
  int num_inputs() const { return has_pos_ids ? (has_cache ? 4 : 3) : 4; }
  int num_outputs() const { return 2; }
  int64_t num_heads_in_all() const { return 1; }
  Backend asked_backend() const { return options.backend; }
};

struct RopeRequest {
  std::array<TensorSpec, RopeProblem::kNumInputs> operands{};
  RopeOptions options;
};
HEED_API std::string to_text(const RopeRequest& request);
HEED_API RopeRequest parse_rope_request(std::string_view text);
HEED_API RopeProblem validate(const RopeRequest& request);

// rms_norm.v1;x=..;weight=..[;residual=..];rows=1;eps=0x..;backend=auto
// rms_norm_bwd.v1;x=..;weight=..;dout=..[;dsum=..];rows=1;eps=0x..;backend=auto
// `rows`: how many axes between the leading ones and the last one x has that weight lacks.
struct RmsNormProblem {
  enum Operand : int { kX, kWeight, kResidual, kDout, kDsum, kNumInputs };
  static constexpr std::array<std::string_view, kNumInputs> kNames = {"x", "weight", "residual", "dout", "dsum"};

  DType dtype{};
  std::vector<int64_t> lead;
  std::vector<int64_t> rows;         // the sizes of x's axes between the leading ones and the last one
  int64_t num_rows = 0, hidden = 0;  // num_rows: product of `rows`, for each leading index
  double eps = 1e-6;
  bool has_residual = false, has_dsum = false, is_backward = false;
  Backend backend = Backend::kAuto;
  std::array<TensorSpec, kNumInputs> operands;

  HEED_API std::vector<int64_t> x_shape() const;        // of out, sum and dx
  HEED_API std::vector<int64_t> dweight_shape() const;  // [lead..., H]
  // float32 [lead..., W], W floats as resolved.
  HEED_API std::vector<int64_t> workspace_shape(int64_t floats_per_index) const;
  HEED_API int num_inputs() const;
  // Backward: dx, dweight, workspace.
  int num_outputs() const { return is_backward ? 3 : has_residual ? 2 : 1; }
  HEED_API int64_t num_heads_in_all() const;  // the product of `lead`: the unit of the workspace
  Backend asked_backend() const { return backend; }
};

struct RmsNormRequest {
  std::array<TensorSpec, RmsNormProblem::kNumInputs> operands{};
  int64_t num_row_axes = 0;
  double eps = 1e-6;
  bool is_backward = false;
  Backend backend = Backend::kAuto;
};
HEED_API std::string to_text(const RmsNormRequest& request);
HEED_API RmsNormRequest parse_rms_norm_request(std::string_view text, bool is_backward);
HEED_API RmsNormProblem validate(const RmsNormRequest& request);

// attention_decode.v1;q=..;k=..;v=..[;sinks=..][;alibi_slopes=..];layout=NHD;window=-1;softcap=0x0p+0;scale=default;
// rope=none;lse=0;batch_invariant=0;backend=auto, where rope is none or <scale>,<theta>
struct AttentionDecodeProblem {
  enum Operand : int { kQ, kK, kV, kSinks, kAlibiSlopes, kNumInputs };
  static constexpr std::array<std::string_view, kNumInputs> kNames = {"q", "k", "v", "sinks", "alibi_slopes"};

  DType dtype{};
  std::vector<int64_t> lead;
  int64_t kv_len = 0, num_q_heads = 0, num_kv_heads = 0, head_dim_qk = 0, head_dim_v = 0;
  KvLayout kv_layout = KvLayout::kNHD;
  int64_t window_left = -1;
  double softcap = 0.0, softmax_scale = 0.0;
  bool has_rope = false;
  double rope_scale = kDefaultRopeScale, rope_theta = kDefaultRopeTheta;
  bool has_sinks = false, has_alibi = false, wants_lse = false, batch_invariant = false;
  Backend backend = Backend::kAuto;
  std::array<TensorSpec, kNumInputs> operands;

  HEED_API std::vector<int64_t> out_shape() const;
  HEED_API std::vector<int64_t> lse_shape() const;
  // float32 [lead..., Hq, W], W floats as resolved.
  HEED_API std::vector<int64_t> workspace_shape(int64_t floats_per_head) const;
  HEED_API int num_inputs() const;
  int num_outputs() const { return wants_lse ? 3 : 2; }  // out[, lse], workspace
  HEED_API int64_t num_heads_in_all() const;             // query heads of every leading index
  Backend asked_backend() const { return backend; }
};

struct AttentionDecodeRequest {
  std::array<TensorSpec, AttentionDecodeProblem::kNumInputs> operands{};
  SingleDecodeOptions options;
  bool wants_lse = false;
};
HEED_API std::string to_text(const AttentionDecodeRequest& request);
HEED_API AttentionDecodeRequest parse_attention_decode_request(std::string_view text);
HEED_API AttentionDecodeProblem validate(const AttentionDecodeRequest& request);

}  // namespace heed
