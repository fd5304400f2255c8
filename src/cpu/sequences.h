// Where the sequences of a batch of variable lengths lie.
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/attention_fwd_plan.h"
#include "variants/band.h"

namespace heed::cpu {

struct Sequence {
  variants::Range queries{};  // tokens of q
  variants::Range keys{};     // tokens of k and v
  int64_t first_query = 0;    // of `queries`; those before it are an earlier sequence's
  bool is_outside = false;    // rows of no sequence: they see no key, and a sink does not count
};

// The sequences of one of the plan's problems, and between them the rows that are outside. Whatever the index arrays
// hold, every row of q is in exactly one of them (from its first_query on) and every range inside its tensor.
void for_each_sequence(const ForwardPlan& plan, int64_t problem, const std::function<void(const Sequence&)>& body);

}  // namespace heed::cpu
