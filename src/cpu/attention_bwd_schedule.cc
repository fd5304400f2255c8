// Work items of the CPU attention backward kernel.
#include "cpu/attention_bwd_schedule.h"

#include <algorithm>

namespace heed::cpu {
namespace {

using variants::Range;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The part that holds item `index`, which then counts from the part's first.
const BackwardPart& find_part(const std::vector<BackwardPart>& parts, int64_t BackwardPart::*first, int64_t& index) {
  const auto after = std::upper_bound(parts.begin(), parts.end(), index,
                                      [&](int64_t value, const BackwardPart& part) { return value < part.*first; });
  const BackwardPart& part = *(after - 1);
  index -= part.*first;
  return part;
}

}  // namespace

BackwardSchedule::BackwardSchedule(const BackwardPlan& plan) : plan_(plan) {
  const ForwardPlan& forward = plan.forward;
  if (forward.is_varlen) {
    repeats_ = forward.num_kv_heads;
    for (int64_t problem = 0; problem < forward.num_problems; ++problem) add_sequences(problem);
  } else {
    repeats_ = forward.num_kv_heads * forward.num_problems;
    BackwardPart& all = parts_.emplace_back();
    all.sequence.queries = {0, forward.q_len};
    all.sequence.keys = {0, forward.kv_len};
  }
  for (BackwardPart& part : parts_) cut(part);
  // The most work first, so that what threads wait for at the end is short.
  std::stable_sort(parts_.begin(), parts_.end(),
                   [](const BackwardPart& a, const BackwardPart& b) { return a.cost > b.cost; });
  for (BackwardPart& part : parts_) {
    part.first_chunk_item = num_chunk_items_;
    part.first_block_item = num_block_items_;
    num_chunk_items_ += part.num_chunks * repeats_;
    num_block_items_ += part.num_blocks * repeats_;
  }
}

void BackwardSchedule::add_sequences(int64_t problem) {
  std::vector<Range> used;
  for_each_sequence(plan_.forward, problem, [&](const Sequence& sequence) {
    BackwardPart part;
    part.problem = problem;
    part.sequence = sequence;
    if (!sequence.keys.empty()) used.push_back(sequence.keys);
    if (part.kv_len() > 0 || sequence.first_query < part.q_len()) parts_.push_back(part);
  });
  std::sort(used.begin(), used.end(), [](Range a, Range b) { return a.begin < b.begin; });
  used.push_back({plan_.forward.kv_len, plan_.forward.kv_len});
  int64_t next = 0;
  for (const Range keys : used) {
    if (keys.begin > next) key_gaps_.push_back({problem, {next, keys.begin}});
    next = std::max<int64_t>(next, keys.end);
  }
}

void BackwardSchedule::cut(BackwardPart& part) {
  const ForwardPlan& forward = plan_.forward;
  const int64_t num_rows = (part.q_len() - part.sequence.first_query) * forward.group;
  part.num_blocks = divide_up(num_rows, kBlockRows);
  // Chunks of about the same size.
  const int64_t least_chunks = divide_up(part.kv_len(), plan_.max_chunk_keys);
  if (least_chunks > 0) {
    part.chunk_keys = divide_up(divide_up(part.kv_len(), least_chunks), kChunkStep) * kChunkStep;
    part.num_chunks = divide_up(part.kv_len(), part.chunk_keys);
  }
  const variants::Band band = forward.band(part.q_len(), part.kv_len());
  const int64_t middle = (part.sequence.first_query + part.q_len()) / 2;
  const Range seen = intersect(band.keys_of_any({middle, middle + 1}), {0, part.kv_len()});
  const double keys_per_row = 1.0 + static_cast<double>(seen.empty() ? 0 : seen.end - seen.begin);
  part.cost = static_cast<double>(num_rows) * keys_per_row;
  num_products_ += part.cost * static_cast<double>(repeats_) * (3.0 * forward.head_dim_qk + 2.0 * forward.head_dim_v);
}

BackwardItem BackwardSchedule::block_item(int64_t index) const {
  BackwardItem item;
  item.part = &find_part(parts_, &BackwardPart::first_block_item, index);
  const int64_t head = index / item.part->num_blocks;
  item.index = index % item.part->num_blocks;
  item.problem = item.part->problem + head / plan_.forward.num_kv_heads;
  item.kv_head = head % plan_.forward.num_kv_heads;
  return item;
}

// Heads before chunks: a chunk seldom has to wait for the one before it, and not at all on as many threads as heads.
BackwardItem BackwardSchedule::chunk_item(int64_t index) const {
  BackwardItem item;
  item.part = &find_part(parts_, &BackwardPart::first_chunk_item, index);
  const int64_t head = index % repeats_;
  item.index = index / repeats_;
  item.problem = item.part->problem + head / plan_.forward.num_kv_heads;
  item.kv_head = head % plan_.forward.num_kv_heads;
  return item;
}

RowBlock BackwardSchedule::row_block(const BackwardPart& part, int64_t block) const {
  const int64_t group = plan_.forward.group;
  RowBlock result;
  result.rows.begin = part.sequence.first_query * group + block * kBlockRows;
  result.rows.end = std::min<int64_t>(result.rows.begin + kBlockRows, part.q_len() * group);
  result.queries = {result.rows.begin / group, (result.rows.end - 1) / group + 1};
  const variants::Band band = plan_.forward.band(part.q_len(), part.kv_len());
  const Range keys = intersect(band.keys_of_any(result.queries), {0, part.kv_len()});
  if (!keys.empty()) result.chunks = {keys.begin / part.chunk_keys, (keys.end - 1) / part.chunk_keys + 1};
  return result;
}

Range BackwardSchedule::chunk_keys(const BackwardPart& part, int64_t chunk) const {
  const int64_t begin = chunk * part.chunk_keys;
  return {begin, std::min<int64_t>(begin + part.chunk_keys, part.kv_len())};
}

Range BackwardSchedule::blocks_of_chunk(const BackwardPart& part, int64_t chunk) const {
  const variants::Band band = plan_.forward.band(part.q_len(), part.kv_len());
  const Range keys = chunk_keys(part, chunk);
  const Range seen_by = {band.queries_of(keys.begin).begin, band.queries_of(keys.end - 1).end};
  const Range queries = intersect(seen_by, {part.sequence.first_query, part.q_len()});
  if (queries.empty()) return {0, 0};
  const int64_t first_row = part.sequence.first_query * plan_.forward.group;
  return {(queries.begin * plan_.forward.group - first_row) / kBlockRows,
          (queries.end * plan_.forward.group - first_row - 1) / kBlockRows + 1};
}

}  // namespace heed::cpu
