// Work items of the CPU attention forward kernel.
#include "cpu/attention_fwd_schedule.h"

#include <algorithm>

#include "cpu/sequences.h"

namespace heed::cpu {
namespace {

using variants::Range;

// Items per thread, at least, where there is work for so many: threads then finish together, also where items differ.
constexpr int kItemsPerThread = 4;

int64_t size_of(Range range) { return range.empty() ? 0 : range.end - range.begin; }

}  // namespace

Schedule::Schedule(const ForwardPlan& plan, int panel_rows, int max_panels, int num_threads)
    : plan_(plan), panel_rows_(panel_rows) {
  if (plan.is_varlen) {
    for (int64_t problem = 0; problem < plan.num_problems; ++problem) add_sequences(problem);
  } else {
    dense_.queries = {0, plan.q_len};
    dense_.keys = {0, plan.kv_len};
  }
  Part* const first = plan.is_varlen ? parts_.data() : &dense_;
  Part* const last = plan.is_varlen ? first + parts_.size() : first + 1;
  const int64_t repeats = plan.num_kv_heads * (plan.is_varlen ? 1 : plan.num_problems);

  // 1. How much work there is: panels, each weighted with the keys that a row of it sees.
  double panel_keys = 0.0;
  for (Part* part = first; part != last; ++part) {
    const int64_t num_queries = size_of(part->queries);
    const variants::Band band = plan.band(num_queries, size_of(part->keys));
    const int64_t middle = (part->first_query + num_queries) / 2;
    const Range seen = intersect(band.keys_of_any({middle, middle + 1}), {0, size_of(part->keys)});
    part->keys_per_row = 1.0 + static_cast<double>(size_of(seen));  // a row costs something without any key, too
    panel_keys += static_cast<double>(num_panels(*part) * repeats) * part->keys_per_row;
    num_products_ +=
        static_cast<double>(part->num_rows(plan) * repeats) * part->keys_per_row * (plan.head_dim_qk + plan.head_dim_v);
  }
  // 2. As many panels per item as fit, because each item packs K and V once for all of them, unless threads would idle.
  const double num_items = num_threads == 1 ? 1.0 : kItemsPerThread * num_threads;
  for (Part* part = first; part != last; ++part) tile(*part, panel_keys / num_items, max_panels);
  // 3. The order.
  if (plan.is_varlen) {
    std::stable_sort(first, last, [](const Part& a, const Part& b) { return a.item_cost() > b.item_cost(); });
  }
  for (Part* part = first; part != last; ++part) {
    part->first_item = num_items_;
    num_items_ += part->items_per_head * repeats;
    panels_per_item_ = std::max(panels_per_item_, part->panels_per_item);
  }
}

void Schedule::tile(Part& part, double panel_keys_per_item, int max_panels) const {
  const int64_t panels = num_panels(part);
  const auto wanted =
      static_cast<int64_t>(std::clamp<double>(panel_keys_per_item / part.keys_per_row, 1.0, max_panels));
  part.items_per_head = (panels + wanted - 1) / wanted;
  part.panels_per_item = static_cast<int>((panels + part.items_per_head - 1) / part.items_per_head);
}

void Schedule::add_sequences(int64_t problem) {
  for_each_sequence(plan_, problem, [&](const Sequence& sequence) {
    Part part;
    part.problem = problem;
    part.queries = sequence.queries;
    part.keys = sequence.keys;
    part.first_query = sequence.first_query;
    part.is_outside = sequence.is_outside;
    if (part.num_rows(plan_) > 0) parts_.push_back(part);
  });
}

WorkItem Schedule::item(int64_t index) const {
  const Part* part = &dense_;
  if (plan_.is_varlen) {
    const auto after = std::upper_bound(parts_.begin(), parts_.end(), index,
                                        [](int64_t value, const Part& entry) { return value < entry.first_item; });
    part = &*(after - 1);
    index -= part->first_item;
  }
  // Heads one after the other, so that one head's K and V stay in the outer caches; where the right side is masked, a
  // head's last rows, which see the most keys, first.
  const int64_t head = index / part->items_per_head;
  int64_t block = index % part->items_per_head;
  if (plan_.window_right >= 0) block = part->items_per_head - 1 - block;

  WorkItem item;
  item.problem = part->problem + head / plan_.num_kv_heads;
  item.kv_head = head % plan_.num_kv_heads;
  item.queries = part->queries;
  item.keys = part->keys;
  item.is_outside = part->is_outside;
  const int64_t rows_per_item = int64_t{part->panels_per_item} * panel_rows_;
  item.rows.begin = part->first_query * plan_.group + block * rows_per_item;
  item.rows.end = std::min<int64_t>(item.rows.begin + rows_per_item, size_of(part->queries) * plan_.group);
  return item;
}

}  // namespace heed::cpu
