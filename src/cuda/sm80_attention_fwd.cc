// Host side of the portable attention forward kernel: which problems it serves, how it is specialised, its parameters
// and its launch. What it computes and how: device/sm80_attention_fwd.cuh.
#include "cuda/sm80_attention_fwd.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "core/dtype.h"
#include "cuda/attention_host.h"
#include "cuda/sm80_attention_fwd_spec.h"

namespace heed::cuda {
namespace {

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();  // of a grid's first axis

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
  spec.has_softcap = caps_scores(problem);
  spec.has_alibi = problem.has_alibi;
  spec.scales_first = scales_first(problem);
  return spec;
}

KernelSpec to_kernel_spec(const Sm80AttentionFwdSpec& spec) {
  return {"sm80_attention_fwd", InstanceText("Sm80AttentionFwd", "Sm80AttentionFwdSpec", spec.element)
                                    .number("head_dim_qk", spec.head_dim_qk)
                                    .number("head_dim_v", spec.head_dim_v)
                                    .flag("is_aligned", spec.is_aligned)
                                    .flag("is_varlen", spec.is_varlen)
                                    .flag("has_segment_ids", spec.has_segment_ids)
                                    .flag("has_softcap", spec.has_softcap)
                                    .flag("has_alibi", spec.has_alibi)
                                    .flag("scales_first", spec.scales_first)
                                    .str()};
}

bool are_aligned(const Sm80AttentionFwdParams& params, const AttentionProblem& problem) {
  const int64_t bytes = info(problem.dtype).size_bytes;
  const int lead = params.num_lead_axes;
  return is_aligned(params.q, lead, problem.head_dim_qk, bytes) &&
         is_aligned(params.k, lead, problem.head_dim_qk, bytes) &&
         is_aligned(params.v, lead, problem.head_dim_v, bytes) &&
         is_aligned(params.out, lead, problem.head_dim_v, bytes);
}

struct Prepared {
  Sm80AttentionFwdParams params{};
  std::array<Variant, 2> variants;  // unaligned, aligned
  std::array<int, 2> q_rows{};      // of their tiles
};

}  // namespace

std::string sm80_attention_fwd_declines(const AttentionProblem& problem, const Target& target) {
  std::string reason = gpu_attention_declines(problem, target);
  if (!reason.empty()) return reason;
  const int q_rows = sm80_attention_fwd_tile(make_spec(problem, false)).q_rows();
  // In double: the product may not fit 64 bits.
  const double blocks = static_cast<double>(num_row_tiles(problem, problem.q_len, std::min(q_rows, 64))) *
                        static_cast<double>(problem.num_heads_in_all());
  if (blocks > static_cast<double>(kMaxBlocks)) {
    return "launches up to 2^31 - 1 blocks of 64 query rows, and this call needs more";
  }
  return "";
}

std::shared_ptr<void> prepare_sm80_attention_fwd(const AttentionProblem& problem) {
  auto prepared = std::make_shared<Prepared>();
  const int64_t kv_bytes = problem.kv_len * (problem.head_dim_qk + problem.head_dim_v) * info(problem.dtype).size_bytes;
  const int64_t group = problem.num_kv_heads == 0 ? 1 : problem.num_q_heads / problem.num_kv_heads;
  set_problem(prepared->params, problem, problem.num_q_heads, kv_bytes / group);
  for (const bool is_aligned : {false, true}) {
    const Sm80AttentionFwdSpec spec = make_spec(problem, is_aligned);
    prepared->variants[is_aligned ? 1 : 0].spec = to_kernel_spec(spec);
    prepared->q_rows[is_aligned ? 1 : 0] = sm80_attention_fwd_tile(spec).q_rows();
  }
  return prepared;
}

void load_sm80_attention_fwd(const AttentionProblem& problem, void* prepared, int device) {
  static_cast<Prepared*>(prepared)->variants[is_aligned_when_packed(problem) ? 1 : 0].load_on(device);
}

void sm80_attention_fwd(const AttentionProblem& problem, const AttentionForwardArgs& args, void* prepared) {
  auto& [params_of_problem, variants, q_rows] = *static_cast<Prepared*>(prepared);
  if (params_of_problem.num_heads == 0 || problem.q_len == 0) return;
  Sm80AttentionFwdParams params = params_of_problem;
  set_inputs(params, args, problem.is_varlen);
  set_operand(params.out, args.out, row_axes(problem.is_varlen));
  set_operand(params.lse, args.lse, statistic_axes(problem.is_varlen));
  const int variant = are_aligned(params, problem) ? 1 : 0;
  params.num_tiles = static_cast<int>(num_row_tiles(problem, problem.q_len, q_rows[variant]));
  launch(variants[variant].load_on(args.q.device.index),
         {.grid_x = params.num_tiles * static_cast<int64_t>(params.num_heads), .stream = args.stream}, &params);
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
