// The problem of rotary position embeddings: its text and its checks.
#include "core/operand_checks.h"
#include "core/problem_text.h"
#include "core/small_problems.h"

namespace heed {
namespace {

constexpr std::string_view kSchema = "rope.v1";

using Operands = std::array<TensorSpec, RopeProblem::kNumInputs>;

// Where positions come from: indptr and offsets, or pos_ids with or without a cache of cosines and sines.
void bind_positions(OperandChecks& checks, const Operands& operands, Dim& num_tokens, RopeProblem& problem) {
  const TensorSpec& indptr = operands[RopeProblem::kIndptr];
  const TensorSpec& offsets = operands[RopeProblem::kOffsets];
  const TensorSpec& pos_ids = operands[RopeProblem::kPosIds];
  const TensorSpec& cache = operands[RopeProblem::kCosSinCache];
  problem.has_pos_ids = pos_ids.present;
  problem.has_cache = cache.present;
  if (!pos_ids.present) {
    check_absent("cos_sin_cache", cache, "it only beside pos_ids");
    Dim ends{"batch_plus_1"};
    checks.bind("indptr", indptr, {&ends}, "int32");
    if (ends.size < 1) value_error("indptr", "shape " + show(indptr.shape), "batch + 1 entries, at least 1");
    Dim batch{"batch", ends.size - 1, "indptr"};
    checks.bind("offsets", offsets, {&batch}, "int32");
    problem.num_sequences = batch.size;
    return;
  }
  check_absent("indptr", indptr, "pos_ids, or indptr and offsets, not both");
  check_absent("offsets", offsets, "pos_ids, or indptr and offsets, not both");
  checks.bind("pos_ids", pos_ids, {&num_tokens}, "int32");
  if (cache.present) {
    Dim max_position{"max_position"}, rotary_dim{"rotary_dim"};
    checks.bind("cos_sin_cache", cache, {&max_position, &rotary_dim}, "float32");
    if (max_position.size < 1) {
      value_error("cos_sin_cache", "shape " + show(cache.shape), "at least 1 position");
    }
    problem.max_position = max_position.size;
  }
}

void check_rotary_dim(RopeProblem& problem, const TensorSpec* cache) {
  int64_t& rotary_dim = problem.options.rotary_dim;
  const int64_t asked = rotary_dim;
  if (cache != nullptr) {
    rotary_dim = cache->shape.back();
    if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > problem.head_dim) {
      value_error("cos_sin_cache", "shape " + show(cache->shape) + " with a last axis of " + std::to_string(rotary_dim),
                  "an even rotary_dim from 2 to head_dim " + std::to_string(problem.head_dim));
    }
    if (asked != 0 && asked != rotary_dim) {
      value_error("rotary_dim", std::to_string(asked),
                  std::to_string(rotary_dim) + ", the size of the last axis of cos_sin_cache");
    }
  } else {
    if (rotary_dim == 0) rotary_dim = problem.head_dim;
    if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > problem.head_dim) {
      value_error("rotary_dim", std::to_string(rotary_dim) + (asked == 0 ? " (the whole head)" : ""),
                  "an even number from 2 to head_dim " + std::to_string(problem.head_dim));
    }
  }
  problem.rotary_dim = rotary_dim;
}

void check_options(const RopeOptions& options) {
  check_positive("rope_scale", options.scale);
  check_positive("rope_theta", options.theta);
  if (options.is_llama31) {
    check_positive("low_freq_factor", options.low_freq_factor);
    check_positive("high_freq_factor", options.high_freq_factor);
    check_positive("old_context_len", options.old_context_len);
    if (options.high_freq_factor <= options.low_freq_factor) {
      value_error("high_freq_factor", std::to_string(options.high_freq_factor),
                  "a number above low_freq_factor " + std::to_string(options.low_freq_factor));
    }
  }
  check_backend(options.backend);
}

}  // namespace

