// Where the sequences of a batch of variable lengths lie.
#include "cpu/sequences.h"

#include <algorithm>

namespace heed::cpu {
namespace {

using variants::Range;

// int32 values of one problem, such as its cu_seqlens.
class Lengths {
 public:
  Lengths(const ForwardPlan& plan, const Operand& operand, const ProblemIndex& index)
      : data_(static_cast<const int32_t*>(operand.data)), stride_(operand.token) {
    if (data_ != nullptr) data_ += offset_of(plan, operand, index);
  }
  bool empty() const { return data_ == nullptr; }
  // What the value at `i` says, kept within [low, high].
  int64_t clamped(int64_t i, int64_t low, int64_t high) const {
    return std::clamp<int64_t>(data_[i * stride_], low, high);
  }
  // Tokens [value i, value i + 1) of `total`.
  Range sequence(int64_t i, int64_t total) const {
    const int64_t begin = clamped(i, 0, total);
    return {begin, clamped(i + 1, begin, total)};
  }

 private:
  const int32_t* data_;
  int64_t stride_;
};

}  // namespace

void for_each_sequence(const ForwardPlan& plan, int64_t problem, const std::function<void(const Sequence&)>& body) {
  const ProblemIndex index = split_problem(plan, problem);
  const Lengths cu_seqlens_q(plan, plan.cu_seqlens_q, index);
  const Lengths cu_seqlens_k(plan, plan.cu_seqlens_k, index);
  const Lengths seqused_k(plan, plan.seqused_k, index);
  const auto outside = [&](int64_t begin, int64_t end) {
    Sequence rows;
    rows.queries = {begin, end};
    rows.is_outside = true;
    if (begin < end) body(rows);
  };
  const int64_t first = plan.num_sequences == 0 ? plan.q_len : cu_seqlens_q.clamped(0, 0, plan.q_len);
  outside(0, first);
  int64_t next = first;  // rows before it have their sequence
  for (int64_t b = 0; b < plan.num_sequences; ++b) {
    Sequence sequence;
    sequence.queries = cu_seqlens_q.sequence(b, plan.q_len);
    sequence.keys = (cu_seqlens_k.empty() ? cu_seqlens_q : cu_seqlens_k).sequence(b, plan.kv_len);
    const int64_t num_queries = sequence.queries.end - sequence.queries.begin;
    const int64_t num_keys = sequence.keys.end - sequence.keys.begin;
    if (!seqused_k.empty()) sequence.keys.end = sequence.keys.begin + seqused_k.clamped(b, 0, num_keys);
    // Where entries decrease, sequences overlap: a row then belongs to the first one that has it.
    sequence.first_query = std::clamp<int64_t>(next - sequence.queries.begin, 0, num_queries);
    next = std::max<int64_t>(next, sequence.queries.end);
    body(sequence);
  }
  outside(next, plan.q_len);
}

}  // namespace heed::cpu
