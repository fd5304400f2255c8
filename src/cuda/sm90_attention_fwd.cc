// Host side of the Hopper attention forward kernel: which problems it serves, how it is specialised, its parameters and
// its launch. What it computes and how: device/sm90_attention_fwd.cuh.
#include "cuda/sm90_attention_fwd.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <mutex>
#include <random>
#include <string_view>

#include "core/dtype.h"
#include "cuda/attention_host.h"
#include "cuda/sm80_attention_fwd.h"
#include "cuda/sm90_attention_fwd_spec.h"
#include "cuda/sm90_attention_plan.h"
#include "cuda/tensor_map_host.h"

namespace heed::cuda {
namespace {

static_assert(kTensorMapColumns == kPartColumns);

constexpr int64_t kMaxTiles = std::numeric_limits<int32_t>::max();
constexpr int kQBoxRows = 64, kOutBoxRows = 16;  // what a warpgroup reads, what a warp writes
constexpr int64_t kCounterBytes = 16;
// Calls of no more tiles need no counter: on any Hopper GPU that is not divided, each block has one of them.
constexpr int64_t kFewTiles = 64;

// Head dims that there is a tile for.
struct HeadDims {
  int64_t qk, v;
};
constexpr HeadDims kHeadDims[] = {{64, 64}, {80, 80}, {96, 96}, {128, 128}, {192, 128}, {192, 192}, {256, 256}};

KernelSpec to_kernel_spec(const Sm90AttentionFwdSpec& spec) {
  return {"sm90_attention_fwd", InstanceText("Sm90AttentionFwd", "Sm90AttentionFwdSpec", spec.element)
                                    .number("head_dim_qk", spec.head_dim_qk)
                                    .number("head_dim_v", spec.head_dim_v)
                                    .flag("is_varlen", spec.is_varlen)
                                    .flag("has_mask", spec.has_mask)
                                    .flag("has_segment_ids", spec.has_segment_ids)
                                    .flag("has_softcap", spec.has_softcap)
                                    .flag("has_alibi", spec.has_alibi)
                                    .flag("scales_first", spec.scales_first)
                                    .flag("packs_heads", spec.packs_heads)
                                    .flag("splits_steps", spec.splits_steps)
                                    .flag("is_tall", spec.is_tall)
                                    .str()};
}

bool has_tile(int64_t head_dim_qk, int64_t head_dim_v) {
  return std::any_of(std::begin(kHeadDims), std::end(kHeadDims),
                     [&](const HeadDims& dims) { return dims.qk == head_dim_qk && dims.v == head_dim_v; });
}

std::string names_of_head_dims() {
  std::string names;
  for (const auto& [qk, v] : kHeadDims) {
    names += (names.empty() ? "" : ", ") + std::to_string(qk);
    if (v != qk) names += " with " + std::to_string(v) + " for v";
  }
  return names;
}

// The name of an operand of which some problems share rows and others do not; empty if there is none. Tensor maps have
// one axis of problems, which has one stride: 0 if all of them share them.
std::string_view partly_shared_operand(const AttentionProblem& problem) {
  for (const int index : {kQ, kK, kV}) {
    bool is_shared = false, is_divided = !problem.is_varlen && problem.batch > 1;
    for (size_t axis = 0; axis < problem.lead.size(); ++axis) {
      if (problem.lead[axis] == 1) continue;
      (problem.operands[index].shape[axis] == 1 ? is_shared : is_divided) = true;
    }
    if (is_shared && is_divided) return kAttentionOperandNames[index];
  }
  return "";
}

// The counter, then, from the next multiple of 128 on, the slots.
constexpr int64_t kSlotAlignment = 128;
char* slots_in(void* workspace) {
  char* end = static_cast<char*>(workspace) + kCounterBytes;
  return end + (kSlotAlignment - reinterpret_cast<uintptr_t>(end) % kSlotAlignment) % kSlotAlignment;
}

// What the kernel cannot do.
std::string cannot_serve(const AttentionProblem& problem) {
  if (problem.dtype == DType::kFloat32) return "multiplies bfloat16 and float16, and this call has float32";
  if (!has_tile(problem.head_dim_qk, problem.head_dim_v)) {
    return "has tiles for the head dims " + names_of_head_dims() + ", and this call has " +
           std::to_string(problem.head_dim_qk) +
           (problem.head_dim_v == problem.head_dim_qk ? "" : " with " + std::to_string(problem.head_dim_v) + " for v");
  }
  if (problem.is_varlen && num_problems(problem) != 1) {
    return "serves one packed batch at a time, and this call has " + std::to_string(num_problems(problem)) +
           " on its leading axes";
  }
  if (const std::string_view name = partly_shared_operand(problem); !name.empty()) {
    return "needs each of q, k and v to be either whole or shared along all leading axes and the batch, and " +
           std::string(name) + " is shared along some of them";
  }
  if (plan_sm90_attention_fwd(problem).tiles.num_tiles > static_cast<double>(kMaxTiles)) {
    return "counts up to 2^31 - 1 tiles of query rows, and this call has more";
  }
  return "";
}

struct Prepared {
  Sm90AttentionFwdParams params{};
  Sm90AttentionFwdTile tile{};
  Sm90Tiles tiles;
  int64_t num_slots = 0;       // that the workspace has; 0: the kernel does not split
  bool has_workspace = false;  // else nobody has looked at what may be given
  Variant variant;
  // The portable kernel, for operands that TMA cannot copy; made when one is met.
  std::once_flag fallback_once;
  std::shared_ptr<void> fallback;

