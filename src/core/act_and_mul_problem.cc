// The problem of gated activations: its text and its checks.
#include "core/operand_checks.h"
#include "core/problem_text.h"
#include "core/small_problems.h"

namespace heed {
namespace {

constexpr std::string_view kSchema = "act_and_mul.v1", kBackwardSchema = "act_and_mul_bwd.v1";

}  // namespace

std::vector<int64_t> ActAndMulProblem::out_shape() const { return append(lead, {is_backward ? 2 * hidden : hidden}); }

std::string to_text(const ActAndMulRequest& request) {
  return std::string(request.is_backward ? kBackwardSchema : kSchema) +
         operand_fields(ActAndMulProblem::kNames, request.operands) +
         ";activation=" + std::string(kActivationNames[static_cast<int>(request.activation)]) +
         backend_field(request.backend);
}

ActAndMulRequest parse_act_and_mul_request(std::string_view text, bool is_backward) {
  ActAndMulRequest request;
  request.is_backward = is_backward;
  TextReader reader(text);
  reader.expect(is_backward ? kBackwardSchema : kSchema);
  read_operands(reader, ActAndMulProblem::kNames, request.operands);
  reader.expect(";activation=");
  // The longest first: one name is the beginning of another.
  constexpr std::string_view kLongestFirst[] = {kActivationNames[2], kActivationNames[1], kActivationNames[0]};
  request.activation = static_cast<Activation>(2 - reader.one_of(kLongestFirst, "silu, gelu or gelu_tanh"));
  request.backend = read_backend(reader);
  reader.expect_end();
  return request;
}

ActAndMulProblem validate(const ActAndMulRequest& request) {
  const auto& [x, dout] = request.operands;
  ActAndMulProblem problem;
  problem.dtype = check_float_dtype("x", x);
  OperandChecks checks;
  Dim width{"2 * hidden"};
  checks.bind("x", x, {&width}, x.dtype);
  if (width.size < 2 || width.size % 2 != 0) {
    value_error("x", "shape " + show(x.shape) + " with a last axis of " + std::to_string(width.size),
                "an even size of 2 or more: the gates, then what they are multiplied with");
  }
  Dim hidden{"hidden (half of the last axis of x)", width.size / 2, "x"};
  if (request.is_backward) {
    checks.bind("dout", dout, {&hidden}, x.dtype, "x");
  } else {
    check_absent("dout", dout, "nothing in the forward pass");
  }
  check_enumerator("activation", static_cast<int>(request.activation), static_cast<int>(Activation::kGeluTanh),
                   "Activation");
  check_backend(request.backend);
  check_sizes("x", append(checks.lead, {width.size}));

  problem.lead = checks.lead;
  problem.num_rows = product(checks.lead);
  problem.hidden = hidden.size;
  problem.activation = request.activation;
  problem.is_backward = request.is_backward;
  problem.backend = request.backend;
  problem.operands = request.operands;
  return problem;
}

}  // namespace heed
