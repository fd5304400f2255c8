// The problem of RMS norms: its text and its checks.
#include <algorithm>

#include "core/operand_checks.h"
#include "core/problem_text.h"
#include "core/small_problems.h"

namespace heed {
namespace {

constexpr std::string_view kSchema = "rms_norm.v1", kBackwardSchema = "rms_norm_bwd.v1";

}  // namespace

std::vector<int64_t> RmsNormProblem::x_shape() const {
  std::vector<int64_t> shape = lead;
  shape.insert(shape.end(), rows.begin(), rows.end());
  return append(std::move(shape), {hidden});
}

std::vector<int64_t> RmsNormProblem::dweight_shape() const { return append(lead, {hidden}); }

std::vector<int64_t> RmsNormProblem::workspace_shape(int64_t floats_per_index) const {
  return append(lead, {floats_per_index});
}

int RmsNormProblem::num_inputs() const {
  return static_cast<int>(
      std::count_if(operands.begin(), operands.end(), [](const TensorSpec& spec) { return spec.present; }));
}

int64_t RmsNormProblem::num_heads_in_all() const { return product(lead); }

std::string to_text(const RmsNormRequest& request) {
  return std::string(request.is_backward ? kBackwardSchema : kSchema) +
         operand_fields(RmsNormProblem::kNames, request.operands) + ";rows=" + std::to_string(request.num_row_axes) +
         ";eps=" + to_hex(request.eps) + backend_field(request.backend);
}

RmsNormRequest parse_rms_norm_request(std::string_view text, bool is_backward) {
  RmsNormRequest request;
  request.is_backward = is_backward;
  TextReader reader(text);
  reader.expect(is_backward ? kBackwardSchema : kSchema);
  read_operands(reader, RmsNormProblem::kNames, request.operands);
  reader.expect(";rows=");
  request.num_row_axes = reader.integer();
  reader.expect(";eps=");
  request.eps = reader.real();
  request.backend = read_backend(reader);
  reader.expect_end();
  return request;
}

RmsNormProblem validate(const RmsNormRequest& request) {
  const TensorSpec& x = request.operands[RmsNormProblem::kX];
  const TensorSpec& weight = request.operands[RmsNormProblem::kWeight];
  const TensorSpec& residual = request.operands[RmsNormProblem::kResidual];
  const TensorSpec& dout = request.operands[RmsNormProblem::kDout];
  const TensorSpec& dsum = request.operands[RmsNormProblem::kDsum];
  RmsNormProblem problem;
  problem.dtype = check_float_dtype("x", x);
  if (!weight.present) value_error("weight", "nothing", "a tensor");  // first: it tells which axes of x are rows
  if (request.num_row_axes < 0 || request.num_row_axes >= kMaxRank) {
    value_error("x", std::to_string(request.num_row_axes) + " axes that weight lacks",
                "0 to " + std::to_string(kMaxRank - 1));
  }
  const auto num_row_axes = static_cast<size_t>(request.num_row_axes);
  // One dimension for each axis of rows, and the last one.
  std::vector<std::string> names(num_row_axes);
  std::vector<Dim> dims(num_row_axes + 1);
  std::vector<Dim*> axes(num_row_axes + 1);
  for (size_t i = 0; i <= num_row_axes; ++i) {
    if (i < num_row_axes) names[i] = "rows_" + std::to_string(i);
    dims[i].name = i < num_row_axes ? std::string_view(names[i]) : "hidden";
    axes[i] = &dims[i];
  }

  OperandChecks checks;
  const auto bind_like_x = [&](std::string_view name, const TensorSpec& spec) {
    checks.bind(name, spec, std::span<Dim* const>(axes), x.dtype, &spec == &x ? "" : "x");
  };
  bind_like_x("x", x);
  checks.bind("weight", weight, {axes.back()}, x.dtype, "x");
  if (residual.present) bind_like_x("residual", residual);
  if (request.is_backward) {
    check_absent("residual", residual, "nothing in the backward pass: x is the sum already");
    bind_like_x("dout", dout);
    if (dsum.present) bind_like_x("dsum", dsum);
  } else {
    check_absent("dout", dout, "nothing in the forward pass");
    check_absent("dsum", dsum, "nothing in the forward pass");
  }
  problem.hidden = dims.back().size;
  if (problem.hidden < 1) value_error("x", "shape " + show(x.shape), "a last axis of 1 or more");
  check_finite("eps", request.eps);
  if (request.eps < 0) value_error("eps", std::to_string(request.eps), "0 or a positive number");
  check_backend(request.backend);

  problem.lead = checks.lead;
  for (size_t i = 0; i < num_row_axes; ++i) problem.rows.push_back(dims[i].size);
  check_sizes("x", problem.x_shape());
  problem.num_rows = product(problem.rows);
  problem.eps = request.eps;
  problem.has_residual = residual.present;
  problem.has_dsum = dsum.present;
  problem.is_backward = request.is_backward;
  problem.backend = request.backend;
  problem.operands = request.operands;
  return problem;
}

}  // namespace heed
