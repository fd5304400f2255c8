// CPU attention of one query over a KV cache.
//
// Where the time and the bytes go
// -------------------------------
// Every key and value is read once for 2 to 4 operations per query head of its group: memory is the limit, and the
// kernel has to keep enough of it in flight. (The attention forward kernel has query rows on its lanes; one row per
// head leaves most of them idle, and packing K and V costs as much as reading them.)
//
// Items are chunks of at least 256 keys, at most 64 of them, of all KV heads where a token's heads lie side by side
// (NHD: an item then reads one contiguous piece of memory, as hardware prefetchers like it), of one where a head's
// tokens do (HND); of fewer heads if there would be too few items for the threads. A chunk's sums, Dv + 2 floats per
// query head, go to the workspace, and a second loop merges them in their order.
//
// Within an item: blocks of 32 keys, and per block the KV heads, and per head its group in tiles of 4 query heads, so
// that a vector of K or V is loaded (and converted, if it is 16 bits wide) once for 4 multiply-adds. Scores are dot
// products with the head dim on lanes; 4 sums are reduced together, by interleaving. K and V are used where they lie.
// They are copied to a block of float32 first (32 rows, 16 KB at head dim 128: L1) where rows are not adjacent elements
// or no whole vectors, where 16-bit elements are used by several tiles, and where keys are rotated: cosines and sines
// are computed once per key for all heads of the item.
//
// Memory per thread: q and sums of the item's query heads, 2 blocks of 32 x 272 floats, 32 KiB of rotations.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_decode.cc"
#include "cpu/simd.h"
// clang-format off
#include "hwy/foreach_target.h"
#include "cpu/attention_decode-inl.h"
// clang-format on

#if HWY_ONCE

#include <cstdlib>

#include "core/dtype.h"
#include "cpu/attention_decode.h"
#include "cpu/cpu_only.h"

namespace heed::cpu {
namespace {

constexpr int64_t kItemsPerThread = 4;

// The axes after the `lead` leading ones, outermost first.
DecodeTensor decode_tensor(const TensorView& view, size_t lead, std::initializer_list<int64_t DecodeTensor::*> axes) {
  DecodeTensor tensor;
  if (!view.defined()) return tensor;
  tensor.data = view.data;
  size_t axis = lead;
  for (int64_t DecodeTensor::*stride : axes) tensor.*stride = view.strides[axis++];
  return tensor;
}

int64_t choose_heads_per_item(const DecodePlan& plan) {
  const DecodeTensor& k = plan.tensors[DecodePlan::kK];
  const bool are_tokens_adjacent = std::abs(k.token) < std::abs(k.head);
  if (are_tokens_adjacent && !plan.has_rope) return 1;  // rotations are shared by an item's heads
  const int64_t items = plan.walk.num_rows() * plan.chunks.count;
  return std::clamp<int64_t>(plan.num_kv_heads * items / (kItemsPerThread * num_threads()), 1, plan.num_kv_heads);
}

}  // namespace

HWY_EXPORT(attention_decode_run);

DecodeChunks make_chunks(int64_t kv_len, int64_t window_left) {
  DecodeChunks chunks;
  chunks.first_key = window_left < 0 || window_left >= kv_len ? 0 : kv_len - 1 - window_left;
  chunks.num_keys = kv_len - chunks.first_key;
  constexpr int64_t kStep = 64;
  const int64_t even_share = (chunks.num_keys + kMaxChunks - 1) / kMaxChunks;
  chunks.keys_per_chunk = std::max(kMinChunkKeys, (even_share + kStep - 1) / kStep * kStep);
  chunks.count = std::max<int64_t>(1, (chunks.num_keys + chunks.keys_per_chunk - 1) / chunks.keys_per_chunk);
  return chunks;
}

int64_t DecodePlan::num_bytes() const {
  return walk.num_rows() * chunks.num_keys * num_kv_heads * (head_dim_qk + head_dim_v) * info(dtype).size_bytes;
}

std::string attention_decode_declines(const AttentionDecodeProblem& /*problem*/, const Target& target) {
  return declines_other_targets(target);
}

int64_t attention_decode_workspace(const AttentionDecodeProblem& problem) {
  const int64_t chunks = make_chunks(problem.kv_len, problem.window_left).count;
  return chunks > 1 ? chunks * (problem.head_dim_v + 2) : 0;
}

void attention_decode(const AttentionDecodeProblem& problem, const SingleDecodeArgs& args) {
  using Axes = std::initializer_list<int64_t DecodeTensor::*>;
  using Plan = DecodePlan;
  const size_t lead = problem.lead.size();
  const auto nhd = Axes{&DecodeTensor::token, &DecodeTensor::head, &DecodeTensor::dim};
  const auto hnd = Axes{&DecodeTensor::head, &DecodeTensor::token, &DecodeTensor::dim};
  const auto kv_axes = problem.kv_layout == KvLayout::kNHD ? nhd : hnd;
  const auto head_rows = Axes{&DecodeTensor::head, &DecodeTensor::dim};
  const auto heads = Axes{&DecodeTensor::head};
  const Plan::Walk walk(problem.lead, {row_strides(args.q, lead), row_strides(args.k, lead), row_strides(args.v, lead),
                                       row_strides(args.sinks, lead), row_strides(args.alibi_slopes, lead),
                                       row_strides(args.out, lead), row_strides(args.lse, lead)});
  if (walk.num_rows() == 0 || problem.num_kv_heads == 0) return;
  Plan plan{problem.dtype,
            walk,
            {decode_tensor(args.q, lead, head_rows), decode_tensor(args.k, lead, kv_axes),
             decode_tensor(args.v, lead, kv_axes), decode_tensor(args.sinks, lead, heads),
             decode_tensor(args.alibi_slopes, lead, heads), decode_tensor(args.out, lead, head_rows),
             decode_tensor(args.lse, lead, heads)},
            problem.kv_len,
            problem.num_kv_heads,
            problem.num_q_heads / problem.num_kv_heads,
            static_cast<int>(problem.head_dim_qk),
            static_cast<int>(problem.head_dim_v),
            make_chunks(problem.kv_len, problem.window_left),
            1,
            args.workspace.defined() ? static_cast<float*>(args.workspace.data) : nullptr,
            static_cast<float>(problem.softmax_scale),
            make_soft_cap(problem.softcap, problem.softmax_scale),
            problem.has_rope,
            {}};
  plan.heads_per_item = choose_heads_per_item(plan);
  if (plan.has_rope) {
    RopeOptions options;
    options.scale = problem.rope_scale;
    options.theta = problem.rope_theta;
    plan.frequencies = make_frequencies(problem.head_dim_qk, options);
  }
  HEED_DYNAMIC_DISPATCH(attention_decode_run)(plan);
}

}  // namespace heed::cpu

#endif  // HWY_ONCE
