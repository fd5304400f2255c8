// The text of attention forward's problem, and what follows from the problem's sizes.
#include "core/problem.h"

#include <algorithm>

#include "core/problem_text.h"

namespace heed {
namespace {

std::vector<int64_t> append(std::vector<int64_t> shape, std::initializer_list<int64_t> more) {
  shape.insert(shape.end(), more);
  return shape;
}

}  // namespace

std::vector<int64_t> AttentionProblem::out_shape() const {
  if (is_varlen) return append(lead, {q_len, num_q_heads, head_dim_v});
  return append(lead, {batch, q_len, num_q_heads, head_dim_v});
}

std::vector<int64_t> AttentionProblem::lse_shape() const {
  if (is_varlen) return append(lead, {num_q_heads, q_len});
  return append(lead, {batch, num_q_heads, q_len});
}

std::vector<int64_t> AttentionProblem::workspace_shape(int64_t floats_per_head) const {
  if (is_varlen) return append(lead, {num_q_heads, floats_per_head});
  return append(lead, {batch, num_q_heads, floats_per_head});
}

int AttentionProblem::num_inputs() const {
  return static_cast<int>(
      std::count_if(operands.begin(), operands.end(), [](const TensorSpec& spec) { return spec.present; }));
}

int64_t AttentionProblem::num_heads_in_all() const {
  int64_t count = (is_varlen ? 1 : batch) * num_q_heads;
  for (int64_t size : lead) count *= size;
  return count;
}

std::string to_text(const AttentionRequest& request) {
  return std::string(kAttentionFwdSchema) + operand_fields(kAttentionOperandNames, request.operands) +
         option_fields(request.options, request.operands[kCuSeqlensQ].present, &request.wants_lse);
}

AttentionRequest parse_attention_request(std::string_view text) {
  AttentionRequest request;
  TextReader reader(text);
  reader.expect(kAttentionFwdSchema);
  read_operands(reader, kAttentionOperandNames, request.operands);
  read_options(reader, request.options, request.operands[kCuSeqlensQ].present, &request.wants_lse);
  reader.expect_end();
  return request;
}

}  // namespace heed
