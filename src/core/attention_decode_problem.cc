// The problem of attention of one query: its text and its checks.
#include <algorithm>
#include <cmath>

#include "core/operand_checks.h"
#include "core/problem_text.h"
#include "core/small_problems.h"

namespace heed {
namespace {

constexpr std::string_view kSchema = "attention_decode.v1";

void check_options(const SingleDecodeOptions& options) {
  check_enumerator("kv_layout", static_cast<int>(options.kv_layout), static_cast<int>(KvLayout::kHND), "KvLayout");
  check_backend(options.backend);
  if (options.window_left < -1) {
    value_error("window_left", std::to_string(options.window_left), "-1 (unbounded) or more");
  }
  check_softcap(options.softcap);
  if (options.sm_scale) check_finite("sm_scale", *options.sm_scale);
  if (options.rope_scale) check_positive("rope_scale", *options.rope_scale);
  if (options.rope_theta) check_positive("rope_theta", *options.rope_theta);
}

}  // namespace

std::vector<int64_t> AttentionDecodeProblem::out_shape() const { return append(lead, {num_q_heads, head_dim_v}); }
std::vector<int64_t> AttentionDecodeProblem::lse_shape() const { return append(lead, {num_q_heads}); }

std::vector<int64_t> AttentionDecodeProblem::workspace_shape(int64_t floats_per_head) const {
  return append(lead, {num_q_heads, floats_per_head});
}

int AttentionDecodeProblem::num_inputs() const {
  return static_cast<int>(
      std::count_if(operands.begin(), operands.end(), [](const TensorSpec& spec) { return spec.present; }));
}

int64_t AttentionDecodeProblem::num_heads_in_all() const { return product(lead) * num_q_heads; }

std::string to_text(const AttentionDecodeRequest& request) {
  const SingleDecodeOptions& options = request.options;
  std::string text = std::string(kSchema) + operand_fields(AttentionDecodeProblem::kNames, request.operands) +
                     ";layout=" + std::string(kKvLayoutNames[static_cast<int>(options.kv_layout)]) +
                     ";window=" + std::to_string(options.window_left) + ";softcap=" + to_hex(options.softcap) +
                     ";scale=" + (options.sm_scale ? to_hex(*options.sm_scale) : "default") + ";rope=";
  if (options.rope_scale || options.rope_theta) {
    text += to_hex(options.rope_scale.value_or(kDefaultRopeScale)) + "," +
            to_hex(options.rope_theta.value_or(kDefaultRopeTheta));
  } else {
    text += "none";
  }
  return text + (request.wants_lse ? ";lse=1" : ";lse=0") +
         (options.batch_invariant ? ";batch_invariant=1" : ";batch_invariant=0") + backend_field(options.backend);
}

AttentionDecodeRequest parse_attention_decode_request(std::string_view text) {
  AttentionDecodeRequest request;
  SingleDecodeOptions& options = request.options;
  TextReader reader(text);
  reader.expect(kSchema);
  read_operands(reader, AttentionDecodeProblem::kNames, request.operands);
  reader.expect(";layout=");
  options.kv_layout = static_cast<KvLayout>(reader.one_of(kKvLayoutNames, "NHD or HND"));
  reader.expect(";window=");
  options.window_left = reader.integer();
  reader.expect(";softcap=");
  options.softcap = reader.real();
  reader.expect(";scale=");
  if (!reader.take("default")) options.sm_scale = reader.real();
  reader.expect(";rope=");
  if (!reader.take("none")) {
    options.rope_scale = reader.real();
    reader.expect(",");
    options.rope_theta = reader.real();
  }
  reader.expect(";lse=");
  request.wants_lse = reader.flag();
  reader.expect(";batch_invariant=");
  options.batch_invariant = reader.flag();
  options.backend = read_backend(reader);
  reader.expect_end();
  return request;
}

AttentionDecodeProblem validate(const AttentionDecodeRequest& request) {
  const auto& [q, k, v, sinks, alibi_slopes] = request.operands;
  const SingleDecodeOptions& options = request.options;
  check_options(options);
  AttentionDecodeProblem problem;
  problem.dtype = check_float_dtype("q", q);
  OperandChecks checks;
  Dim q_heads{"num_q_heads"}, kv_heads{"num_kv_heads"}, kv_len{"kv_len"}, head_dim{"head_dim"};
  Dim head_dim_v{"head_dim_v"};
  const bool is_nhd = options.kv_layout == KvLayout::kNHD;
  Dim* const first = is_nhd ? &kv_len : &kv_heads;
  Dim* const second = is_nhd ? &kv_heads : &kv_len;
  checks.bind("q", q, {&q_heads, &head_dim}, q.dtype);
  checks.bind("k", k, {first, second, &head_dim}, q.dtype, "q");
  checks.bind("v", v, {first, second, &head_dim_v}, q.dtype, "q");
  if (sinks.present) checks.bind("sinks", sinks, {&q_heads}, "float32");
  if (alibi_slopes.present) checks.bind("alibi_slopes", alibi_slopes, {&q_heads}, "float32");
  check_head_dim("q", head_dim.name, head_dim.size);
  check_head_dim("v", head_dim_v.name, head_dim_v.size);
  check_head_counts(q_heads.size, kv_heads.size);
  problem.has_rope = options.rope_scale.has_value() || options.rope_theta.has_value();
  if (problem.has_rope && head_dim.size % 2 != 0) {
    value_error("q", "head_dim " + std::to_string(head_dim.size) + " with rope_scale or rope_theta", "an even one");
  }

  problem.lead = checks.lead;
  problem.kv_len = kv_len.size;
  problem.num_q_heads = q_heads.size;
  problem.num_kv_heads = kv_heads.size;
  problem.head_dim_qk = head_dim.size;
  problem.head_dim_v = head_dim_v.size;
  check_sizes("k", append(problem.lead, {kv_len.size, kv_heads.size, kMaxHeadDim}));
  check_sizes("q", append(problem.lead, {q_heads.size, kMaxHeadDim}));
  problem.kv_layout = options.kv_layout;
  problem.window_left = options.window_left;
  problem.softcap = options.softcap;
  problem.softmax_scale = options.sm_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim.size)));
  problem.rope_scale = options.rope_scale.value_or(kDefaultRopeScale);
  problem.rope_theta = options.rope_theta.value_or(kDefaultRopeTheta);
  problem.has_sinks = sinks.present;
  problem.has_alibi = alibi_slopes.present;
  problem.wants_lse = request.wants_lse;
  problem.batch_invariant = options.batch_invariant;
  problem.backend = options.backend;
  problem.operands = request.operands;
  return problem;
}

}  // namespace heed
