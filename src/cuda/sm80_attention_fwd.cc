// Host side of the portable attention forward kernel: which problems it serves, how it is specialised, its parameters
// and its launch. What it computes and how: device/sm80_attention_fwd.cuh.
#include "cuda/sm80_attention_fwd.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>

#include "core/dtype.h"
#include "cuda/sm80_attention_fwd_spec.h"

namespace heed::cuda {
namespace {

static_assert(kMaxLeadAxes == heed::kMaxLeadAxes);

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid's first axis
// What sections of heads may take of L2: a third of an H200's, most of an A100's partition.
constexpr int64_t kSectionBytes = int64_t{16} << 20;

constexpr Element element_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return Element::kFloat32;
    case DType::kFloat16:
      return Element::kFloat16;
    case DType::kBFloat16:
      return Element::kBFloat16;
    case DType::kInt32:
      break;  // refused by validation
  }
  return Element::kBFloat16;
}

// Scales outside of this range, which nobody trains with, would overflow or meet the -inf of a masked score as a
// factor.
bool scales_first(double scale) { return !(scale > 1e-30 && scale < 1e37); }

Sm80AttentionFwdSpec make_spec(const AttentionProblem& problem, bool is_aligned) {
  Sm80AttentionFwdSpec spec;
  spec.element = element_of(problem.dtype);
  const int step = 32 / bytes_of(spec.element);
  spec.head_dim_qk = round_up(static_cast<int>(problem.head_dim_qk), step);
  // One operand read of V spans 16 columns of 16 bits, and 8 floats.
  spec.head_dim_v = round_up(static_cast<int>(problem.head_dim_v), step);
  spec.is_aligned = is_aligned;
  spec.is_varlen = problem.is_varlen;
  spec.has_segment_ids = problem.has_segment_ids;
  spec.has_softcap = problem.softcap > 0.0 && problem.softcap < 1e30;  // beyond, a cap changes no float32 score
  spec.has_alibi = problem.has_alibi;
  spec.scales_first = scales_first(problem.softmax_scale);
  return spec;
}

KernelSpec to_kernel_spec(const Sm80AttentionFwdSpec& spec) {
  constexpr std::string_view kElementNames[] = {"kFloat32", "kFloat16", "kBFloat16"};
  std::string text = "Sm80AttentionFwd<Sm80AttentionFwdSpec{.element = Element::";
  text += kElementNames[static_cast<int>(spec.element)];
  text += ", .head_dim_qk = " + std::to_string(spec.head_dim_qk);
  text += ", .head_dim_v = " + std::to_string(spec.head_dim_v);
  const auto flag = [&](std::string_view name, bool value) {
    text += ", .";
    text += name;
    text += value ? " = true" : " = false";
  };
  flag("is_aligned", spec.is_aligned);
  flag("is_varlen", spec.is_varlen);
  flag("has_segment_ids", spec.has_segment_ids);
  flag("has_softcap", spec.has_softcap);
  flag("has_alibi", spec.has_alibi);
  flag("scales_first", spec.scales_first);
  return {"sm80_attention_fwd", text + "}>"};
}

// ---------------------------------------------------------------------------------------------------------------------
// Operands.

using AxisList = std::initializer_list<long long DeviceOperand::*>;
constexpr AxisList kDenseRows = {&DeviceOperand::batch, &DeviceOperand::token, &DeviceOperand::head,
                                 &DeviceOperand::dim};
constexpr AxisList kVarlenRows = {&DeviceOperand::token, &DeviceOperand::head, &DeviceOperand::dim};
constexpr AxisList kDenseIds = {&DeviceOperand::batch, &DeviceOperand::token};
constexpr AxisList kDenseLse = {&DeviceOperand::batch, &DeviceOperand::head, &DeviceOperand::token};
constexpr AxisList kVarlenLse = {&DeviceOperand::head, &DeviceOperand::token};
constexpr AxisList kPerHead = {&DeviceOperand::head};
constexpr AxisList kPerSequence = {&DeviceOperand::token};

// Axes of size 1 get stride 0: leading ones broadcast, and elsewhere their stride means nothing.
void set_operand(DeviceOperand& operand, const TensorView& view, AxisList axes) {
  operand = {};
  if (!view.defined()) return;
  operand.data = view.data;
  const auto stride = [&](int axis) { return view.shape[axis] == 1 ? 0 : view.strides[axis]; };
  int axis = 0;
  for (const int num_lead = view.rank - static_cast<int>(axes.size()); axis < num_lead; ++axis) {
    operand.lead[axis] = stride(axis);
  }
  for (long long DeviceOperand::*member : axes) operand.*member = stride(axis++);
}

