// heed: attention for CPUs and GPUs. The public C++ interface.
//
// Tensors are plain views: the caller owns all memory. Every function validates its arguments before anything runs and
// reports what is wrong with one of the typed errors below. Functions are re-entrant and may be called from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__GNUC__)
#define HEED_API __attribute__((visibility("default")))
#else
#define HEED_API
#endif

namespace heed {

// ---------------------------------------------------------------------------------------------------------------------
// Errors. All derive from std::exception; nothing else is thrown, and the library neither aborts nor prints. Beside the
// typed errors below, tensors on a GPU may meet a std::runtime_error: no driver, no compiler, what CUDA reports.

// A shape or a value is wrong. The message names the tensor, what it got and what it expected.
class HEED_API ValueError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A dtype or the kind of an argument is wrong.
class HEED_API TypeError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// One kernel candidate and, if it declined a problem, why (empty: it serves the problem).
struct Candidate {
  std::string name;     // such as "cpu_attention_fwd"
  std::string backend;  // "cpu", "sm80", "sm90"
  std::string reason;   // empty for a candidate that serves the problem
};

// The arguments are valid, but no kernel of this build can serve them. Carries each candidate's reason.
class HEED_API UnsupportedError : public ValueError {
 public:
  UnsupportedError(const std::string& message, std::vector<Candidate> candidates)
      : ValueError(message), candidates_(std::move(candidates)) {}
  const std::vector<Candidate>& candidates() const { return candidates_; }

 private:
  std::vector<Candidate> candidates_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Tensors.

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kInt32 };

enum class DeviceType : uint8_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int32_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

// Four axes of an attention tensor and up to eight leading axes.
inline constexpr int kMaxRank = 12;

// A strided view of memory that somebody else owns. Strides count elements and may be zero or negative. `data` points
// to element [0, ..., 0] and is aligned to the element size. An undefined view (rank -1) stands for an absent optional
// operand.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int32_t rank = -1;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};
  Device device{};

  bool defined() const { return rank >= 0; }