std::vector<int64_t> RopeProblem::q_shape() const { return append(lead, {num_tokens, num_q_heads, head_dim}); }
std::vector<int64_t> RopeProblem::k_shape() const { return append(lead, {num_tokens, num_kv_heads, head_dim}); }

std::string to_text(const RopeRequest& request) {
  const RopeOptions& options = request.options;
  std::string text = std::string(kSchema) + operand_fields(RopeProblem::kNames, request.operands) +
                     ";rotary_dim=" + std::to_string(options.rotary_dim) +
                     (options.interleave ? ";interleave=1" : ";interleave=0") + ";scale=" + to_hex(options.scale) +
                     ";theta=" + to_hex(options.theta) + (options.is_llama31 ? ";llama31=1" : ";llama31=0");
  if (options.is_llama31) {
    text += ";low=" + to_hex(options.low_freq_factor) + ";high=" + to_hex(options.high_freq_factor) +
            ";context=" + to_hex(options.old_context_len);
  }
  return text + (options.inverse ? ";inverse=1" : ";inverse=0") + backend_field(options.backend);
}

RopeRequest parse_rope_request(std::string_view text) {
  RopeRequest request;
  RopeOptions& options = request.options;
  TextReader reader(text);
  reader.expect(kSchema);
  read_operands(reader, RopeProblem::kNames, request.operands);
  reader.expect(";rotary_dim=");
  options.rotary_dim = reader.integer();
  reader.expect(";interleave=");
  options.interleave = reader.flag();
  reader.expect(";scale=");
  options.scale = reader.real();
  reader.expect(";theta=");
  options.theta = reader.real();
  reader.expect(";llama31=");
  options.is_llama31 = reader.flag();
  if (options.is_llama31) {
    reader.expect(";low=");
    options.low_freq_factor = reader.real();
    reader.expect(";high=");
    options.high_freq_factor = reader.real();
    reader.expect(";context=");
    options.old_context_len = reader.real();
  }
  reader.expect(";inverse=");
  options.inverse = reader.flag();
  options.backend = read_backend(reader);
  reader.expect_end();
  return request;
}

RopeProblem validate(const RopeRequest& request) {
  const Operands& operands = request.operands;
  const TensorSpec& q = operands[RopeProblem::kQ];
  RopeProblem problem;
  problem.dtype = check_float_dtype("q", q);
  problem.options = request.options;
  OperandChecks checks;
  Dim num_tokens{"num_tokens"}, q_heads{"num_q_heads"}, kv_heads{"num_kv_heads"}, head_dim{"head_dim"};
  checks.bind("q", q, {&num_tokens, &q_heads, &head_dim}, q.dtype);
  checks.bind("k", operands[RopeProblem::kK], {&num_tokens, &kv_heads, &head_dim}, q.dtype, "q");
  bind_positions(checks, operands, num_tokens, problem);
  check_head_dim("q", head_dim.name, head_dim.size);
  if (q_heads.size < 1) value_error("q", "num_q_heads 0", "1 or more");
  if (kv_heads.size < 1) value_error("k", "num_kv_heads 0", "1 or more");
  problem.head_dim = head_dim.size;
  check_options(request.options);
  check_rotary_dim(problem, problem.has_cache ? &operands[RopeProblem::kCosSinCache] : nullptr);

  problem.lead = checks.lead;
  problem.num_tokens = num_tokens.size;
  problem.num_q_heads = q_heads.size;
  problem.num_kv_heads = kv_heads.size;
  problem.operands = operands;
  check_sizes("q", problem.q_shape());
  check_sizes("k", problem.k_shape());
  if (problem.has_cache) check_sizes("cos_sin_cache", append(problem.lead, {problem.max_position, problem.rotary_dim}));
  if (!problem.has_pos_ids) check_sizes("indptr", append(problem.lead, {problem.num_sequences + 1}));
  return problem;
}

}  // namespace heed