  void* fallback_for(const AttentionProblem& problem) {
    std::call_once(fallback_once, [&] {
      const bool may_serve =
          problem.backend == Backend::kAuto && sm80_attention_fwd_declines(problem, parse_target("sm_90a")).empty();
      if (may_serve) fallback = prepare_sm80_attention_fwd(problem);
    });
    return fallback.get();
  }
};

// 96 bits that no other launch has, in this process or another one: what was drawn once, plus the launch's number. They
// tell the kernel whether its counter is from this launch or something that was in memory before. A CUDA graph replays
// the same ones, so the kernel leaves zeros behind.
void set_nonce(Sm90AttentionFwdParams& params) {
  struct Base {
    uint64_t low;
    uint32_t high;
    Base() {
      std::random_device random;
      low = uint64_t{random()} << 32 | random();
      high = random();
    }
  };
  static const Base base;
  static std::atomic<uint64_t> num_launches{0};
  const uint64_t low = base.low + num_launches.fetch_add(1, std::memory_order_relaxed);
  params.nonce[0] = static_cast<unsigned>(low);
  params.nonce[1] = static_cast<unsigned>(low >> 32);
  params.nonce[2] = base.high;
}

// The operand that TMA cannot copy, and why.
struct NamedMisfit {
  std::string_view name;
  Misfit misfit;
};

NamedMisfit make_maps(Sm90AttentionFwdParams& params, const AttentionProblem& problem,
                      const Sm90AttentionFwdTile& tile) {
  struct Row {
    std::string_view name;
    TensorMap& map;
    const DeviceOperand& operand;
    int64_t num_tokens, num_heads, head_dim;
    int box_rows;
    int64_t packed_heads = 1;
  };
  const int64_t packed = int64_t{1} << params.head_shift;
  const Row rows[] = {
      {"q", params.q_map, params.q, problem.q_len, problem.num_q_heads, problem.head_dim_qk, kQBoxRows, packed},
      {"out", params.out_map, params.out, problem.q_len, problem.num_q_heads, problem.head_dim_v, kOutBoxRows, packed},
      {"k", params.k_map, params.k, problem.kv_len, problem.num_kv_heads, problem.head_dim_qk, tile.kv_rows},
      {"v", params.v_map, params.v, problem.kv_len, problem.num_kv_heads, problem.head_dim_v, tile.kv_rows},
  };
  const Element element = element_of(problem.dtype);
  for (const Row& row : rows) {
    if (row.num_tokens == 0) {  // no keys: nobody reads this map, and there may be no memory
      row.map = params.q_map;
      continue;
    }
    const MappedOperand mapped{row.operand,  element,      row.num_tokens,  row.num_heads,
                               row.head_dim, row.box_rows, row.packed_heads};
    const Misfit misfit =
        problem.is_varlen ? make_ragged_map(row.map, mapped) : make_dense_map(row.map, mapped, params);
    if (misfit.exists()) return {row.name, misfit};
  }
  return {};
}

[[noreturn]] void refuse(const NamedMisfit& found) {
  throw ValueError(std::string(found.name) + ": got " + std::string(found.misfit.got) + ", expected " +
                   std::string(found.misfit.expected) +
                   ", because sm90_attention_fwd copies with TMA (sm80, or no "
                   "backend at all, takes any strides)");
}

}  // namespace

std::string sm90_attention_fwd_declines(const AttentionProblem& problem, const Target& target) {
  if (target.is_cpu || (target.sm != 0 && target.sm != 90)) {
    return "needs an NVIDIA Hopper GPU (sm_90a), and the target is " + target.name;
  }
  const std::string reason = gpu_attention_declines(problem, target);
  return reason.empty() ? cannot_serve(problem) : reason;
}

int64_t sm90_attention_fwd_workspace(const AttentionProblem& problem) {
  const Sm90Plan plan = plan_sm90_attention_fwd(problem);
  if (plan.num_slots == 0) return plan.tiles.num_tiles > static_cast<double>(kFewTiles) ? kCounterBytes / 4 : 0;
  const int64_t bytes = kSlotAlignment + plan.num_slots * sm90_attention_fwd_slot_bytes(plan.spec);
  const int64_t bytes_per_head = (bytes - 1) / problem.num_heads_in_all() + 1;
  return (bytes_per_head + kCounterBytes - 1) / kCounterBytes * kCounterBytes / 4;
}

std::shared_ptr<void> prepare_sm90_attention_fwd(const AttentionProblem& problem) {
  auto prepared = std::make_shared<Prepared>();
  const Sm90Plan plan = plan_sm90_attention_fwd(problem);
  prepared->variant.spec = to_kernel_spec(plan.spec);
  prepared->tiles = plan.tiles;
  prepared->num_slots = plan.num_slots;
  prepared->has_workspace = sm90_attention_fwd_workspace(problem) > 0;
  prepared->tile = sm90_attention_fwd_tile(plan.spec);
  Sm90AttentionFwdParams& params = prepared->params;
  params.head_shift = plan.head_shift;
  set_problem(params, problem, problem.num_q_heads >> params.head_shift, 0);
  const TileOrder order =
      plan.head_shift > 0 ? TileOrder{} : order_of(problem, params.num_heads, prepared->tile.q_rows());
  params.section_heads = static_cast<int>(order.section_heads);
  params.num_tail_heads = static_cast<unsigned>(order.tail_heads);
  const int64_t num_rows = problem.q_len << params.head_shift;
  params.num_tiles = static_cast<int>(num_row_tiles(problem, num_rows, prepared->tile.q_rows()));
  params.num_tiles_in_all = params.num_whole_tiles = static_cast<unsigned>(params.num_tiles) * params.num_heads;
  return prepared;
}

void load_sm90_attention_fwd(const AttentionProblem& /*problem*/, void* prepared, int device) {
  static_cast<Prepared*>(prepared)->variant.load_on(device);
  multiprocessor_count(device);  // asks the driver, which a launch does not
}

void sm90_attention_fwd(const AttentionProblem& problem, const AttentionForwardArgs& args, void* prepared) {
  auto& of_problem = *static_cast<Prepared*>(prepared);
  if (of_problem.params.num_heads == 0 || problem.q_len == 0) return;
  const DeviceScope scope(args.q.device.index);
  Sm90AttentionFwdParams params = of_problem.params;
  set_inputs(params, args, problem.is_varlen);
  set_operand(params.out, args.out, row_axes(problem.is_varlen));
  set_operand(params.lse, args.lse, statistic_axes(problem.is_varlen));
  if (const NamedMisfit found = make_maps(params, problem, of_problem.tile); found.misfit.exists()) {
    void* fallback = of_problem.fallback_for(problem);
    if (fallback == nullptr) refuse(found);
    sm80_attention_fwd(problem, args, fallback);
    return;
  }
  const LoadedKernel& kernel = of_problem.variant.load_on(args.q.device.index);
  const int64_t num_multiprocessors = std::max(multiprocessor_count(args.q.device.index), 1);
  void* workspace = of_problem.has_workspace ? args.workspace.data : nullptr;
  if (of_problem.num_slots > 0 && workspace != nullptr) {
    const Sm90Cut cut = cut_tiles(of_problem.tiles, num_multiprocessors);
    if (cut.num_parts > 0 && num_slots_of(cut, params.num_tiles_in_all) <= of_problem.num_slots) {
      params.num_whole_tiles = static_cast<unsigned>(cut.num_whole_tiles);
      params.num_tiles_in_all = static_cast<unsigned>(cut.num_whole_tiles + cut.num_parts);
      params.slots = slots_in(workspace);
      set_nonce(params);
    }
  }
  const int64_t num_blocks = std::min(num_multiprocessors, int64_t{params.num_tiles_in_all});
  if (num_blocks < int64_t{params.num_tiles_in_all} && workspace != nullptr) {
    params.next_tile = static_cast<unsigned*>(workspace);
    if (params.slots == nullptr) set_nonce(params);
  }
  launch(kernel, {.grid_x = num_blocks, .stream = args.stream, .overlaps_previous = true}, &params);
}

std::vector<KernelSpec> sm90_attention_fwd_common_specs() {
  std::vector<KernelSpec> specs;
  const auto add = [&](Element element, int head_dim, bool is_varlen, auto... change) {
    for (const bool has_mask : {false, true}) {
      Sm90AttentionFwdSpec spec{.element = element, .head_dim_qk = head_dim, .head_dim_v = head_dim};
      spec.is_varlen = is_varlen;
      spec.has_mask = has_mask;
      (change(spec), ...);
      if (spec.has_score_transform() && !has_mask) continue;  // no call has it
      if (!has_tile(spec.head_dim_qk, spec.head_dim_v)) continue;
      specs.push_back(to_kernel_spec(spec));
      const bool is_common = element == Element::kBFloat16 && (head_dim == 64 || head_dim == 128);
      spec.splits_steps = may_split(spec) && (is_common || !(spec.has_mask || spec.packs_heads));
      if (spec.splits_steps) specs.push_back(to_kernel_spec(spec));
    }
  };
  for (const Element element : {Element::kBFloat16, Element::kFloat16}) {
    for (const bool is_varlen : {false, true}) {
      for (const int head_dim : {64, 128}) add(element, head_dim, is_varlen);
      add(element, 64, is_varlen, [](Sm90AttentionFwdSpec& spec) { spec.is_tall = true; });
    }
  }
  for (const int head_dim : {80, 96, 192, 256}) add(Element::kBFloat16, head_dim, false);
  add(Element::kBFloat16, 192, false, [](Sm90AttentionFwdSpec& spec) { spec.head_dim_v = 128; });
  for (const int head_dim : {64, 128}) {
    add(Element::kBFloat16, head_dim, false, [](Sm90AttentionFwdSpec& spec) { spec.has_segment_ids = true; });
    add(Element::kBFloat16, head_dim, false, [](Sm90AttentionFwdSpec& spec) { spec.packs_heads = true; });
  }
  for (const int head_dim : {64, 128, 256}) {
    add(Element::kBFloat16, head_dim, false, [](Sm90AttentionFwdSpec& spec) { spec.has_softcap = true; });
  }
  return specs;
}

}  // namespace heed::cuda
