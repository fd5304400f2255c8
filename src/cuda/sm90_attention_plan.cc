#include "cuda/sm90_attention_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/dtype.h"
#include "cuda/attention_host.h"
#include "variants/band.h"

namespace heed::cuda {
namespace {

// Multiprocessors of an H100 or H200. How tiles are cut follows from the GPU's number of them, but the kernel and the
// size of the workspace from the problem alone: they are planned for this many, and a GPU that needs more slots cuts
// none.
constexpr int64_t kPlannedBlocks = 132;

// As the kernel counts them (StepsOf::touching).
int64_t num_steps_touching(const variants::Range& keys, int64_t kv_rows) {
  return keys.empty() ? 0 : (keys.end - 1) / kv_rows - keys.begin / kv_rows + 1;
}

// What a problem takes with whole tiles, in products of a query row and a key; only the ratio of two tiles counts. Tall
// tiles have steps that are faster by a constant factor and rows that take as long as some more keys: both as measured
// (docs/kernel-notes.md).
double time_of_whole_tiles(const AttentionProblem& problem, const Sm90AttentionFwdSpec& spec) {
  constexpr double kTallStep = 0.86, kTallRow = 150.0;
  constexpr int64_t kMostSamples = 256;
  const Sm90AttentionFwdTile tile = sm90_attention_fwd_tile(spec);
  const double rows = tile.q_rows();
  // Packed sequences, whose lengths only the device knows: the mean length, and half a tile for each one's end.
  const int64_t num_sequences = problem.is_varlen ? std::max<int64_t>(problem.batch, 1) : 1;
  const int64_t q_len = problem.q_len / num_sequences, kv_len = problem.kv_len / num_sequences;
  const int64_t num_tiles = (q_len + tile.q_rows() - 1) / tile.q_rows();
  const double tiles_of_head =
      problem.is_varlen ? static_cast<double>(q_len) / rows + 0.5 : static_cast<double>(num_tiles);
  const variants::Band band = variants::make_band(q_len, kv_len, problem.window_left, problem.window_right,
                                                  problem.causal_align == CausalAlign::kBottomRight);
  double sum = 0.0, longest = 0.0;
  const int64_t num_samples = std::min(num_tiles, kMostSamples);
  for (int64_t i = 0; i < num_samples; ++i) {
    const int64_t begin = i * num_tiles / num_samples * tile.q_rows();
    const variants::Range keys =
        variants::intersect(band.keys_of_any({begin, std::min(begin + tile.q_rows(), q_len)}), {0, kv_len});
    if (keys.empty()) continue;
    const double products = rows * static_cast<double>(num_steps_touching(keys, tile.kv_rows) * tile.kv_rows);
    const double time = spec.is_tall ? kTallStep * products + kTallRow * rows : products;
    sum += time;
    longest = std::max(longest, time);
  }
  if (num_samples == 0) return 0.0;
  const double num_heads =
      static_cast<double>(problem.num_heads_in_all()) * static_cast<double>(problem.is_varlen ? num_sequences : 1);
  const double all = sum / static_cast<double>(num_samples) * tiles_of_head * num_heads;
  // Blocks take the longest tiles first. Equal ones, of which a mask leaves each head one, come in waves.
  if ((spec.has_mask && num_tiles > 1) || problem.is_varlen) return std::max(all / kPlannedBlocks, longest);
  return std::ceil(tiles_of_head * num_heads / kPlannedBlocks) * longest;
}

// What a step takes while so many blocks of all are at work, each `num_alike`-th on keys of its own: where these do not
// stay in L2, all blocks together read what memory delivers in a longer time than a step's.
double time_of_step(const Sm90Tiles& tiles, double num_tiles, double share_of_blocks, double num_alike) {
  constexpr double kStepFromMemory = 1.55, kL2Bytes = 32 << 20;
  const auto alike = static_cast<double>(tiles.num_alike);
  if (std::ceil(num_tiles / alike) * tiles.kv_bytes <= kL2Bytes) return 1.0;
  return std::max(1.0, kStepFromMemory * share_of_blocks / num_alike);
}

// Tiles that are taken whole, round by round: those that read the same keys do so at once.
double time_of_rounds(const Sm90Tiles& tiles, double num_tiles, int64_t num_blocks) {
  const auto blocks = static_cast<double>(num_blocks);
  const double full = std::floor(num_tiles / blocks), rest = num_tiles - full * blocks;
  const auto alike = static_cast<double>(tiles.num_alike);
  double steps = full * time_of_step(tiles, num_tiles, 1.0, alike);
  if (rest > 0) steps += time_of_step(tiles, rest, rest / blocks, std::min(alike, rest));
  return steps * static_cast<double>(tiles.num_steps);
}

// The keys that any row sees; of packed sequences, all.
variants::Range keys_of(const AttentionProblem& problem) {
  if (problem.is_varlen || problem.q_len == 0) return {0, problem.kv_len};
  return sm90_attention_fwd_keys(problem.q_len, problem.kv_len, problem.window_left, problem.window_right,
                                 problem.causal_align == CausalAlign::kBottomRight);
}

// Whether some row does not see some key. One query under a causal mask sees all.
bool hides_keys(const AttentionProblem& problem) {
  if (problem.window_left < 0 && problem.window_right < 0) return false;
  if (problem.is_varlen || problem.q_len == 0 || problem.kv_len == 0) return true;
  const variants::Band band =
      variants::make_band(problem.q_len, problem.kv_len, problem.window_left, problem.window_right,
                          problem.causal_align == CausalAlign::kBottomRight);
  const variants::Range keys = band.keys_of_all({0, problem.q_len});
  return keys.begin > 0 || keys.end < problem.kv_len;
}

int64_t group_of(const AttentionProblem& problem) {
  return problem.num_q_heads / std::max<int64_t>(problem.num_kv_heads, 1);
}

double kv_bytes_of(const AttentionProblem& problem, int64_t num_keys) {
  return static_cast<double>(num_keys) * static_cast<double>(problem.head_dim_qk + problem.head_dim_v) *
         static_cast<double>(info(problem.dtype).size_bytes);
}

// Heads share tiles where that takes less time: a wave of tiles, one on each multiprocessor, takes about as long
// whatever number of their rows are there, and fewer tiles can be cut into more parts. They do not where they would
// only leave multiprocessors idle; among packs that take as long, the fewest tiles read the least.
struct Packing {
  Sm90Plan plan;
  double time = 0.0;  // as Sm90Cut's
};

Packing pack_heads(const AttentionProblem& problem, const Sm90AttentionFwdSpec& spec) {
  const Sm90AttentionFwdTile tile = sm90_attention_fwd_tile(spec);
  const bool can_pack = !spec.is_varlen && !spec.has_segment_ids && !spec.has_alibi && !spec.is_tall &&
                        problem.q_len <= tile.q_rows() / 2 && problem.num_kv_heads > 0;
  const variants::Range keys = keys_of(problem);
  Packing best;
  for (int shift = 0; 1 << shift <= kMostPackedHeads && group_of(problem) % (1 << shift) == 0; ++shift) {
    if (shift > 0 && !can_pack) break;
    const int64_t tiles_of_pack = num_row_tiles(problem, problem.q_len << shift, tile.q_rows());
    Packing packing{{spec, shift, {}, 0}, 0.0};
    Sm90Tiles& tiles = packing.plan.tiles;
    tiles = {.num_tiles = static_cast<double>(problem.num_heads_in_all() >> shift) * static_cast<double>(tiles_of_pack),
             .num_steps = num_steps_touching(keys, tile.kv_rows),
             .num_alike = std::max<int64_t>(tiles_of_pack * (group_of(problem) >> shift), 1),
             .kv_bytes = kv_bytes_of(problem, keys.empty() ? 0 : keys.end - keys.begin),
             .head_dims = static_cast<double>(problem.head_dim_qk + problem.head_dim_v)};
    packing.time = time_of_rounds(tiles, tiles.num_tiles, kPlannedBlocks);
    const bool are_equal = !hides_keys(problem) || tiles_of_pack == 1;
    if (may_split(spec) && are_equal && tiles.num_tiles <= std::numeric_limits<int32_t>::max()) {
      const Sm90Cut cut = cut_tiles(tiles, kPlannedBlocks);
      packing.plan.num_slots = num_slots_of(cut, static_cast<int64_t>(tiles.num_tiles));
      packing.time = cut.time;
    }
    const bool pays = packing.time < best.time || (best.plan.head_shift > 0 && packing.time == best.time &&
                                                   tiles.num_tiles < best.plan.tiles.num_tiles);
    if (shift == 0 || pays) best = packing;
  }
  best.plan.spec.packs_heads = best.plan.head_shift > 0;
  best.plan.spec.splits_steps = best.plan.num_slots > 0;
  return best;
}

// The kernel's variant of a problem, but for whether it packs, splits and is tall.
Sm90AttentionFwdSpec make_plain_spec(const AttentionProblem& problem) {
  Sm90AttentionFwdSpec spec;
  spec.element = element_of(problem.dtype);
  spec.head_dim_qk = static_cast<int>(problem.head_dim_qk);
  spec.head_dim_v = static_cast<int>(problem.head_dim_v);
  spec.is_varlen = problem.is_varlen;
  spec.has_segment_ids = problem.has_segment_ids;
  spec.has_softcap = caps_scores(problem);
  spec.has_alibi = problem.has_alibi;
  spec.scales_first = scales_first(problem);
  // Without a mask, scores that are transformed would spill at head dim 128; with one that hides nothing they do not.
  spec.has_mask = hides_keys(problem) || spec.has_score_transform();
  return spec;
}

}  // namespace

// Parts cost: some steps' time to leave them, to look for those of others and to merge them, and a share of it for each
// part of a tile. So a tile is cut the finer the more steps it has; and with few tiles beyond the last full round, that
// round's are cut too, in longer parts. Parts of tiles that read the same keys do so at different times. Costs as
// measured at head dim 128 (docs/kernel-notes.md); steps of others are shorter or longer.
Sm90Cut cut_tiles(const Sm90Tiles& tiles, int64_t num_blocks) {
  const auto num_tiles = static_cast<int64_t>(tiles.num_tiles);
  const auto steps = static_cast<double>(tiles.num_steps), blocks = static_cast<double>(num_blocks);
  const double steps_of_part = 128.0 / tiles.head_dims;
  Sm90Cut best{num_tiles, 0, time_of_rounds(tiles, tiles.num_tiles, num_blocks)};
  if (num_tiles % num_blocks == 0) return best;
  const int64_t parts_of_tile =
      std::min<int64_t>(static_cast<int64_t>(std::sqrt(steps / steps_of_part)), kSm90MaxPartsOfTile - 1);
  const int64_t num_rounds = num_tiles / num_blocks;
  double least = best.time - 1.0;  // for less it is not worth its workspace
  for (const int64_t rounds : {num_rounds, num_rounds - 1}) {
    const int64_t whole = rounds * num_blocks, rest = num_tiles - whole;
    const int64_t parts = std::min(num_blocks, rest * parts_of_tile);
    if (rounds < 0 || parts == 0 || parts == rest) continue;
    if (tiles.num_steps > std::numeric_limits<uint32_t>::max() / (rest * parts)) continue;
    const double parts_here = static_cast<double>(parts) / static_cast<double>(rest);  // of a tile
    const double step = time_of_step(tiles, static_cast<double>(rest), static_cast<double>(parts) / blocks, 1.0);
    const double time = time_of_rounds(tiles, static_cast<double>(whole), num_blocks) +
                        step * std::ceil(steps / parts_here) + steps_of_part * (12 + parts_here + 1);
    if (time < least) {
      least = time;
      best = {whole, parts, time};
    }
  }
  return best;
}

int64_t num_slots_of(const Sm90Cut& cut, int64_t num_tiles) {
  return cut.num_parts == 0 ? 0 : num_tiles - cut.num_whole_tiles + cut.num_parts - 1;
}

bool may_split(const Sm90AttentionFwdSpec& spec) {
  return !spec.is_varlen && !spec.has_segment_ids && !spec.has_score_transform() &&
         sm90_attention_fwd_tile(spec).has_q_in_registers;
}

Sm90Plan plan_sm90_attention_fwd(const AttentionProblem& problem) {
  const Sm90AttentionFwdSpec spec = make_plain_spec(problem);
  const Packing packing = pack_heads(problem, spec);
  if (spec.has_tall_tile() && packing.plan.head_shift == 0) {
    const Sm90Tiles& tiles = packing.plan.tiles;
    double time = time_of_whole_tiles(problem, spec);
    if (packing.plan.num_slots > 0) time *= packing.time / time_of_rounds(tiles, tiles.num_tiles, kPlannedBlocks);
    Sm90AttentionFwdSpec tall = spec;
    tall.is_tall = true;
    if (time_of_whole_tiles(problem, tall) < time) return pack_heads(problem, tall).plan;
  }
  return packing.plan;
}

// One-sided, some tiles are longer than others: a section is a few heads, whose K and V stay in L2, from its longest
// tiles to its shortest ones. Short sequences: small sections mix long tiles with short ones, and the last heads are
// one section, so that the last tiles of all are short. A window moves on: tiles of all heads at one place read the
// same few keys (docs/kernel-notes.md).
TileOrder order_of(const AttentionProblem& problem, int64_t num_heads, int q_rows) {
  if (problem.is_varlen || problem.window_right < 0) return {};
  constexpr double kSectionBytes = 32 << 20;
  constexpr int64_t kTailTiles = 512, kMostTailHeads = 64, kMostTailTiles = 16;
  const bool is_window = problem.window_left >= 0;
  const int64_t num_tiles = num_row_tiles(problem, problem.q_len, q_rows);
  const int64_t num_keys = is_window
                               ? std::min(problem.kv_len, std::min(problem.window_left, problem.kv_len) +
                                                              std::min(problem.window_right, problem.kv_len) + q_rows)
                               : problem.kv_len;
  const double kv_bytes =
      std::max(kv_bytes_of(problem, num_keys) / static_cast<double>(std::max<int64_t>(group_of(problem), 1)), 1.0);
  const int64_t fitting = std::max<int64_t>(static_cast<int64_t>(kSectionBytes / kv_bytes), 1);
  TileOrder order;
  if (is_window) {
    order.section_heads = std::clamp<int64_t>(problem.num_q_heads, 1, fitting);
    return order;
  }
  order.section_heads =
      std::clamp<int64_t>(num_tiles <= 4 ? 1 : std::min(num_tiles / 2, fitting), 1, std::max<int64_t>(num_heads, 1));
  if (num_tiles > 0 && num_tiles <= kMostTailTiles) {
    order.tail_heads = std::min({kMostTailHeads, kTailTiles / num_tiles, num_heads});
  }
  return order;
}

}  // namespace heed::cuda