void set_operands(Sm80AttentionFwdParams& params, const AttentionForwardArgs& args, bool is_varlen) {
  const AxisList rows = is_varlen ? kVarlenRows : kDenseRows;
  set_operand(params.q, args.q, rows);
  set_operand(params.k, args.k, rows);
  set_operand(params.v, args.v, rows);
  set_operand(params.out, args.out, rows);
  set_operand(params.lse, args.lse, is_varlen ? kVarlenLse : kDenseLse);
  set_operand(params.sinks, args.sinks, kPerHead);
  set_operand(params.alibi_slopes, args.alibi_slopes, kPerHead);
  set_operand(params.q_segment_ids, args.q_segment_ids, kDenseIds);
  set_operand(params.kv_segment_ids, args.kv_segment_ids, kDenseIds);
  set_operand(params.cu_seqlens_q, args.cu_seqlens_q, kPerSequence);
  set_operand(params.cu_seqlens_k, args.cu_seqlens_k.defined() ? args.cu_seqlens_k : args.cu_seqlens_q, kPerSequence);
  set_operand(params.seqused_k, args.seqused_k, kPerSequence);
}

// Whether every row starts at a multiple of 16 bytes and its elements are adjacent.
bool is_aligned(const DeviceOperand& operand, int num_lead_axes, int64_t head_dim, int64_t element_bytes) {
  const int64_t elements = 16 / element_bytes;
  int64_t all = operand.batch | operand.token | operand.head | head_dim;
  for (int axis = 0; axis < num_lead_axes; ++axis) all |= operand.lead[axis];
  return all % elements == 0 && operand.dim == 1 && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

bool are_aligned(const Sm80AttentionFwdParams& params, const AttentionProblem& problem) {
  const int64_t bytes = info(problem.dtype).size_bytes;
  const int lead = params.num_lead_axes;
  return is_aligned(params.q, lead, problem.head_dim_qk, bytes) &&
         is_aligned(params.k, lead, problem.head_dim_qk, bytes) &&
         is_aligned(params.v, lead, problem.head_dim_v, bytes) &&
         is_aligned(params.out, lead, problem.head_dim_v, bytes);
}

bool is_aligned_when_packed(const AttentionProblem& problem) {
  const int64_t elements = 16 / info(problem.dtype).size_bytes;
  return problem.head_dim_qk % elements == 0 && problem.head_dim_v % elements == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// The work.

int64_t num_problems(const AttentionProblem& problem) {
  int64_t count = 1;
  for (int64_t size : problem.lead) count *= size;
  return count;
}

// Tiles of query rows of one head: exactly, or as an upper bound where lengths are known to the device only (each
// sequence, and the rows before and after them, may end in a tile of its own).
int64_t num_tiles(const AttentionProblem& problem, int64_t q_rows) {
  if (!problem.is_varlen) return (problem.q_len + q_rows - 1) / q_rows;
  return problem.q_len / q_rows + problem.batch + 2;
}

int64_t num_heads(const AttentionProblem& problem) {
  return num_problems(problem) * (problem.is_varlen ? 1 : problem.batch) * problem.num_q_heads;
}

// One variant of the kernel: its tile and, once loaded, the kernel.
struct Variant {
  KernelSpec spec;
  int q_rows = 0;
  std::atomic<const LoadedKernel*> loaded = nullptr;
};

struct Prepared {
  Sm80AttentionFwdParams params;
  std::array<Variant, 2> variants;  // unaligned, aligned
};

const LoadedKernel& load_variant(Variant& variant, int device) {
  const LoadedKernel& kernel = load(variant.spec, device);
  variant.loaded.store(&kernel, std::memory_order_release);
  return kernel;
}

Sm80AttentionFwdParams make_params(const AttentionProblem& problem) {
  Sm80AttentionFwdParams params{};
  params.num_lead_axes = static_cast<int>(problem.lead.size());
  std::copy(problem.lead.begin(), problem.lead.end(), params.lead_sizes);
  params.batch = static_cast<int>(problem.batch);
  params.q_len = static_cast<int>(problem.q_len);
  params.kv_len = static_cast<int>(problem.kv_len);
  params.num_q_heads = static_cast<int>(problem.num_q_heads);
  params.group = problem.num_kv_heads == 0 ? 1 : static_cast<int>(problem.num_q_heads / problem.num_kv_heads);
  params.head_dim_qk = static_cast<int>(problem.head_dim_qk);
  params.head_dim_v = static_cast<int>(problem.head_dim_v);
  params.window_left = problem.window_left;
  params.window_right = problem.window_right;
  params.is_bottom_right = problem.causal_align == CausalAlign::kBottomRight;
  const double scale = problem.softmax_scale;
  params.scale = static_cast<float>(scale);
  params.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  if (problem.softcap > 0.0) {
    constexpr double kSmallest = std::numeric_limits<float>::min(), kLargest = std::numeric_limits<float>::max();
    params.softcap = static_cast<float>(std::clamp(problem.softcap, kSmallest, kLargest));
    params.scale_over_cap = static_cast<float>(std::clamp(scale / problem.softcap, -kLargest, kLargest));
  }
  params.num_heads = static_cast<unsigned>(num_heads(problem));
  // Only a one-sided mask makes some tiles longer than others; without one, one head after the other is best for L2.
  params.section_heads = 1;
  if (problem.window_right >= 0 && problem.window_left < 0) {
    const int64_t bytes_per_head =
        problem.kv_len * (problem.head_dim_qk + problem.head_dim_v) * info(problem.dtype).size_bytes / params.group;
    params.section_heads = static_cast<int>(
        std::clamp<int64_t>(kSectionBytes / std::max<int64_t>(bytes_per_head, 1), 1, std::max(1u, params.num_heads)));
  }
  return params;
}

}  // namespace

std::string sm80_attention_fwd_declines(const AttentionProblem& problem, const Target& target) {
  constexpr std::string_view kNeeds = "needs an NVIDIA GPU (sm_80 or newer), and the target is ";
  if (target.is_cpu || (target.sm != 0 && target.sm < 80)) return std::string(kNeeds) + target.name;
  constexpr int64_t kMaxLength = int64_t{1} << 30;
  if (std::max({problem.q_len, problem.kv_len, problem.batch, problem.num_q_heads}) > kMaxLength) {
    return "counts rows, sequences and heads up to 2^30, and this call has more";
  }
  const int q_rows = sm80_attention_fwd_tile(make_spec(problem, false)).q_rows();
  // In double: the product may not fit 64 bits.
  const double blocks =
      static_cast<double>(num_tiles(problem, std::min(q_rows, 64))) * static_cast<double>(num_heads(problem));
  if (blocks > static_cast<double>(kMaxBlocks)) {
    return "launches up to 2^31 - 1 blocks of 64 query rows, and this call needs more";
  }
  return "";
}

std::shared_ptr<void> prepare_sm80_attention_fwd(const AttentionProblem& problem) {
  auto prepared = std::make_shared<Prepared>();
  prepared->params = make_params(problem);
  for (const bool is_aligned : {false, true}) {
    const Sm80AttentionFwdSpec spec = make_spec(problem, is_aligned);
    Variant& variant = prepared->variants[is_aligned ? 1 : 0];
    variant.spec = to_kernel_spec(spec);
    variant.q_rows = sm80_attention_fwd_tile(spec).q_rows();
  }
  return prepared;
}

void load_sm80_attention_fwd(const AttentionProblem& problem, void* prepared, int device) {
  load_variant(static_cast<Prepared*>(prepared)->variants[is_aligned_when_packed(problem) ? 1 : 0], device);
}

void sm80_attention_fwd(const AttentionProblem& problem, const AttentionForwardArgs& args, void* prepared) {
  auto& [params_of_problem, variants] = *static_cast<Prepared*>(prepared);
  if (params_of_problem.num_heads == 0 || problem.q_len == 0) return;
  Sm80AttentionFwdParams params = params_of_problem;
  set_operands(params, args, problem.is_varlen);
  Variant& variant = variants[are_aligned(params, problem) ? 1 : 0];
  params.num_tiles = static_cast<int>(num_tiles(problem, variant.q_rows));

  const int device = args.q.device.index;
  const LoadedKernel* kernel = variant.loaded.load(std::memory_order_acquire);
  if (kernel == nullptr || !kernel->is_loaded_on(device)) kernel = &load_variant(variant, device);
  launch(*kernel, {.grid_x = params.num_tiles * static_cast<int64_t>(params.num_heads), .stream = args.stream},
         &params);
}

std::vector<KernelSpec> sm80_attention_fwd_common_specs() {
  std::vector<KernelSpec> specs;
  const auto add = [&](Element element, int head_dim, bool is_varlen, auto... change) {
    Sm80AttentionFwdSpec spec{.element = element, .head_dim_qk = head_dim, .head_dim_v = head_dim};
    spec.is_varlen = is_varlen;
    (change(spec), ...);
    specs.push_back(to_kernel_spec(spec));
  };
  for (const Element element : {Element::kBFloat16, Element::kFloat16}) {
    for (const int head_dim : {64, 128}) {
      add(element, head_dim, false);
      add(element, head_dim, true);
    }
  }
  for (const int head_dim : {80, 96, 192, 256}) add(Element::kBFloat16, head_dim, false);
  add(Element::kBFloat16, 192, false, [](Sm80AttentionFwdSpec& spec) { spec.head_dim_v = 128; });
  for (const int head_dim : {64, 128}) {
    add(Element::kFloat32, head_dim, false);
    add(Element::kBFloat16, head_dim, false, [](Sm80AttentionFwdSpec& spec) { spec.has_segment_ids = true; });
    add(Element::kBFloat16, head_dim, false, [](Sm80AttentionFwdSpec& spec) { spec.has_softcap = true; });
  }
  add(Element::kBFloat16, 256, false, [](Sm80AttentionFwdSpec& spec) { spec.has_softcap = true; });
  return specs;
}

}  // namespace heed::cuda
