// What the host sides of the GPU attention kernels have in common: parameters from problems and views, text of specs,
// loaded variants.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "core/problem.h"
#include "core/target.h"
#include "cuda/attention_spec.h"
#include "cuda/jit/jit.h"
#include "heed/heed.h"

namespace heed::cuda {

Element element_of(DType dtype);

// Whether scores take their scale before the maximum: one outside of this range, which nobody trains with, would
// overflow or meet the -inf of a masked score as a factor.
bool scales_first(const AttentionProblem& problem);
// Whether there is a soft cap that changes any float32 score.
bool caps_scores(const AttentionProblem& problem);

// Why no GPU kernel serves problems of this size on the target; empty if one may.
std::string gpu_attention_declines(const AttentionProblem& problem, const Target& target);

// Instances as texts: "Name<NameSpec{.element = Element::kBFloat16, .head_dim_qk = 128, ...}>".
class InstanceText {
 public:
  InstanceText(std::string_view name, std::string_view spec, Element element);
  InstanceText& number(std::string_view field, int value);
  InstanceText& flag(std::string_view field, bool value);
  InstanceText& word(std::string_view field, std::string_view value);  // such as "Gate::kSilu"
  std::string str() const { return text_ + "}>"; }

 private:
  std::string text_;
};

// Axes of operands after the leading ones.
using OperandAxes = std::initializer_list<long long DeviceOperand::*>;
extern const OperandAxes kPerHeadAxes;
// [B, L, H, D] or [T, H, D]; [B, H, L] or [H, T]; [B, H] or [H].
OperandAxes row_axes(bool is_varlen);
OperandAxes statistic_axes(bool is_varlen);
OperandAxes head_sum_axes(bool is_varlen);

// Axes of size 1 get stride 0: leading ones broadcast, and elsewhere their stride means nothing.
void set_operand(DeviceOperand& operand, const TensorView& view, OperandAxes axes);

// The inputs of the forward pass, from the arguments of either pass.
template <class Args>
void set_inputs(AttentionParams& params, const Args& args, bool is_varlen) {
  constexpr auto kToken = &DeviceOperand::token;
  set_operand(params.q, args.q, row_axes(is_varlen));
  set_operand(params.k, args.k, row_axes(is_varlen));
  set_operand(params.v, args.v, row_axes(is_varlen));
  set_operand(params.sinks, args.sinks, kPerHeadAxes);
  set_operand(params.alibi_slopes, args.alibi_slopes, kPerHeadAxes);
  set_operand(params.q_segment_ids, args.q_segment_ids, {&DeviceOperand::batch, kToken});
  set_operand(params.kv_segment_ids, args.kv_segment_ids, {&DeviceOperand::batch, kToken});
  set_operand(params.cu_seqlens_q, args.cu_seqlens_q, {kToken});
  set_operand(params.cu_seqlens_k, args.cu_seqlens_k.defined() ? args.cu_seqlens_k : args.cu_seqlens_q, {kToken});
  set_operand(params.seqused_k, args.seqused_k, {kToken});
}

// Everything about the problem but its tensors. `num_heads` are those that blocks divide among them, of one sequence;
// `bytes_per_head` is what the blocks of one head read alike.
void set_problem(AttentionParams& params, const AttentionProblem& problem, int64_t num_heads, int64_t bytes_per_head);

// Product of the leading axes.
int64_t num_problems(const AttentionProblem& problem);

// Tiles of `tile_rows` of `num_rows` rows of one head: exactly, or as an upper bound where lengths are known to the
// device only (each sequence, and the rows before and after them, may end in a tile of its own).
int64_t num_row_tiles(const AttentionProblem& problem, int64_t num_rows, int64_t tile_rows);

// Whether every row starts at a multiple of 16 bytes and its elements are adjacent.
bool is_aligned(const DeviceOperand& operand, int num_lead_axes, int64_t head_dim, int64_t element_bytes);
// The same of row-major operands.
bool is_aligned_when_packed(const AttentionProblem& problem);

// One specialised kernel and, once loaded, what it became.
struct Variant {
  KernelSpec spec;
  std::atomic<const LoadedKernel*> loaded = nullptr;

  const LoadedKernel& load_on(int device) {
    const LoadedKernel* known = loaded.load(std::memory_order_acquire);
    if (known != nullptr && known->is_loaded_on(device)) return *known;
    const LoadedKernel& kernel = load(spec, device);
    loaded.store(&kernel, std::memory_order_release);
    return kernel;
  }
};

}  // namespace heed::cuda
