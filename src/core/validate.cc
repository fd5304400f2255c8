// The checks that every face shares. Each message names the tensor, what it got and what was expected.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "core/dtype.h"
#include "core/problem.h"

namespace heed {
namespace {

constexpr int64_t kMaxHeadDim = 256;

std::string show(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

[[noreturn]] void value_error(std::string_view tensor, const std::string& got, const std::string& expected) {
  throw ValueError(std::string(tensor) + ": got " + got + ", expected " + expected);
}

// One name of a dimension and the operand that bound it, so that a later mismatch can name both.
struct Dim {
  std::string_view name;
  int64_t size = -1;
  std::string_view bound_by = {};
};

class Checker {
 public:
  explicit Checker(const AttentionRequest& request) : request_(request) {}

  // Checks rank and dtype of operand `index`, binds its own (trailing) axes to `dims` and its leading axes to `lead`.
  void bind(int index, std::initializer_list<Dim*> dims, std::string_view dtype) {
    const TensorSpec& spec = request_.operands[index];
    const std::string_view name = kAttentionOperandNames[index];
    if (!spec.present) value_error(name, "nothing", "a tensor");
    if (spec.dtype != dtype) {
      throw TypeError(std::string(name) + ": got dtype " + spec.dtype + ", expected " + std::string(dtype) +
                      (index == kK || index == kV ? " (the dtype of q)" : ""));
    }
    const size_t num_lead = index == kQ ? std::max<size_t>(spec.shape.size(), dims.size()) - dims.size() : lead.size();
    if (spec.shape.size() > kMaxRank) {
      value_error(name, "rank " + std::to_string(spec.shape.size()),
                  "at most " + std::to_string(kMaxRank - dims.size()) + " leading axes");
    }
    if (spec.shape.size() != num_lead + dims.size()) {
      value_error(name, "shape " + show(spec.shape) + " of rank " + std::to_string(spec.shape.size()),
                  describe(dims, num_lead));
    }
    for (int64_t size : spec.shape) {
      if (size < 0) value_error(name, "shape " + show(spec.shape), "sizes of 0 or more");
    }
    if (index == kQ) lead.assign(spec.shape.begin(), spec.shape.begin() + static_cast<int64_t>(num_lead));
    for (size_t axis = 0; axis < num_lead; ++axis) bind_lead(name, spec, axis);
    size_t axis = num_lead;
    for (Dim* dim : dims) bind_dim(name, spec, axis++, *dim);
  }

  std::vector<int64_t> lead;

 private:
  std::string describe(std::initializer_list<Dim*> dims, size_t num_lead) const {
    std::string text = "rank " + std::to_string(num_lead + dims.size()) + ": [";
    if (num_lead > 0) text += std::to_string(num_lead) + " leading axes, ";
    bool is_first = true;
    for (const Dim* dim : dims) {
      text += (is_first ? "" : ", ") + std::string(dim->name);
      is_first = false;
    }
    return text + "]";
  }

  void bind_lead(std::string_view name, const TensorSpec& spec, size_t axis) {
    const int64_t size = spec.shape[axis];
    if (lead[axis] == 1) lead[axis] = size;
    if (size != 1 && size != lead[axis]) {
      value_error(
          name,
          "shape " + show(spec.shape) + ": leading axis " + std::to_string(axis) + " of size " + std::to_string(size),
          "size " + std::to_string(lead[axis]) + " or 1");
    }
  }

  static void bind_dim(std::string_view name, const TensorSpec& spec, size_t axis, Dim& dim) {
    const int64_t size = spec.shape[axis];
    if (dim.size < 0) {
      dim.size = size;
      dim.bound_by = name;
    } else if (dim.size != size) {
      value_error(name, "shape " + show(spec.shape) + " with " + std::string(dim.name) + " " + std::to_string(size),
                  std::string(dim.name) + " " + std::to_string(dim.size) + " as in " + std::string(dim.bound_by));
    }
  }

  const AttentionRequest& request_;
};

void check_float(std::string_view name, double value) {
  if (!std::isfinite(value) || std::abs(value) > std::numeric_limits<float>::max()) {
    value_error(name, std::isnan(value) ? "nan" : std::to_string(value), "a finite number");
  }
}

void check_head_dim(std::string_view tensor, const Dim& dim) {
  if (dim.size < 1 || dim.size > kMaxHeadDim) {
    value_error(tensor, std::string(dim.name) + " " + std::to_string(dim.size), "1 to " + std::to_string(kMaxHeadDim));
  }
}

void check_options(const AttentionOptions& options) {
  if (options.causal_align > CausalAlign::kTopLeft) {
    value_error("causal_align", std::to_string(static_cast<int>(options.causal_align)), "one of heed::CausalAlign");
  }
  if (options.backend > Backend::kSm90) {
    value_error("backend", std::to_string(static_cast<int>(options.backend)), "one of heed::Backend");
  }
  if (options.softmax_scale) check_float("softmax_scale", *options.softmax_scale);
  check_float("softcap", options.softcap);
  if (options.softcap < 0) value_error("softcap", std::to_string(options.softcap), "0 (off) or a positive number");
  if (options.window_left < -1 || options.window_right < -1) {
    value_error("window_size",
                "(" + std::to_string(options.window_left) + ", " + std::to_string(options.window_right) + ")",
                "two integers of -1 (unbounded) or more");
  }
}

// Every tensor, the broadcast outputs included, has a number of elements that fits 64 bits with room for byte offsets.
void check_sizes(std::string_view tensor, const std::vector<int64_t>& shape) {
  int64_t count = 8;
  for (int64_t size : shape) {
    // An empty tensor's other sizes are multiplied too, by kernels and by whoever makes strides.
    if (__builtin_mul_overflow(count, std::max<int64_t>(size, 1), &count)) {
      value_error(tensor, "shape " + show(shape), "at most 2^60 elements");
    }
  }
}

std::vector<int64_t> append(std::vector<int64_t> shape, std::initializer_list<int64_t> more) {
  shape.insert(shape.end(), more);
  return shape;
}

}  // namespace

std::vector<int64_t> AttentionProblem::out_shape() const {
  return append(lead, {batch, q_len, num_q_heads, head_dim_v});
}

std::vector<int64_t> AttentionProblem::lse_shape() const { return append(lead, {batch, num_q_heads, q_len}); }

int AttentionProblem::num_inputs() const {
  return static_cast<int>(
      std::count_if(operands.begin(), operands.end(), [](const TensorSpec& spec) { return spec.present; }));
}

AttentionProblem validate(const AttentionRequest& request) {
  const auto& operands = request.operands;
  const TensorSpec& q = operands[kQ];
  const DTypeInfo* dtype = find_dtype(q.dtype);
  if (q.present && (dtype == nullptr || !dtype->is_float)) {
    throw TypeError("q: got dtype " + q.dtype + ", expected float32, float16 or bfloat16");
  }
  Dim batch{"batch"}, q_len{"q_len"}, kv_len{"kv_len"}, q_heads{"num_q_heads"}, kv_heads{"num_kv_heads"};
  Dim head_dim{"head_dim"}, head_dim_v{"head_dim_v"};
  Checker checker(request);
  checker.bind(kQ, {&batch, &q_len, &q_heads, &head_dim}, q.dtype);
  checker.bind(kK, {&batch, &kv_len, &kv_heads, &head_dim}, q.dtype);
  checker.bind(kV, {&batch, &kv_len, &kv_heads, &head_dim_v}, q.dtype);
  if (operands[kSinks].present) checker.bind(kSinks, {&q_heads}, "float32");
  if (operands[kAlibiSlopes].present) checker.bind(kAlibiSlopes, {&q_heads}, "float32");
  if (operands[kQSegmentIds].present || operands[kKvSegmentIds].present) {
    checker.bind(kQSegmentIds, {&batch, &q_len}, "int32");
    checker.bind(kKvSegmentIds, {&batch, &kv_len}, "int32");
  }
  check_head_dim("q", head_dim);
  check_head_dim("v", head_dim_v);
  if (q_heads.size < 1) value_error("q", "num_q_heads 0", "1 or more");
  if (kv_heads.size < 1) value_error("k", "num_kv_heads 0", "1 or more");
  if (q_heads.size % kv_heads.size != 0) {
    value_error("q", "num_q_heads " + std::to_string(q_heads.size),
                "a multiple of num_kv_heads " + std::to_string(kv_heads.size) + " of k");
  }
  check_options(request.options);

  AttentionProblem problem;
  problem.dtype = dtype->dtype;
  problem.lead = checker.lead;
  problem.batch = batch.size;
  problem.q_len = q_len.size;
  problem.kv_len = kv_len.size;
  problem.num_q_heads = q_heads.size;
  problem.num_kv_heads = kv_heads.size;
  problem.head_dim_qk = head_dim.size;
  problem.head_dim_v = head_dim_v.size;
  const AttentionOptions& options = request.options;
  problem.softmax_scale = options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim.size)));
  problem.is_causal = options.is_causal;
  problem.causal_align = options.causal_align;
  problem.window_left = options.window_left;
  problem.window_right = options.is_causal ? 0 : options.window_right;
  problem.softcap = options.softcap;
  problem.has_sinks = operands[kSinks].present;
  problem.has_alibi = operands[kAlibiSlopes].present;
  problem.has_segment_ids = operands[kQSegmentIds].present;
  problem.wants_lse = request.wants_lse;
  problem.deterministic = options.deterministic;
  problem.backend = options.backend;
  problem.operands = operands;
  check_sizes("k", append(problem.lead, {batch.size, kv_len.size, kv_heads.size, kMaxHeadDim}));
  check_sizes("q", append(problem.lead, {batch.size, q_len.size, q_heads.size, kMaxHeadDim}));
  return problem;
}

}  // namespace heed
