// The problem of attention's backward pass: its text, and the checks of what it adds to the forward pass's.
#include "core/attention_bwd_problem.h"

#include <tuple>

#include "core/dtype.h"
#include "core/operand_checks.h"
#include "core/problem_text.h"

namespace heed {
namespace {

// The added inputs against the sizes that the forward pass's operands have bound. May make leading axes full.
void check_added(AttentionBwdProblem& problem) {
  AttentionProblem& forward = problem.forward;
  const bool is_varlen = forward.is_varlen;
  Dim batch{"batch", forward.batch, "q"}, q_len{is_varlen ? "total_q" : "q_len", forward.q_len, "q"};
  Dim heads{"num_q_heads", forward.num_q_heads, "q"}, head_dim_v{"head_dim_v", forward.head_dim_v, "v"};
  OperandChecks checks(forward.lead);
  const auto bind_like_out = [&](int index) {
    const std::string_view name = attention_bwd_operand_name(index), dtype = info(forward.dtype).name;
    if (is_varlen) {
      checks.bind(name, problem.operand(index), {&q_len, &heads, &head_dim_v}, dtype, "q");
    } else {
      checks.bind(name, problem.operand(index), {&batch, &q_len, &heads, &head_dim_v}, dtype, "q");
    }
  };
  const auto bind_like_lse = [&](int index) {
    const std::string_view name = attention_bwd_operand_name(index);
    if (is_varlen) {
      checks.bind(name, problem.operand(index), {&heads, &q_len}, "float32");
    } else {
      checks.bind(name, problem.operand(index), {&batch, &heads, &q_len}, "float32");
    }
  };
  bind_like_out(kOut);
  bind_like_lse(kLse);
  bind_like_out(kDout);
  if (problem.has_dlse) bind_like_lse(kDlse);
  forward.lead = checks.lead;
}

std::array<TensorSpec, kNumAttentionGradients> make_gradients(const AttentionProblem& forward) {
  const std::string dtype(info(forward.dtype).name);
  const auto rows = [&](int64_t length, int64_t heads, int64_t head_dim) {
    if (forward.is_varlen) return append(forward.lead, {length, heads, head_dim});
    return append(forward.lead, {forward.batch, length, heads, head_dim});
  };
  const auto per_head = [&] {
    if (forward.is_varlen) return append(forward.lead, {forward.num_q_heads});
    return append(forward.lead, {forward.batch, forward.num_q_heads});
  };
  std::array<TensorSpec, kNumAttentionGradients> gradients;
  gradients[kDq] = {dtype, rows(forward.q_len, forward.num_q_heads, forward.head_dim_qk), true};
  gradients[kDk] = {dtype, rows(forward.kv_len, forward.num_kv_heads, forward.head_dim_qk), true};
  gradients[kDv] = {dtype, rows(forward.kv_len, forward.num_kv_heads, forward.head_dim_v), true};
  if (forward.has_sinks) gradients[kDsinks] = {"float32", per_head(), true};
  if (forward.has_alibi) gradients[kDalibiSlopes] = {"float32", per_head(), true};
  return gradients;
}

}  // namespace

const TensorSpec& AttentionBwdProblem::operand(int index) const {
  switch (index) {
    case kOut:
      return out;
    case kLse:
      return lse;
    case kDout:
      return dout;
    case kDlse:
      return dlse;
    default:
      return forward.operands[index];
  }
}

int AttentionBwdProblem::num_inputs() const { return forward.num_inputs() + (has_dlse ? 4 : 3); }

int AttentionBwdProblem::num_outputs() const {
  int count = 1;  // the workspace
  for (const TensorSpec& spec : gradients) count += spec.present ? 1 : 0;
  return count;
}

std::vector<int64_t> AttentionBwdProblem::workspace_shape(int64_t floats_per_head) const {
  return forward.workspace_shape(floats_per_head);
}

std::string to_text(const AttentionBwdRequest& request) {
  const AttentionRequest& forward = request.forward;
  return std::string(kAttentionBwdSchema) + operand_fields(kAttentionOperandNames, forward.operands) +
         operand_fields(kAttentionBwdOnlyNames, request.added) +
         option_fields(forward.options, forward.operands[kCuSeqlensQ].present, nullptr);
}

AttentionBwdRequest parse_attention_bwd_request(std::string_view text) {
  AttentionBwdRequest request;
  AttentionRequest& forward = request.forward;
  TextReader reader(text);
  reader.expect(kAttentionBwdSchema);
  read_operands(reader, kAttentionOperandNames, forward.operands);
  read_operands(reader, kAttentionBwdOnlyNames, request.added);
  read_options(reader, forward.options, forward.operands[kCuSeqlensQ].present, nullptr);
  reader.expect_end();
  return request;
}

AttentionBwdProblem validate(const AttentionBwdRequest& request) {
  AttentionBwdProblem problem;
  problem.forward = validate(request.forward);
  problem.forward.wants_lse = false;
  std::tie(problem.out, problem.lse, problem.dout, problem.dlse) = std::tuple_cat(request.added);
  problem.has_dlse = problem.dlse.present;
  check_added(problem);
  check_problem_sizes(problem.forward);  // again: the added inputs may have more leading indices
  problem.gradients = make_gradients(problem.forward);
  return problem;
}

}  // namespace heed
