// How an attention forward call is cut into work items, whatever the instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention_fwd_plan.h"
#include "variants/band.h"

namespace heed::cpu {

// One work item: consecutive rows of one KV head of one sequence. Row r is head r % group of the KV head's group at
// query r / group of the sequence.
struct WorkItem {
  int64_t problem = 0;        // leading axes and, in a dense batch, the batch entry
  int64_t kv_head = 0;        //
  variants::Range queries{};  // tokens of q that are the sequence; rows count from the first
  variants::Range keys{};     // tokens of k and v that are the sequence
  variants::Range rows{};     // the item's rows
  bool is_outside = false;    // rows of no sequence: they see no key, and a sink does not count
};

// The items of one call, in the order in which threads are to take them: where lengths differ, the items of the most
// work first, so that what threads wait for at the end is short.
class Schedule {
 public:
  // `panel_rows`: granularity of an item. `max_panels`: of an item.
  Schedule(const ForwardPlan& plan, int panel_rows, int max_panels, int num_threads);

  int64_t num_items() const { return num_items_; }
  int panels_per_item() const { return panels_per_item_; }  // the most that any item has
  double num_products() const { return num_products_; }     // multiply-adds of the call, about
  WorkItem item(int64_t index) const;

 private:
  // A sequence; or all of them, where all are equally long and lie one per problem.
  struct Part {
    int64_t problem = 0;
    variants::Range queries{}, keys{};
    int64_t first_query = 0;  // of the sequence; those before it are an earlier sequence's
    bool is_outside = false;
    double keys_per_row = 1.0;  // mean, about
    int panels_per_item = 1;
    int64_t items_per_head = 0;
    int64_t first_item = 0;

    int64_t num_rows(const ForwardPlan& plan) const { return (queries.end - queries.begin - first_query) * plan.group; }
    double item_cost() const { return panels_per_item * keys_per_row; }
  };

  int64_t num_panels(const Part& part) const { return (part.num_rows(plan_) + panel_rows_ - 1) / panel_rows_; }
  void add_sequences(int64_t problem);
  void tile(Part& part, double panel_keys_per_item, int max_panels) const;

  const ForwardPlan& plan_;
  int panel_rows_;
  Part dense_;
  std::vector<Part> parts_;  // of a batch of variable lengths, by first_item
  int64_t num_items_ = 0;
  int panels_per_item_ = 1;
  double num_products_ = 0.0;
};

}  // namespace heed::cpu
