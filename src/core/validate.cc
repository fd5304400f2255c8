// The checks that every face shares. Each message names the tensor, what it got and what was expected.
#include <algorithm>
#include <cmath>
#include <string_view>
#include <utility>

#include "core/operand_checks.h"
#include "core/problem.h"

namespace heed {
namespace {

void check_options(const AttentionOptions& options, bool is_varlen) {
  check_enumerator("causal_align", static_cast<int>(options.causal_align), static_cast<int>(CausalAlign::kTopLeft),
                   "CausalAlign");
  check_backend(options.backend);
  if (options.softmax_scale) check_finite("softmax_scale", *options.softmax_scale);
  check_softcap(options.softcap);
  if (options.window_left < -1 || options.window_right < -1) {
    value_error("window_size",
                "(" + std::to_string(options.window_left) + ", " + std::to_string(options.window_right) + ")",
                "two integers of -1 (unbounded) or more");
  }
  for (auto [name, value] : {std::pair{"max_seqlen_q", options.max_seqlen_q}, {"max_seqlen_k", options.max_seqlen_k}}) {
    if (value < -1) value_error(name, std::to_string(value), "-1 (the total number of rows) or an upper bound");
    if (value != -1 && !is_varlen) value_error(name, std::to_string(value), "-1 without cu_seqlens_q");
  }
}

// Checks of the operands that a request numbers.
class Checker : public OperandChecks {
 public:
  explicit Checker(const AttentionRequest& request) : request_(request) {}

  void bind(int index, std::initializer_list<Dim*> dims, std::string_view dtype) {
    OperandChecks::bind(kAttentionOperandNames[index], request_.operands[index], dims, dtype,
                        index == kK || index == kV ? "q" : "");
  }

 private:
  const AttentionRequest& request_;
};

// The sizes that the operands share.
struct Dims {
  bool is_varlen = false;
  Dim batch{"batch"}, q_len{"q_len"}, kv_len{"kv_len"}, q_heads{"num_q_heads"}, kv_heads{"num_kv_heads"};
  Dim head_dim{"head_dim"}, head_dim_v{"head_dim_v"};
};

void bind_dense(Checker& checker, const AttentionRequest& request, Dims& dims) {
  const auto& operands = request.operands;
  const std::string& dtype = operands[kQ].dtype;
  checker.bind(kQ, {&dims.batch, &dims.q_len, &dims.q_heads, &dims.head_dim}, dtype);
  checker.bind(kK, {&dims.batch, &dims.kv_len, &dims.kv_heads, &dims.head_dim}, dtype);
  checker.bind(kV, {&dims.batch, &dims.kv_len, &dims.kv_heads, &dims.head_dim_v}, dtype);
  if (operands[kQSegmentIds].present || operands[kKvSegmentIds].present) {
    checker.bind(kQSegmentIds, {&dims.batch, &dims.q_len}, "int32");
    checker.bind(kKvSegmentIds, {&dims.batch, &dims.kv_len}, "int32");
  }
  for (int index : {kCuSeqlensK, kSequsedK}) {
    if (operands[index].present) {
      value_error(kAttentionOperandNames[index], "a tensor without cu_seqlens_q", "it only beside cu_seqlens_q");
    }
  }
}

void bind_varlen(Checker& checker, const AttentionRequest& request, Dims& dims) {
  const auto& operands = request.operands;
  const std::string& dtype = operands[kQ].dtype;
  dims.q_len.name = "total_q";
  dims.kv_len.name = "total_k";
  checker.bind(kQ, {&dims.q_len, &dims.q_heads, &dims.head_dim}, dtype);
  checker.bind(kK, {&dims.kv_len, &dims.kv_heads, &dims.head_dim}, dtype);
  checker.bind(kV, {&dims.kv_len, &dims.kv_heads, &dims.head_dim_v}, dtype);
  for (int index : {kQSegmentIds, kKvSegmentIds}) {
    if (operands[index].present) {
      value_error(kAttentionOperandNames[index], "a tensor beside cu_seqlens_q", "segment ids or cu_seqlens, not both");
    }
  }
  Dim ends{"batch_plus_1"};
  checker.bind(kCuSeqlensQ, {&ends}, "int32");
  if (ends.size < 1) value_error("cu_seqlens_q", "shape [0]", "batch + 1 entries, at least 1");
  if (operands[kCuSeqlensK].present) checker.bind(kCuSeqlensK, {&ends}, "int32");
  dims.batch.size = ends.size - 1;
  dims.batch.bound_by = "cu_seqlens_q";
  if (operands[kSequsedK].present) checker.bind(kSequsedK, {&dims.batch}, "int32");
}

Dims bind_operands(Checker& checker, const AttentionRequest& request) {
  Dims dims;
  dims.is_varlen = request.operands[kCuSeqlensQ].present;
  if (dims.is_varlen) {
    bind_varlen(checker, request, dims);
  } else {
    bind_dense(checker, request, dims);
  }
  if (request.operands[kSinks].present) checker.bind(kSinks, {&dims.q_heads}, "float32");
  if (request.operands[kAlibiSlopes].present) checker.bind(kAlibiSlopes, {&dims.q_heads}, "float32");
  return dims;
}

}  // namespace

AttentionProblem validate(const AttentionRequest& request) {
  const auto& operands = request.operands;
  const DType dtype = check_float_dtype("q", operands[kQ]);
  Checker checker(request);
  const Dims dims = bind_operands(checker, request);
  check_head_dim("q", dims.head_dim.name, dims.head_dim.size);
  check_head_dim("v", dims.head_dim_v.name, dims.head_dim_v.size);
  check_head_counts(dims.q_heads.size, dims.kv_heads.size);
  const AttentionOptions& options = request.options;
  check_options(options, dims.is_varlen);

  AttentionProblem problem;
  problem.dtype = dtype;
  problem.lead = checker.lead;
  problem.is_varlen = dims.is_varlen;
  problem.batch = dims.batch.size;
  problem.q_len = dims.q_len.size;
  problem.kv_len = dims.kv_len.size;
  const auto bound = [](int64_t asked, int64_t all) { return asked < 0 ? all : std::min(asked, all); };
  problem.max_q_len = bound(options.max_seqlen_q, dims.q_len.size);
  problem.max_kv_len = bound(options.max_seqlen_k, dims.kv_len.size);
  problem.num_q_heads = dims.q_heads.size;
  problem.num_kv_heads = dims.kv_heads.size;
  problem.head_dim_qk = dims.head_dim.size;
  problem.head_dim_v = dims.head_dim_v.size;
  problem.softmax_scale = options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(dims.head_dim.size)));
  problem.is_causal = options.is_causal;
  problem.causal_align = options.causal_align;
  problem.window_left = options.window_left;
  problem.window_right = options.is_causal ? 0 : options.window_right;
  problem.softcap = options.softcap;
  problem.has_sinks = operands[kSinks].present;
  problem.has_alibi = operands[kAlibiSlopes].present;
  problem.has_segment_ids = operands[kQSegmentIds].present;
  problem.has_cu_seqlens_k = operands[kCuSeqlensK].present;
  problem.has_seqused_k = operands[kSequsedK].present;
  problem.wants_lse = request.wants_lse;
  problem.deterministic = options.deterministic;
  problem.backend = options.backend;
  problem.operands = operands;
  check_problem_sizes(problem);
  return problem;
}

}  // namespace heed
