// Checks of operands against each other: dtypes, ranks and sizes, where the first operand that has a dimension binds
// its size. Every message names the tensor, what it got and what was expected. Internal to src/core.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/problem.h"

namespace heed {

inline constexpr int64_t kMaxHeadDim = 256;

std::string show(const std::vector<int64_t>& shape);

[[noreturn]] void value_error(std::string_view tensor, const std::string& got, const std::string& expected);

// The dtype of an operand that has to be one of the float dtypes. Throws TypeError.
DType check_float_dtype(std::string_view name, const TensorSpec& spec);
void check_head_dim(std::string_view tensor, std::string_view dim, int64_t size);
// Query heads and KV heads, of q and k: 1 or more of both, and the first a multiple of the second.
void check_head_counts(int64_t num_q_heads, int64_t num_kv_heads);
// An enumerator that the type system lets through.
void check_enumerator(std::string_view name, int value, int last, std::string_view type);
void check_backend(Backend backend);
void check_absent(std::string_view name, const TensorSpec& spec, const std::string& expected);

// Options. `check_finite`: a number that float32 holds.
void check_finite(std::string_view name, double value);
void check_positive(std::string_view name, double value);
void check_softcap(double value);

// One name of a dimension and the operand that bound it, so that a later mismatch can name both.
struct Dim {
  std::string_view name = {};
  int64_t size = -1;
  std::string_view bound_by = {};
};

class OperandChecks {
 public:
  // Leading axes that are known already; the first operand that is bound adds to them.
  OperandChecks() = default;
  explicit OperandChecks(std::vector<int64_t> known) : lead(std::move(known)), knows_lead_(true) {}

  // Checks rank and dtype of an operand, binds its own (trailing) axes to `dims` and its leading axes to `lead`.
  void bind(std::string_view name, const TensorSpec& spec, std::initializer_list<Dim*> dims, std::string_view dtype,
            std::string_view whose_dtype = "") {
    bind(name, spec, std::span(dims.begin(), dims.size()), dtype, whose_dtype);
  }
  void bind(std::string_view name, const TensorSpec& spec, std::span<Dim* const> dims, std::string_view dtype,
            std::string_view whose_dtype = "");

  std::vector<int64_t> lead;  // broadcast sizes so far

 private:
  void bind_lead(std::string_view name, const TensorSpec& spec, size_t axis);

  bool knows_lead_ = false;
};

// Every tensor that a problem implies has a number of elements that fits 64 bits with room for byte offsets.
void check_sizes(std::string_view tensor, const std::vector<int64_t>& shape);
void check_problem_sizes(const AttentionProblem& problem);

// The product of sizes. Throws nothing: check_sizes() comes first.
int64_t product(const std::vector<int64_t>& sizes);

std::vector<int64_t> append(std::vector<int64_t> shape, std::initializer_list<int64_t> more);

}  // namespace heed
