// Host side of the portable attention backward kernels: which problems they serve, how they are specialised, their
// parameters and their three launches. What they compute and how: device/sm80_attention_bwd.cuh and
// device/attention_bwd_passes.cuh.
#include "cuda/sm80_attention_bwd.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "core/dtype.h"
#include "cuda/attention_host.h"
#include "cuda/sm80_attention_bwd_spec.h"

namespace heed::cuda {
namespace {

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid's first axis

Sm80AttentionBwdSpec make_spec(const AttentionBwdProblem& problem, bool is_aligned) {
  const AttentionProblem& forward = problem.forward;
  Sm80AttentionBwdSpec spec;
  spec.element = element_of(forward.dtype);
  // Accumulators come in pairs of 8 columns. Above 128 coarser steps do: fewer kernels.
  const int step = std::max(forward.head_dim_qk, forward.head_dim_v) > 128 ? 32 : 16;
  spec.head_dim_qk = round_up(static_cast<int>(forward.head_dim_qk), step);
  spec.head_dim_v = round_up(static_cast<int>(forward.head_dim_v), step);
  spec.is_aligned = is_aligned;
  spec.is_varlen = forward.is_varlen;
  spec.has_segment_ids = forward.has_segment_ids;
  spec.has_softcap = caps_scores(forward);
  spec.has_alibi = forward.has_alibi;
  spec.is_deterministic = forward.deterministic;
  return spec;
}

KernelSpec to_kernel_spec(const Sm80AttentionBwdSpec& spec) {
  return {"sm80_attention_bwd", InstanceText("Sm80AttentionBwd", "Sm80AttentionBwdSpec", spec.element)
                                    .number("head_dim_qk", spec.head_dim_qk)
                                    .number("head_dim_v", spec.head_dim_v)
                                    .flag("is_aligned", spec.is_aligned)
                                    .flag("is_varlen", spec.is_varlen)
                                    .flag("has_segment_ids", spec.has_segment_ids)
                                    .flag("has_softcap", spec.has_softcap)
                                    .flag("has_alibi", spec.has_alibi)
                                    .flag("is_deterministic", spec.is_deterministic)
                                    .str()};
}

KernelSpec pass_spec(std::string_view name, Element element, bool is_aligned) {
  return {"attention_bwd_passes",
          InstanceText(name, "AttentionBwdPassSpec", element).flag("is_aligned", is_aligned).str()};
}

AttentionBwdWorkspace workspace_of(const AttentionBwdProblem& problem) {
  const AttentionProblem& forward = problem.forward;
  return attention_bwd_workspace(forward.q_len, forward.kv_len, forward.is_varlen ? forward.batch : 0,
                                 static_cast<int>(forward.head_dim_qk), forward.deterministic, forward.has_alibi);
}

// The kernels of one call, for operands that are aligned or not.
struct Kernels {
  Sm80AttentionBwdSpec spec;
  Variant prepare, main, finish;
};

struct Prepared {
  Sm80AttentionBwdParams params{};
  std::array<Kernels, 2> kernels;  // unaligned, aligned
};

bool are_aligned(const Sm80AttentionBwdParams& params, const AttentionProblem& problem) {
  const int64_t bytes = info(problem.dtype).size_bytes;
  const auto are = [&](std::initializer_list<const DeviceOperand*> operands, int64_t head_dim) {
    return std::all_of(operands.begin(), operands.end(), [&](const DeviceOperand* operand) {
      return is_aligned(*operand, params.num_lead_axes, head_dim, bytes);
    });
  };
  return are({&params.q, &params.k, &params.dq, &params.dk}, problem.head_dim_qk) &&
         are({&params.v, &params.out, &params.dout, &params.dv}, problem.head_dim_v);
}

void set_operands(Sm80AttentionBwdParams& params, const AttentionBackwardArgs& args, bool is_varlen) {
  set_inputs(params, args, is_varlen);
  set_operand(params.out, args.out, row_axes(is_varlen));
  set_operand(params.dout, args.dout, row_axes(is_varlen));
  set_operand(params.lse, args.lse, statistic_axes(is_varlen));
  set_operand(params.dlse, args.dlse, statistic_axes(is_varlen));
  set_operand(params.dq, args.dq, row_axes(is_varlen));
  set_operand(params.dk, args.dk, row_axes(is_varlen));
  set_operand(params.dv, args.dv, row_axes(is_varlen));
  set_operand(params.dsinks, args.dsinks, head_sum_axes(is_varlen));
  set_operand(params.dalibi_slopes, args.dalibi_slopes, head_sum_axes(is_varlen));
  params.workspace = static_cast<float*>(args.workspace.data);
}

}  // namespace

std::string sm80_attention_bwd_declines(const AttentionBwdProblem& problem, const Target& target) {
  std::string reason = gpu_attention_declines(problem.forward, target);
  if (!reason.empty()) return reason;
  if ((problem.forward.q_len + problem.forward.kv_len) / kMinBwdRows + 2 * problem.forward.batch >
      std::numeric_limits<int32_t>::max() / (2 * kTurnsPerTile)) {
    return "counts up to 2^27 tiles of 16 rows and sequences, and this call has more";
  }
  // In double: the product may not fit 64 bits.
  const double blocks = static_cast<double>(num_row_tiles(
                            problem.forward, std::max(problem.forward.q_len, problem.forward.kv_len), kMinBwdRows)) *
                        static_cast<double>(problem.num_heads_in_all());
  if (blocks > static_cast<double>(kMaxBlocks)) {
    return "launches up to 2^31 - 1 blocks of 16 rows, and this call needs more";
  }
  return "";
}

int64_t sm80_attention_bwd_workspace(const AttentionBwdProblem& problem) { return workspace_of(problem).floats; }

std::shared_ptr<void> prepare_sm80_attention_bwd(const AttentionBwdProblem& problem) {
  const AttentionProblem& forward = problem.forward;
  auto prepared = std::make_shared<Prepared>();
  Sm80AttentionBwdParams& params = prepared->params;
  // The blocks of one KV head read Q and dO of its group, and add to dQ.
  const int64_t bytes_per_row = (forward.head_dim_qk + forward.head_dim_v) * info(forward.dtype).size_bytes +
                                forward.head_dim_qk * static_cast<int64_t>(sizeof(float));
  const int64_t group = forward.num_kv_heads == 0 ? 1 : forward.num_q_heads / forward.num_kv_heads;
  set_problem(params, forward, forward.num_kv_heads, forward.q_len * group * bytes_per_row);
  params.layout = workspace_of(problem);
  // Blocks that take turns at the tiles of one head run one after the other by some steps. Where as many heads as keep
  // a GPU busy take the same tile one after the other, the blocks that follow start in that rhythm.
  if (forward.deterministic && params.window_right < 0) {
    constexpr int64_t kBlocksAtOnce = 132, kTileKeys = 128;
    const int64_t num_tiles = std::max<int64_t>(1, (forward.kv_len + kTileKeys - 1) / kTileKeys);
    params.section_heads =
        static_cast<int>(std::clamp<int64_t>(kBlocksAtOnce / num_tiles, 1, std::max(1u, params.num_heads)));
  }
  for (const bool is_aligned : {false, true}) {
    Kernels& kernels = prepared->kernels[is_aligned ? 1 : 0];
    kernels.spec = make_spec(problem, is_aligned);
    kernels.main.spec = to_kernel_spec(kernels.spec);
    kernels.prepare.spec = pass_spec("AttentionBwdPrepare", kernels.spec.element, is_aligned);
    kernels.finish.spec = pass_spec("AttentionBwdFinish", kernels.spec.element, is_aligned);
  }
  params.lse_factor = prepared->kernels[0].spec.is_natural() ? 1.0f : 1.4426950408889634f;
  return prepared;
}

void load_sm80_attention_bwd(const AttentionBwdProblem& problem, void* prepared, int device) {
  Kernels& kernels = static_cast<Prepared*>(prepared)->kernels[is_aligned_when_packed(problem.forward) ? 1 : 0];
  for (Variant* variant : {&kernels.prepare, &kernels.main, &kernels.finish}) variant->load_on(device);
}

void sm80_attention_bwd(const AttentionBwdProblem& problem, const AttentionBackwardArgs& args, void* prepared) {
  const AttentionProblem& forward = problem.forward;
  auto& [params_of_problem, kernels_of_problem] = *static_cast<Prepared*>(prepared);
  if (problem.num_heads_in_all() == 0) return;
  Sm80AttentionBwdParams params = params_of_problem;
  set_operands(params, args, forward.is_varlen);
  Kernels& kernels = kernels_of_problem[are_aligned(params, forward) ? 1 : 0];
  const int device = args.q.device.index;
  const auto launch_one = [&](Variant& variant, int64_t num_blocks) {
    if (num_blocks > 0) launch(variant.load_on(device), {.grid_x = num_blocks, .stream = args.stream}, &params);
  };

  const int64_t num_heads = problem.num_heads_in_all();
  const int64_t pass_blocks = std::max<int64_t>((forward.q_len + kBwdPassRows - 1) / kBwdPassRows, 1) * num_heads;
  const int kv_rows = sm80_attention_bwd_tile(kernels.spec, compute_capability(device)).kv_rows();
  params.num_tiles = static_cast<int>(num_row_tiles(forward, forward.kv_len, kv_rows));
  launch_one(kernels.prepare, pass_blocks);
  launch_one(kernels.main, params.num_tiles * static_cast<int64_t>(params.num_heads));
  launch_one(kernels.finish, pass_blocks);
}

std::vector<KernelSpec> sm80_attention_bwd_common_specs() {
  std::vector<KernelSpec> specs;
  for (const Element element : {Element::kBFloat16, Element::kFloat16, Element::kFloat32}) {
    for (const char* name : {"AttentionBwdPrepare", "AttentionBwdFinish"}) {
      specs.push_back(pass_spec(name, element, true));
    }
  }
  const auto add = [&](Element element, int head_dim, auto... change) {
    Sm80AttentionBwdSpec spec{.element = element, .head_dim_qk = head_dim, .head_dim_v = head_dim};
    (change(spec), ...);
    specs.push_back(to_kernel_spec(spec));
  };
  const auto deterministic = [](Sm80AttentionBwdSpec& spec) { spec.is_deterministic = true; };
  const auto varlen = [](Sm80AttentionBwdSpec& spec) { spec.is_varlen = true; };
  for (const int head_dim : {64, 128}) {
    for (const Element element : {Element::kBFloat16, Element::kFloat16}) {
      add(element, head_dim);
      add(element, head_dim, varlen);
    }
    add(Element::kBFloat16, head_dim, deterministic);
    add(Element::kBFloat16, head_dim, deterministic, varlen);
    add(Element::kFloat32, head_dim);
    add(Element::kBFloat16, head_dim, [](Sm80AttentionBwdSpec& spec) { spec.has_segment_ids = true; });
    add(Element::kBFloat16, head_dim, [](Sm80AttentionBwdSpec& spec) { spec.has_softcap = true; });
  }
  for (const int head_dim : {96, 192, 256}) add(Element::kBFloat16, head_dim);
  add(Element::kBFloat16, 256, deterministic);
  return specs;
}

}  // namespace heed::cuda
