// Checks of operands against each other.
#include "core/operand_checks.h"

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "core/dtype.h"

namespace heed {
namespace {

std::string describe(std::span<Dim* const> dims, size_t num_lead) {
  std::string text = "rank " + std::to_string(num_lead + dims.size()) + ": [";
  if (num_lead > 0) text += std::to_string(num_lead) + " leading axes, ";
  bool is_first = true;
  for (const Dim* dim : dims) {
    text += (is_first ? "" : ", ") + std::string(dim->name);
    is_first = false;
  }
  return text + "]";
}

void bind_dim(std::string_view name, const TensorSpec& spec, size_t axis, Dim& dim) {
  const int64_t size = spec.shape[axis];
  if (dim.size < 0) {
    dim.size = size;
    dim.bound_by = name;
  } else if (dim.size != size) {
    value_error(name, "shape " + show(spec.shape) + " with " + std::string(dim.name) + " " + std::to_string(size),
                std::string(dim.name) + " " + std::to_string(dim.size) + " as in " + std::string(dim.bound_by));
  }
}

}  // namespace

std::string show(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

void value_error(std::string_view tensor, const std::string& got, const std::string& expected) {
  throw ValueError(std::string(tensor) + ": got " + got + ", expected " + expected);
}

DType check_float_dtype(std::string_view name, const TensorSpec& spec) {
  if (!spec.present) value_error(name, "nothing", "a tensor");
  const DTypeInfo* dtype = find_dtype(spec.dtype);
  if (dtype == nullptr || !dtype->is_float) {
    throw TypeError(std::string(name) + ": got dtype " + spec.dtype + ", expected float32, float16 or bfloat16");
  }
  return dtype->dtype;
}

void check_head_dim(std::string_view tensor, std::string_view dim, int64_t size) {
  if (size < 1 || size > kMaxHeadDim) {
    value_error(tensor, std::string(dim) + " " + std::to_string(size), "1 to " + std::to_string(kMaxHeadDim));
  }
}

void check_head_counts(int64_t num_q_heads, int64_t num_kv_heads) {
  if (num_q_heads < 1) value_error("q", "num_q_heads 0", "1 or more");
  if (num_kv_heads < 1) value_error("k", "num_kv_heads 0", "1 or more");
  if (num_q_heads % num_kv_heads != 0) {
    value_error("q", "num_q_heads " + std::to_string(num_q_heads),
                "a multiple of num_kv_heads " + std::to_string(num_kv_heads) + " of k");
  }
}

void check_enumerator(std::string_view name, int value, int last, std::string_view type) {
  if (value > last) value_error(name, std::to_string(value), "one of heed::" + std::string(type));
}

void check_backend(Backend backend) {
  check_enumerator("backend", static_cast<int>(backend), static_cast<int>(Backend::kSm90), "Backend");
}

void check_absent(std::string_view name, const TensorSpec& spec, const std::string& expected) {
  if (spec.present) value_error(name, "a tensor", expected);
}

void check_finite(std::string_view name, double value) {
  if (!std::isfinite(value) || std::abs(value) > std::numeric_limits<float>::max()) {
    value_error(name, std::isnan(value) ? "nan" : std::to_string(value), "a finite number");
  }
}

void check_positive(std::string_view name, double value) {
  check_finite(name, value);
  if (value <= 0) value_error(name, std::to_string(value), "a positive number");
}

void check_softcap(double value) {
  check_finite("softcap", value);
  if (value < 0) value_error("softcap", std::to_string(value), "0 (off) or a positive number");
}

void OperandChecks::bind(std::string_view name, const TensorSpec& spec, std::span<Dim* const> dims,
                         std::string_view dtype, std::string_view whose_dtype) {
  if (!spec.present) value_error(name, "nothing", "a tensor");
  if (spec.dtype != dtype) {
    throw TypeError(std::string(name) + ": got dtype " + spec.dtype + ", expected " + std::string(dtype) +
                    (whose_dtype.empty() ? "" : " (the dtype of " + std::string(whose_dtype) + ")"));
  }
  const size_t num_lead = knows_lead_ ? lead.size() : std::max<size_t>(spec.shape.size(), dims.size()) - dims.size();
  if (spec.shape.size() > kMaxLeadAxes + dims.size()) {
    value_error(name, "rank " + std::to_string(spec.shape.size()),
                "at most " + std::to_string(kMaxLeadAxes) + " leading axes");
  }
  if (spec.shape.size() != num_lead + dims.size()) {
    value_error(name, "shape " + show(spec.shape) + " of rank " + std::to_string(spec.shape.size()),
                describe(dims, num_lead));
  }
  for (int64_t size : spec.shape) {
    if (size < 0) value_error(name, "shape " + show(spec.shape), "sizes of 0 or more");
  }
  if (!knows_lead_) lead.assign(spec.shape.begin(), spec.shape.begin() + static_cast<int64_t>(num_lead));
  knows_lead_ = true;
  for (size_t axis = 0; axis < num_lead; ++axis) bind_lead(name, spec, axis);
  size_t axis = num_lead;
  for (Dim* dim : dims) bind_dim(name, spec, axis++, *dim);
}

void OperandChecks::bind_lead(std::string_view name, const TensorSpec& spec, size_t axis) {
  const int64_t size = spec.shape[axis];
  if (lead[axis] == 1) lead[axis] = size;
  if (size != 1 && size != lead[axis]) {
    value_error(
        name,
        "shape " + show(spec.shape) + ": leading axis " + std::to_string(axis) + " of size " + std::to_string(size),
        "size " + std::to_string(lead[axis]) + " or 1");
  }
}

void check_sizes(std::string_view tensor, const std::vector<int64_t>& shape) {
  int64_t count = 8;
  for (int64_t size : shape) {
    // An empty tensor's other sizes are multiplied too, by kernels and by whoever makes strides.
    if (__builtin_mul_overflow(count, std::max<int64_t>(size, 1), &count)) {
      value_error(tensor, "shape " + show(shape), "at most 2^60 elements");
    }
  }
}

void check_problem_sizes(const AttentionProblem& problem) {
  const int64_t rows = problem.is_varlen ? 1 : problem.batch;
  check_sizes("k", append(problem.lead, {rows, problem.kv_len, problem.num_kv_heads, kMaxHeadDim}));
  check_sizes("q", append(problem.lead, {rows, problem.q_len, problem.num_q_heads, kMaxHeadDim}));
  check_sizes("cu_seqlens_q", append(problem.lead, {problem.batch, problem.num_q_heads}));
}

int64_t product(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

std::vector<int64_t> append(std::vector<int64_t> shape, std::initializer_list<int64_t> more) {
  shape.insert(shape.end(), more);
  return shape;
}

}  // namespace heed