  // A row-major view. Throws ValueError if the shape has more than kMaxRank axes.
  static TensorView contiguous(const void* data, DType dtype, std::initializer_list<int64_t> shape,
                               Device device = {}) {
    if (shape.size() > kMaxRank) {
      throw ValueError("TensorView: got " + std::to_string(shape.size()) + " axes, expected at most " +
                       std::to_string(kMaxRank));
    }
    TensorView view;
    view.data = const_cast<void*>(data);
    view.dtype = dtype;
    view.rank = static_cast<int32_t>(shape.size());
    view.device = device;
    int axis = 0;
    for (int64_t size : shape) view.shape[axis++] = size;
    uint64_t stride = 1;  // unsigned: a shape that overflows is refused later, by the function that gets it
    for (int i = view.rank - 1; i >= 0; --i) {
      view.strides[i] = static_cast<int64_t>(stride);
      stride *= static_cast<uint64_t>(view.shape[i]);
    }
    return view;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Attention.

// Which corner of the score matrix causal masks and windows are anchored to. Bottom-right (the convention of
// FlashAttention 2.1 and later): the last query sees the last key. Top-left: query i and key i share a diagonal.
enum class CausalAlign : uint8_t { kBottomRight, kTopLeft };

enum class Backend : uint8_t { kAuto, kCpu, kSm80, kSm90 };

struct AttentionOptions {
  std::optional<double> softmax_scale;  // default 1 / sqrt(head_dim_qk)
  bool is_causal = false;               // forces window_right = 0
  CausalAlign causal_align = CausalAlign::kBottomRight;
  int64_t window_left = -1;   // keys kept to the left of a query's diagonal; -1: unbounded
  int64_t window_right = -1;  // keys kept to its right; -1: unbounded
  double softcap = 0.0;       // scores become softcap * tanh(score / softcap); 0: off
  // Variable-length batches only: upper bounds of the sequences' lengths, -1 for the total number of rows. Hints that a
  // kernel may ignore; rows past a bound that is too small are undefined.
  int64_t max_seqlen_q = -1;
  int64_t max_seqlen_k = -1;
  bool deterministic = false;
  Backend backend = Backend::kAuto;
};

// Operands of attention_forward. B batch, Lq / Lk tokens, Hq / Hk query / KV heads (Hq a multiple of Hk), D and Dv head
// dims from 1 to 256. Every operand may have the same number of further leading axes, each of the full size or 1 (a
// size of 1 broadcasts). Strides are arbitrary.
//
// With cu_seqlens_q the batch is one of variable lengths: q, k, v, out and lse lose their axis B, Tq / Tk rows in all
// stand in the place of Lq / Lk, and sequence b has the queries [cu_seqlens_q[b], cu_seqlens_q[b + 1]) and the keys
// from cu_seqlens_k[b] (cu_seqlens_q[b] without cu_seqlens_k) on: as many as up to the next entry, or seqused_k[b] if
// that is fewer. These values lie on the device of the other operands and are read when the call runs; whatever they
// hold is clamped, so that nothing outside the tensors is touched. Queries outside every sequence get out 0 and lse
// -inf. Sequences whose queries overlap (entries that decrease) leave undefined values in rows of `out` and `lse`.
struct AttentionForwardArgs {
  TensorView q;               // [B, Lq, Hq, D] or [Tq, Hq, D]: float32, float16 or bfloat16
  TensorView k;               // [B, Lk, Hk, D] or [Tk, Hk, D], dtype of q
  TensorView v;               // [B, Lk, Hk, Dv] or [Tk, Hk, Dv], dtype of q
  TensorView sinks;           // optional [Hq] float32: raw logits added to each softmax denominator
  TensorView alibi_slopes;    // optional [Hq] float32: score -= slope * |distance from the diagonal|
  TensorView q_segment_ids;   // optional [B, Lq] int32: attention only where both ids are equal
  TensorView kv_segment_ids;  // optional [B, Lk] int32: given if and only if q_segment_ids is
  TensorView cu_seqlens_q;    // optional [B + 1] int32: a batch of variable lengths; excludes segment ids
  TensorView cu_seqlens_k;    // optional [B + 1] int32, only beside cu_seqlens_q
  TensorView seqused_k;       // optional [B] int32, only beside cu_seqlens_q
  TensorView out;             // [B, Lq, Hq, Dv] or [Tq, Hq, Dv], dtype of q, written
  TensorView lse;             // optional [B, Hq, Lq] or [Hq, Tq] float32, written: log of the softmax denominator
  TensorView workspace;       // optional scratch: attention_forward_workspace_bytes() of contiguous float32, aligned to
                              // 16 bytes. With it, blocks of a GPU that are done early take work from the others
  void* stream = nullptr;     // CUDA stream for tensors on a GPU (null: the default stream)
};

// Softmax attention: for every query row i, with s_j = scale * <q_i, k_j> (soft-capped, then ALiBi, then masked),
//   out_i = sum_j exp(s_j - lse_i) v_j,   lse_i = log(sum_j exp(s_j) [+ exp(sink)]).
// A row with no visible key gets out 0 and lse -inf (with sinks: lse = its sink). Statistics and accumulation are
// float32. out and lse must not share memory with each other or with an input (not checked).
// Throws ValueError, TypeError or UnsupportedError before anything is written. On a GPU the call is asynchronous on
// args.stream, and the first one of its kind finds or compiles its kernel.
HEED_API void attention_forward(const AttentionForwardArgs& args, const AttentionOptions& options = {});

// The bytes of `workspace` that a call of attention_forward has a use for: 0 for most kernels. Without it, results may
// come later and be rounded differently. Calls that may run at the same time need one each. The operands need no
// memory, and `out` and `lse` need not be there.
HEED_API int64_t attention_forward_workspace_bytes(const AttentionForwardArgs& args,
                                                   const AttentionOptions& options = {});

// Operands of attention_backward: the inputs of attention_forward, what it returned for them, the gradients of its
// results, and where the gradients of its inputs go. Leading axes and strides are free as in attention_forward: every
// input has the same number of leading axes, each of the full size or 1. Gradients have all leading axes in full.
//
// The gradients of sinks and slopes are sums over the queries of one batch row; whoever wants one gradient per head
// sums them over B. Sequences that share keys (entries of cu_seqlens_k that decrease) leave undefined values in those
// rows of dk and dv.
struct AttentionBackwardArgs {
  // The inputs of attention_forward, as they were given to it.
  TensorView q;
  TensorView k;
  TensorView v;
  TensorView sinks;
  TensorView alibi_slopes;
  TensorView q_segment_ids;
  TensorView kv_segment_ids;
  TensorView cu_seqlens_q;
  TensorView cu_seqlens_k;
  TensorView seqused_k;

  TensorView out;   // [B, Lq, Hq, Dv] or [Tq, Hq, Dv], dtype of q: what attention_forward wrote
  TensorView lse;   // [B, Hq, Lq] or [Hq, Tq] float32: what attention_forward wrote
  TensorView dout;  // gradient of out, with its shape and dtype
  TensorView dlse;  // optional gradient of lse, with its shape and dtype; absent: 0

  TensorView dq;             // written, shape and dtype of q
  TensorView dk;             // written, shape and dtype of k: the sum over the query heads that share a KV head
  TensorView dv;             // written, shape and dtype of v: likewise
  TensorView dsinks;         // written, [B, Hq] or, with cu_seqlens_q, [Hq] float32: given if and only if sinks is
  TensorView dalibi_slopes;  // written, the same for alibi_slopes
  TensorView workspace;      // attention_backward_workspace_bytes() of contiguous float32, aligned to 16 bytes: scratch
  void* stream = nullptr;    // CUDA stream for tensors on a GPU (null: the default stream)
};

// Gradients of attention_forward. With p_ij = exp(s_ij - lse_i) (0 where key j is masked),
//   delta_i = <dout_i, out_i> - dlse_i,   ds_ij = p_ij (<dout_i, v_j> - delta_i),
//   dv_j = sum_i p_ij dout_i,   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i
// (with a soft cap, dq and dk take ds_ij times the cap's derivative), and for a head's sink and slope
//   dsink = -sum_i exp(sink - lse_i) delta_i,   dslope = -sum_ij ds_ij |distance from the diagonal|.
// Queries without a visible key get gradient 0 and give none but to their sink. Keys that no query sees and rows
// outside every sequence get gradient 0. Masked pairs contribute nothing, whatever the operands hold there. Sums are
// float32; on a GPU, float16 and bfloat16 round p and ds to their dtype before the products. On the CPU the result is
// bitwise the same at every call; on a GPU, if options.deterministic. The gradients must not share memory with each
// other or with an input (not checked).
// Throws ValueError, TypeError or UnsupportedError before anything is written. On a GPU the call is asynchronous on
// args.stream, and the first one of its kind finds or compiles its kernels.
HEED_API void attention_backward(const AttentionBackwardArgs& args, const AttentionOptions& options = {});

// The bytes that `workspace` must hold for a call of attention_backward: exact, 0 if none is needed (`workspace` may
// then be absent). The inputs need no memory, and the gradients need not be there.
HEED_API int64_t attention_backward_workspace_bytes(const AttentionBackwardArgs& args,
                                                    const AttentionOptions& options = {});

// ---------------------------------------------------------------------------------------------------------------------
// The library.

HEED_API const char* version();                   // such as "0.1.0"
HEED_API std::string cpu_target();                // the instruction set in use, such as "AVX3"
HEED_API std::vector<std::string> cpu_targets();  // what this build contains and this CPU runs, best first
HEED_API int num_threads();                       // size of the shared thread arena (HEED_NUM_THREADS)

}  // namespace heed
