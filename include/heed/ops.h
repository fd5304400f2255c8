// heed's small ops: gated activations, rotary embeddings, RMS norms, and attention of one query over a KV cache.
// Tensors, errors and backends are those of heed.h.
//
// Everywhere: dtypes float32, float16 or bfloat16; arithmetic in float32; strides are arbitrary (rows whose elements
// are adjacent are fastest). Every operand may have the same number of further leading axes, each of the full size or 1
// (a size of 1 broadcasts); results have all of them in full. Results must not share memory with each other or with an
// input (not checked). Everything is validated before anything is written, with ValueError, TypeError or
// UnsupportedError; on a GPU the call is asynchronous on args.stream, and the first one of its kind finds or compiles
// its kernel. Results are bitwise the same at every call.
#pragma once

#include "heed/heed.h"

namespace heed {

// ---------------------------------------------------------------------------------------------------------------------
// Gated activations: out = activation(x[..., :H]) * x[..., H:].

enum class Activation : uint8_t {
  kSilu,      // x / (1 + exp(-x))
  kGelu,      // x / 2 * (1 + erf(x / sqrt(2)))
  kGeluTanh,  // x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
};

struct ActAndMulArgs {
  TensorView x{};          // [..., 2H]: the gates, then what they are multiplied with
  TensorView out{};        // [..., H], dtype of x, written
  void* stream = nullptr;  // CUDA stream for tensors on a GPU (null: the default stream)
};
HEED_API void act_and_mul(const ActAndMulArgs& args, Activation activation, Backend backend = Backend::kAuto);

// The gradient of x from that of out.
struct ActAndMulBackwardArgs {
  TensorView x{};     // as it was given
  TensorView dout{};  // [..., H], dtype of x
  TensorView dx{};    // [..., 2H], dtype of x, written
  void* stream = nullptr;
};
HEED_API void act_and_mul_backward(const ActAndMulBackwardArgs& args, Activation activation,
                                   Backend backend = Backend::kAuto);

// ---------------------------------------------------------------------------------------------------------------------
// Rotary position embeddings (Su et al. 2021). Pair i of the first rotary_dim elements of a head is rotated by
// position / scale * theta^(-2i / rotary_dim); the elements after them and tokens outside every sequence are copied.

struct RopeOptions {
  int64_t rotary_dim = 0;   // even, up to D; 0: D
  bool interleave = false;  // pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
  double scale = 1.0;       // divides positions (or, as Llama 3.1 has it, low frequencies)
  double theta = 1e4;       // base of the frequencies
  // Llama 3.1: `scale` divides the frequencies whose wavelengths are above old_context_len / low_freq_factor, none
  // below old_context_len / high_freq_factor, and part of each between.
  bool is_llama31 = false;
  double low_freq_factor = 1.0, high_freq_factor = 4.0, old_context_len = 8192.0;
  bool inverse = false;  // rotates back: the gradient
  Backend backend = Backend::kAuto;
};

struct RopeArgs {
  TensorView q{};              // [n, Hq, D]
  TensorView k{};              // [n, Hk, D], dtype of q
  TensorView indptr{};         // [B + 1] int32: sequence i has the tokens [indptr[i], indptr[i + 1])
  TensorView offsets{};        // [B] int32, beside indptr: the position of each sequence's first token
  TensorView pos_ids{};        // [n] int32: each token's position, instead of indptr and offsets
  TensorView cos_sin_cache{};  // optional [max_position, rotary_dim] float32, beside pos_ids: cosines, then sines; the
                               // frequencies of the options do not count then. Positions are clamped to it.
  TensorView q_rope{};         // as q, written
  TensorView k_rope{};         // as k, written
  void* stream = nullptr;
};
HEED_API void apply_rope(const RopeArgs& args, const RopeOptions& options = {});

// ---------------------------------------------------------------------------------------------------------------------
// RMS norm (Zhang and Sennrich 2019): out = s / sqrt(mean(s^2) + eps) * weight with s = x, or x + residual, rounded to
// its dtype, which is then a result too.

struct RmsNormArgs {
  TensorView x{};         // [..., H]
  TensorView weight{};    // [H], dtype of x; leading axes of its own stand before those of a row: [lead..., H]
  TensorView residual{};  // optional, as x
  TensorView out{};       // as x, written
  TensorView sum{};       // as x, written: x + residual; given if and only if residual is
  void* stream = nullptr;
};
HEED_API void rms_norm(const RmsNormArgs& args, double eps = 1e-6, Backend backend = Backend::kAuto);

// The gradients of s and of weight.
struct RmsNormBackwardArgs {
  TensorView x{};          // what was normalised: x, or x + residual as it was returned
  TensorView weight{};     // [H]
  TensorView dout{};       // as x
  TensorView dsum{};       // optional, as x: the gradient of the returned sum, added to dx
  TensorView dx{};         // as x, written
  TensorView dweight{};    // float32 [H], written: the sum over all rows
  TensorView workspace{};  // rms_norm_backward_workspace_bytes() of contiguous float32, aligned to 16 bytes: scratch
  void* stream = nullptr;
};
HEED_API void rms_norm_backward(const RmsNormBackwardArgs& args, double eps = 1e-6, Backend backend = Backend::kAuto);
HEED_API int64_t rms_norm_backward_workspace_bytes(const RmsNormBackwardArgs& args, Backend backend = Backend::kAuto);

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one query token over a KV cache.

enum class KvLayout : uint8_t { kNHD, kHND };

struct SingleDecodeOptions {
  KvLayout kv_layout = KvLayout::kNHD;
  int64_t window_left = -1;          // keys kept before the last one; -1: all
  double softcap = 0.0;              // scores become softcap * tanh(score / softcap); 0 is off
  std::optional<double> sm_scale{};  // default 1 / sqrt(D)
  // With either, q and k are rotated (pairs (j, j + D / 2), D even) by position / rope_scale * rope_theta^(-2j / D):
  // key s at position s, the query at S - 1. The other then has its default, 1 and 1e4.
  std::optional<double> rope_scale{}, rope_theta{};
  bool batch_invariant = false;  // bitwise the same result alone and beside any other leading index
  Backend backend = Backend::kAuto;
};

struct SingleDecodeArgs {
  TensorView q{};             // [Hq, D]
  TensorView k{};             // [S, Hk, D], or [Hk, S, D] with kHND; dtype of q
  TensorView v{};             // [S, Hk, Dv], or [Hk, S, Dv]
  TensorView sinks{};         // optional [Hq] float32, as in attention_forward
  TensorView alibi_slopes{};  // optional [Hq] float32
  TensorView out{};           // [Hq, Dv], dtype of q, written
  TensorView lse{};           // optional [Hq] float32, written: natural logarithm
  TensorView workspace{};     // single_decode_workspace_bytes() of contiguous float32, aligned to 16 bytes: scratch
  void* stream = nullptr;
};
HEED_API void single_decode(const SingleDecodeArgs& args, const SingleDecodeOptions& options = {});
HEED_API int64_t single_decode_workspace_bytes(const SingleDecodeArgs& args, const SingleDecodeOptions& options = {});

}  // namespace heed
