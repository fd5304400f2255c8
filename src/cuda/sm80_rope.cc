// Host side of the portable kernel of rotary embeddings: which problems it serves, how it is specialised, its
// parameters and its launch. What it computes and how: device/sm80_rope.cuh.
#include "cuda/sm80_rope.h"

#include <algorithm>
#include <array>

#include "core/rope_frequencies.h"
#include "cuda/attention_host.h"
#include "cuda/row_host.h"
#include "cuda/sm80_rope_spec.h"

namespace heed::cuda {
namespace {

using Params = Sm80RopeParams;
using Views = std::array<const TensorView*, Params::kNumOperands>;

// Pairs of chunks of a head: those that are rotated, then those that are copied.
int chunks_per_head(const RopeProblem& problem, const Sm80RopeSpec& spec) {
  const int pair = 2 * chunk_width(spec.element, spec.is_aligned);
  const int rotary_dim = static_cast<int>(problem.rotary_dim);
  const int head_dim = static_cast<int>(problem.head_dim);
  return rotary_dim / pair + (head_dim - rotary_dim + pair - 1) / pair;
}

struct Shape {
  Sm80RopeSpec spec;
  int chunks_per_head;
  int threads_per_token;  // for each chunk
};
Shape make_shape(const RopeProblem& problem, bool is_aligned) {
  Sm80RopeSpec spec;
  spec.element = element_of(problem.dtype);
  spec.is_aligned = is_aligned;
  spec.interleaves = problem.options.interleave;
  spec.has_pos_ids = problem.has_pos_ids;
  spec.has_cache = problem.has_cache;
  const int chunks = chunks_per_head(problem, spec);
  const int num_heads = static_cast<int>(problem.num_q_heads + problem.num_kv_heads);
  const int heads = set_heads(spec, problem.num_tokens * product_of(problem.lead), num_heads, chunks);
  return {spec, chunks, (num_heads + heads - 1) / heads};
}

KernelSpec to_kernel_spec(const Sm80RopeSpec& spec) {
  return {"sm80_rope", InstanceText("Sm80Rope", "Sm80RopeSpec", spec.element)
                           .flag("is_aligned", spec.is_aligned)
                           .flag("interleaves", spec.interleaves)
                           .flag("has_pos_ids", spec.has_pos_ids)
                           .flag("has_cache", spec.has_cache)
                           .number("heads", spec.heads)
                           .str()};
}

// Whether row-major operands start all parts of all rows at multiples of 16 bytes.
bool is_aligned_when_packed(const RopeProblem& problem) {
  return fills_chunks(problem.head_dim, problem.dtype) && problem.rotary_dim % 2 == 0 &&
         fills_chunks(problem.rotary_dim / 2, problem.dtype);
}

struct Prepared {
  Params params;
  std::array<Variant, 2> variants;  // unaligned, aligned
};

void set_operands(Params& params, const RopeProblem& problem, const Views& views) {
  const int num_lead_axes = static_cast<int>(problem.lead.size());
  params.leads = merged_axes<Params::kNumOperands>(problem.lead, 0, views);
  for (int i = 0; i < Params::kNumOperands; ++i) {
    const TensorView& view = *views[i];
    if (!view.defined()) continue;
    params.data[i] = view.data;
    params.token_strides[i] = stride_of(view, num_lead_axes);
    if (i <= Params::kKRope) params.head_strides[i] = stride_of(view, num_lead_axes + 1);
    params.element_strides[i] = view.strides[view.rank - 1];
  }
}

}  // namespace

std::string sm80_rope_declines(const RopeProblem& problem, const Target& target) {
  if (std::string reason = gpu_declines(target); !reason.empty()) return reason;
  constexpr int64_t kMost = int64_t{1} << 30;
  if (std::max({problem.num_tokens, problem.num_sequences, problem.num_q_heads + problem.num_kv_heads,
                problem.max_position}) > kMost) {
    return "counts tokens, heads, sequences and positions up to 2^30, and this call has more";
  }
  if (problem.rotary_dim > 2 * kMaxRopePairs || problem.head_dim > 2 * kMaxRopePairs) {
    return "serves head dims up to " + std::to_string(2 * kMaxRopePairs) + ", and this call has " +
           std::to_string(problem.head_dim);
  }
  double num_tokens = static_cast<double>(problem.num_tokens);
  for (const int64_t size : problem.lead) num_tokens *= static_cast<double>(size);
  if (num_tokens * static_cast<double>(problem.num_q_heads + problem.num_kv_heads) >
      static_cast<double>(kMaxGridBlocks)) {
    return "counts heads of all tokens up to 2^31 - 1, and this call has more";
  }
  return "";
}

Sm80RopeParams sm80_rope_params(const RopeProblem& problem) {
  Params params{};
  params.num_q_heads = static_cast<int>(problem.num_q_heads);
  params.num_heads = static_cast<int>(problem.num_q_heads + problem.num_kv_heads);
  params.head_dim = static_cast<int>(problem.head_dim);
  params.rotary_dim = static_cast<int>(problem.rotary_dim);
  params.num_sequences = static_cast<int>(problem.num_sequences);
  params.max_position = static_cast<int>(problem.max_position);
  params.num_tokens = make_divisor(static_cast<unsigned>(std::max<int64_t>(problem.num_tokens, 1)));
  params.is_inverse = problem.options.inverse;
  if (!problem.has_cache) {
    const std::vector<double> frequencies = rope_frequencies(problem.rotary_dim, problem.options);
    std::transform(frequencies.begin(), frequencies.end(), params.turns, fraction_of_turn);
  }
  return params;
}

std::shared_ptr<void> prepare_sm80_rope(const RopeProblem& problem) {
  auto prepared = std::make_shared<Prepared>();
  prepared->params = sm80_rope_params(problem);
  for (const bool is_aligned : {false, true}) {
    prepared->variants[is_aligned ? 1 : 0].spec = to_kernel_spec(make_shape(problem, is_aligned).spec);
  }
  return prepared;
}

void load_sm80_rope(const RopeProblem& problem, void* prepared, int device) {
  static_cast<Prepared*>(prepared)->variants[is_aligned_when_packed(problem) ? 1 : 0].load_on(device);
}

Sm80RopePlan plan_sm80_rope(const RopeProblem& problem, const RopeArgs& args, const Sm80RopeParams& params_of_problem) {
  Sm80RopePlan plan{.spec = {}, .params = params_of_problem, .num_blocks = 0};
  const int64_t num_tokens = problem.num_tokens * product_of(problem.lead);
  if (num_tokens == 0) return plan;
  const Views views = {&args.q,      &args.k,       &args.q_rope,  &args.k_rope,
                       &args.indptr, &args.offsets, &args.pos_ids, &args.cos_sin_cache};
  Params& params = plan.params;
  set_operands(params, problem, views);
  const bool is_fast = is_aligned_when_packed(problem) && is_aligned(args.q) && is_aligned(args.k) &&
                       is_aligned(args.q_rope) && is_aligned(args.k_rope) && is_aligned(args.cos_sin_cache);
  const Shape shape = make_shape(problem, is_fast);
  plan.spec = shape.spec;
  const int64_t num_slots = num_tokens * shape.threads_per_token;
  params.chunks_per_head = make_divisor(static_cast<unsigned>(shape.chunks_per_head));
  params.threads_per_token = make_divisor(static_cast<unsigned>(shape.threads_per_token));
  params.slots_per_block = kRopeThreads / shape.chunks_per_head;
  params.num_slots = static_cast<unsigned>(num_slots);
  plan.num_blocks = (num_slots + params.slots_per_block - 1) / params.slots_per_block;
  return plan;
}

void sm80_rope(const RopeProblem& problem, const RopeArgs& args, void* prepared) {
  auto& [params, variants] = *static_cast<Prepared*>(prepared);
  const Sm80RopePlan plan = plan_sm80_rope(problem, args, params);
  launch_overlapping(variants[plan.spec.is_aligned ? 1 : 0], args.q.device.index, plan.num_blocks, args.stream,
                     &plan.params);
}

std::vector<KernelSpec> sm80_rope_common_specs() {
  std::vector<KernelSpec> specs;
  for (const int heads : {1, 2}) {
    for (const Element element : {Element::kBFloat16, Element::kFloat16}) {
      for (const bool has_pos_ids : {false, true}) {
        specs.push_back(to_kernel_spec({.element = element, .has_pos_ids = has_pos_ids, .heads = heads}));
      }
    }
    specs.push_back(to_kernel_spec({.has_pos_ids = true, .has_cache = true, .heads = heads}));
    specs.push_back(to_kernel_spec({.interleaves = true, .heads = heads}));
    specs.push_back(to_kernel_spec({.element = Element::kFloat32, .heads = heads}));
  }
  return specs;
}

}  // namespace heed::cuda
