// Host side of the GPU kernels of attention of one query: which problems they serve, how they are specialised, how the
// keys are divided, parameters and launches. What they compute and how: device/sm80_attention_decode.cuh.
#include "cuda/sm80_attention_decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <initializer_list>

#include "core/dtype.h"
#include "core/rope_frequencies.h"
#include "cuda/attention_host.h"
#include "cuda/row_host.h"
#include "cuda/sm80_attention_decode_spec.h"

namespace heed::cuda {
namespace {

// The operand's axes after the leading ones, in their order.
using Axes = std::initializer_list<long long DecodeOperand::*>;
constexpr Axes kHeadAxes = {&DecodeOperand::head_bytes};
constexpr Axes kRowAxes = {&DecodeOperand::head_bytes, &DecodeOperand::dim_bytes};
constexpr Axes kNhdAxes = {&DecodeOperand::token_bytes, &DecodeOperand::head_bytes, &DecodeOperand::dim_bytes};
constexpr Axes kHndAxes = {&DecodeOperand::head_bytes, &DecodeOperand::token_bytes, &DecodeOperand::dim_bytes};

// Blocks that share the query heads of one KV head.
struct RowTiles {
  int query_rows;
  int64_t count;
};
RowTiles row_tiles_of(const AttentionDecodeProblem& problem) {
  const int64_t group = problem.num_kv_heads == 0 ? 1 : problem.num_q_heads / problem.num_kv_heads;
  const int query_rows = group <= 8 ? 8 : 16;
  return {query_rows, std::max<int64_t>(1, (group + query_rows - 1) / query_rows)};
}

// Of the keys, those that the query sees: it is at the last one.
int64_t first_key_of(const AttentionDecodeProblem& problem) {
  const bool has_window = problem.window_left >= 0 && problem.window_left < problem.kv_len;
  return has_window ? problem.kv_len - 1 - problem.window_left : 0;
}

Sm80AttentionDecodeSpec make_spec(const AttentionDecodeProblem& problem, bool is_aligned) {
  Sm80AttentionDecodeSpec spec;
  spec.element = element_of(problem.dtype);
  spec.head_dim_qk = round_up(static_cast<int>(problem.head_dim_qk), 16);
  spec.head_dim_v = round_up(static_cast<int>(problem.head_dim_v), 16);
  spec.query_rows = row_tiles_of(problem).query_rows;
  spec.is_aligned = is_aligned;
  spec.has_rope = problem.has_rope;
  return spec;
}

KernelSpec to_kernel_spec(const Sm80AttentionDecodeSpec& spec) {
  return {"sm80_attention_decode", InstanceText("Sm80AttentionDecode", "Sm80AttentionDecodeSpec", spec.element)
                                       .number("head_dim_qk", spec.head_dim_qk)
                                       .number("head_dim_v", spec.head_dim_v)
                                       .number("query_rows", spec.query_rows)
                                       .flag("is_aligned", spec.is_aligned)
                                       .flag("has_rope", spec.has_rope)
                                       .str()};
}

KernelSpec merge_spec(Element element) {
  return {"attention_decode_merge", InstanceText("AttentionDecodeMerge", "AttentionDecodeMergeSpec", element).str()};
}

// Heads that are divided together: without those of other problems if the result must not depend on them.
double num_heads_at_once(const AttentionDecodeProblem& problem) {
  // In double: the product may not fit 64 bits.
  return static_cast<double>(problem.num_kv_heads) * static_cast<double>(row_tiles_of(problem).count) *
         static_cast<double>(problem.batch_invariant ? 1 : product_of(problem.lead));
}

// Into how many shares, a power of 2, the keys of one KV head are divided, a block for each: as many as keep a large
// GPU of 100 to 150 multiprocessors busy together with the other heads, unless a warp would be left with less than two
// tiles. 64 blocks are enough for the memory's bandwidth, and more than one cluster for a head costs a second launch:
// beyond, there are more only for a few heads with many keys. The same on every GPU, because the size of the workspace
// depends on it.
int64_t num_shares(const AttentionDecodeProblem& problem) {
  constexpr int64_t kTileKeys = 16;
  struct Limits {
    double enough_blocks;
    int64_t least_tiles;  // of a share
  };
  constexpr Limits kInOneCluster = {100, 8}, kBeyond = {64, 64};
  const int64_t num_tiles = (problem.kv_len - first_key_of(problem) + kTileKeys - 1) / kTileKeys;
  const double num_heads = num_heads_at_once(problem);
  int64_t shares = 1;
  while (true) {
    const Limits& limits = shares < kMaxDecodeCluster ? kInOneCluster : kBeyond;
    if (num_heads * static_cast<double>(shares) >= limits.enough_blocks) break;
    if (num_tiles <= shares * limits.least_tiles) break;
    shares *= 2;
  }
  return shares;
}

// One of the two main kernels and, on each device, the largest cluster for it.
struct MainVariant : Variant {
  std::array<std::atomic<int8_t>, 64> cluster_log2_plus_1{};

