// See attention_host.h.
#include "cuda/attention_host.h"

#include <algorithm>
#include <limits>

#include "core/dtype.h"

namespace heed::cuda {
namespace {

static_assert(kMaxLeadAxes == heed::kMaxLeadAxes);

// What sections of heads may take of L2: a third of an H200's, most of an A100's partition.
constexpr int64_t kSectionBytes = int64_t{16} << 20;

constexpr OperandAxes kDenseRows = {&DeviceOperand::batch, &DeviceOperand::token, &DeviceOperand::head,
                                    &DeviceOperand::dim};
constexpr OperandAxes kVarlenRows = {&DeviceOperand::token, &DeviceOperand::head, &DeviceOperand::dim};
constexpr OperandAxes kDenseStatistics = {&DeviceOperand::batch, &DeviceOperand::head, &DeviceOperand::token};
constexpr OperandAxes kVarlenStatistics = {&DeviceOperand::head, &DeviceOperand::token};
constexpr OperandAxes kDenseHeadSums = {&DeviceOperand::batch, &DeviceOperand::head};
constexpr OperandAxes kHeads = {&DeviceOperand::head};

}  // namespace

const OperandAxes kPerHeadAxes = kHeads;
OperandAxes row_axes(bool is_varlen) { return is_varlen ? kVarlenRows : kDenseRows; }
OperandAxes statistic_axes(bool is_varlen) { return is_varlen ? kVarlenStatistics : kDenseStatistics; }
OperandAxes head_sum_axes(bool is_varlen) { return is_varlen ? kHeads : kDenseHeadSums; }

Element element_of(DType dtype) {
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

bool scales_first(const AttentionProblem& problem) {
  return !(problem.softmax_scale > 1e-30 && problem.softmax_scale < 1e37);
}

bool caps_scores(const AttentionProblem& problem) { return problem.softcap > 0.0 && problem.softcap < 1e30; }

std::string gpu_attention_declines(const AttentionProblem& problem, const Target& target) {
  constexpr std::string_view kNeeds = "needs an NVIDIA GPU (sm_80 or newer), and the target is ";
  if (target.is_cpu || (target.sm != 0 && target.sm < 80)) return std::string(kNeeds) + target.name;
  constexpr int64_t kMaxLength = int64_t{1} << 30;
  if (std::max({problem.q_len, problem.kv_len, problem.batch, problem.num_q_heads}) > kMaxLength) {
    return "counts rows, sequences and heads up to 2^30, and this call has more";
  }
  return "";
}

InstanceText::InstanceText(std::string_view name, std::string_view spec, Element element) {
  constexpr std::string_view kElementNames[] = {"kFloat32", "kFloat16", "kBFloat16"};
  text_ = std::string(name) + "<" + std::string(spec) + "{.element = Element::";
  text_ += kElementNames[static_cast<int>(element)];
}

InstanceText& InstanceText::number(std::string_view field, int value) { return word(field, std::to_string(value)); }

InstanceText& InstanceText::flag(std::string_view field, bool value) { return word(field, value ? "true" : "false"); }

InstanceText& InstanceText::word(std::string_view field, std::string_view value) {
  text_ += ", .";
  text_ += field;
  text_ += " = ";
  text_ += value;
  return *this;
}

void set_operand(DeviceOperand& operand, const TensorView& view, OperandAxes axes) {
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

void set_problem(AttentionParams& params, const AttentionProblem& problem, int64_t num_heads, int64_t bytes_per_head) {
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
  params.num_heads = static_cast<unsigned>(num_problems(problem) * (problem.is_varlen ? 1 : problem.batch) * num_heads);
  // Only a one-sided mask makes some tiles longer than others; without one, one head after the other is best for L2.
  params.section_heads = 1;
  if (problem.window_right >= 0 && problem.window_left < 0) {
    params.section_heads = static_cast<int>(
        std::clamp<int64_t>(kSectionBytes / std::max<int64_t>(bytes_per_head, 1), 1, std::max(1u, params.num_heads)));
  }
}

int64_t num_problems(const AttentionProblem& problem) {
  int64_t count = 1;
  for (int64_t size : problem.lead) count *= size;
  return count;
}

int64_t num_row_tiles(const AttentionProblem& problem, int64_t num_rows, int64_t tile_rows) {
  if (!problem.is_varlen) return (num_rows + tile_rows - 1) / tile_rows;
  return num_rows / tile_rows + problem.batch + 2;
}

bool is_aligned(const DeviceOperand& operand, int num_lead_axes, int64_t head_dim, int64_t element_bytes) {
  const int64_t elements = 16 / element_bytes;
  int64_t all = operand.batch | operand.token | operand.head | head_dim;
  for (int axis = 0; axis < num_lead_axes; ++axis) all |= operand.lead[axis];
  return all % elements == 0 && operand.dim == 1 && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

bool is_aligned_when_packed(const AttentionProblem& problem) {
  const int64_t elements = 16 / info(problem.dtype).size_bytes;
  return problem.head_dim_qk % elements == 0 && problem.head_dim_v % elements == 0;
}

}  // namespace heed::cuda