  // A cluster takes all shares, or as many as the device can run in one.
  int cluster_log2_on(const LoadedKernel& kernel, int device, int64_t shares) {
    std::atomic<int8_t>& known = cluster_log2_plus_1[static_cast<size_t>(device)];
    if (const int8_t value = known.load(std::memory_order_acquire); value != 0) return value - 1;
    int log2 = 0;
    while ((int64_t{2} << log2) <= std::min<int64_t>(shares, kMaxDecodeCluster)) ++log2;
    while (log2 > 0 && max_active_clusters(kernel, device, 1 << log2) == 0) --log2;
    known.store(static_cast<int8_t>(log2 + 1), std::memory_order_release);
    return log2;
  }
};

struct Prepared {
  Sm80AttentionDecodeRopeParams params{};
  std::array<MainVariant, 2> variants;  // unaligned, aligned
  Variant merge;
  int64_t shares = 1, num_heads = 0;  // blocks: their product
};

void set_operand(DecodeOperand& operand, const TensorView& view, Axes axes) {
  operand = {};
  if (!view.defined()) return;
  operand.data = static_cast<char*>(view.data);
  int axis = view.rank - static_cast<int>(axes.size());
  for (long long DecodeOperand::*member : axes) {
    operand.*member = stride_of(view, axis++) * info(view.dtype).size_bytes;
  }
}

void set_operands(Sm80AttentionDecodeParams& params, const AttentionDecodeProblem& problem,
                  const SingleDecodeArgs& args) {
  const Axes kv_axes = problem.kv_layout == KvLayout::kNHD ? kNhdAxes : kHndAxes;
  set_operand(params.q, args.q, kRowAxes);
  set_operand(params.k, args.k, kv_axes);
  set_operand(params.v, args.v, kv_axes);
  // Keys that the query does not see are left out.
  params.k.data += params.first_key * params.k.token_bytes;
  params.v.data += params.first_key * params.v.token_bytes;
  set_operand(params.sinks, args.sinks, kHeadAxes);
  set_operand(params.alibi_slopes, args.alibi_slopes, kHeadAxes);
  set_operand(params.out, args.out, kRowAxes);
  set_operand(params.lse, args.lse, kHeadAxes);
  params.workspace = static_cast<float*>(args.workspace.data);
  if (params.has_lead == 0) return;
  // In the order of DecodeOperandIndex.
  const std::array<const TensorView*, kNumDecodeOperands> views = {
      &args.q, &args.k, &args.v, &args.sinks, &args.alibi_slopes, &args.out, &args.lse};
  params.lead = merged_axes<kNumDecodeOperands>(problem.lead, 0, views);
  for (int i = 0; i < kNumDecodeOperands; ++i) {
    const int64_t bytes = info(views[i]->dtype).size_bytes;
    for (long long& stride : params.lead.strides[i]) stride *= bytes;
  }
}

bool are_aligned(const SingleDecodeArgs& args) {
  return is_aligned(args.q) && is_aligned(args.k) && is_aligned(args.v) && is_aligned(args.out);
}

bool are_aligned_when_packed(const AttentionDecodeProblem& problem) {
  return fills_chunks(problem.head_dim_qk, problem.dtype) && fills_chunks(problem.head_dim_v, problem.dtype);
}

int cluster_log2_on(const Prepared& prepared, MainVariant& variant, const LoadedKernel& kernel, int device) {
  return prepared.shares == 1 ? 0 : variant.cluster_log2_on(kernel, device, prepared.shares);
}

// `Params`: with the angles or without.
template <class Params>
void launch_kernels(const AttentionDecodeProblem& problem, const SingleDecodeArgs& args, Prepared& prepared) {
  Params params = prepared.params;
  set_operands(params, problem, args);
  const int device = args.q.device.index;
  MainVariant& variant = prepared.variants[are_aligned_when_packed(problem) && are_aligned(args) ? 1 : 0];
  const LoadedKernel& kernel = variant.load_on(device);
  params.cluster_log2 = cluster_log2_on(prepared, variant, kernel, device);
  params.num_pieces = make_divisor(static_cast<unsigned>(prepared.shares >> params.cluster_log2));
  launch(kernel,
         {.grid_x = prepared.num_heads * prepared.shares, .stream = args.stream, .cluster_x = 1 << params.cluster_log2},
         &params);
  if (params.num_pieces.divisor == 1) return;
  constexpr int kOverlapsSince = 90;
  launch(prepared.merge.load_on(device),
         {.grid_x = problem.num_heads_in_all(),
          .stream = args.stream,
          .overlaps_previous = compute_capability(device) >= kOverlapsSince},
         static_cast<const Sm80AttentionDecodeParams*>(&params));
}

}  // namespace

std::string sm80_attention_decode_declines(const AttentionDecodeProblem& problem, const Target& target) {
  if (std::string reason = gpu_declines(target); !reason.empty()) return reason;
  constexpr int64_t kMaxLength = int64_t{1} << 30;
  if (std::max(problem.kv_len, problem.num_q_heads) > kMaxLength) {
    return "counts keys and heads up to 2^30, and this call has more";
  }
  // In double: the product may not fit 64 bits.
  const double heads = static_cast<double>(problem.num_heads_in_all());
  if (heads * static_cast<double>(num_shares(problem)) > static_cast<double>(kMaxGridBlocks)) {
    return "launches up to 2^31 - 1 blocks, one or more for each head, and this call needs more";
  }
  return "";
}

int64_t sm80_attention_decode_workspace(const AttentionDecodeProblem& problem) {
  return decode_workspace(static_cast<int>(num_shares(problem)), static_cast<int>(problem.head_dim_v)).floats;
}

std::shared_ptr<void> prepare_sm80_attention_decode(const AttentionDecodeProblem& problem) {
  auto prepared = std::make_shared<Prepared>();
  Sm80AttentionDecodeRopeParams& params = prepared->params;
  const RowTiles row_tiles = row_tiles_of(problem);
  params.has_lead = product_of(problem.lead) > 1 ? 1 : 0;
  params.num_kv_heads = make_divisor(static_cast<unsigned>(std::max<int64_t>(problem.num_kv_heads, 1)));
  params.group = problem.num_kv_heads == 0 ? 1 : static_cast<int>(problem.num_q_heads / problem.num_kv_heads);
  params.head_dim_qk = static_cast<int>(problem.head_dim_qk);
  params.head_dim_v = static_cast<int>(problem.head_dim_v);
  params.row_tiles = make_divisor(static_cast<unsigned>(row_tiles.count));
  params.first_key = static_cast<int>(first_key_of(problem));
  params.num_keys = static_cast<int>(problem.kv_len) - params.first_key;
  params.scale = static_cast<float>(problem.softmax_scale);
  if (problem.softcap > 0.0 && problem.softcap < 1e30) {  // beyond, a cap changes no float32 score
    constexpr double kSmallest = std::numeric_limits<float>::min(), kLargest = std::numeric_limits<float>::max();
    params.softcap = static_cast<float>(std::max(problem.softcap, kSmallest));
    params.scale_over_cap =
        static_cast<float>(std::clamp(problem.softmax_scale / problem.softcap, -kLargest, kLargest));
  }
  if (problem.has_rope) {
    const RopeOptions options{.scale = problem.rope_scale, .theta = problem.rope_theta};
    const std::vector<double> frequencies = rope_frequencies(problem.head_dim_qk, options);
    std::transform(frequencies.begin(), frequencies.end(), params.turns, fraction_of_turn);
  }
  prepared->shares = num_shares(problem);
  prepared->num_heads = product_of(problem.lead) * problem.num_kv_heads * row_tiles.count;
  for (const bool is_aligned : {false, true}) {
    prepared->variants[is_aligned ? 1 : 0].spec = to_kernel_spec(make_spec(problem, is_aligned));
  }
  prepared->merge.spec = merge_spec(element_of(problem.dtype));
  return prepared;
}

void load_sm80_attention_decode(const AttentionDecodeProblem& problem, void* prepared, int device) {
  auto& state = *static_cast<Prepared*>(prepared);
  MainVariant& variant = state.variants[are_aligned_when_packed(problem) ? 1 : 0];
  const int cluster_log2 = cluster_log2_on(state, variant, variant.load_on(device), device);
  if (state.shares >> cluster_log2 > 1) state.merge.load_on(device);
}

void sm80_attention_decode(const AttentionDecodeProblem& problem, const SingleDecodeArgs& args, void* prepared) {
  if (problem.num_heads_in_all() == 0) return;
  auto& state = *static_cast<Prepared*>(prepared);
  if (problem.has_rope) {
    launch_kernels<Sm80AttentionDecodeRopeParams>(problem, args, state);
  } else {
    launch_kernels<Sm80AttentionDecodeParams>(problem, args, state);
  }
}

std::vector<KernelSpec> sm80_attention_decode_common_specs() {
  std::vector<KernelSpec> specs;
  const auto add = [&](Element element, int head_dim, int query_rows, bool has_rope = false) {
    specs.push_back(to_kernel_spec({.element = element,
                                    .head_dim_qk = head_dim,
                                    .head_dim_v = head_dim,
                                    .query_rows = query_rows,
                                    .has_rope = has_rope}));
  };
  for (const Element element : {Element::kBFloat16, Element::kFloat16, Element::kFloat32}) {
    specs.push_back(merge_spec(element));
    for (const int head_dim : {64, 128}) add(element, head_dim, 8);
    add(element, 128, 8, true);
  }
  for (const Element element : {Element::kBFloat16, Element::kFloat16}) add(element, 128, 16);
  for (const int head_dim : {96, 256}) add(Element::kBFloat16, head_dim, 8);
  return specs;
}

}  // namespace heed::cuda
