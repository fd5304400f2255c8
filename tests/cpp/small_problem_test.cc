// The problems of gated activations and of RMS norms: their texts, their checks, and what follows from their sizes.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>

#include "core/small_problems.h"
#include "small_problem_checks.h"

namespace heed {
namespace {

using test::message_of;
using test::refuses_or_parses_what_resembles;
using test::Shape;
using test::spec;

// ---------------------------------------------------------------------------------------------------------------------
// Gated activations.

ActAndMulRequest act_request(bool is_backward = false) {
  ActAndMulRequest request{.is_backward = is_backward};
  request.operands[ActAndMulProblem::kX] = spec("bfloat16", {3, 16, 14});
  if (is_backward) request.operands[ActAndMulProblem::kDout] = spec("bfloat16", {1, 16, 7});
  return request;
}

ActAndMulRequest parse_act(const std::string& text) { return parse_act_and_mul_request(text, false); }
ActAndMulRequest parse_act_bwd(const std::string& text) { return parse_act_and_mul_request(text, true); }

TEST(ActAndMulText, IsTheSchemaAndRoundTrips) {
  ActAndMulRequest request = act_request();
  EXPECT_EQ(to_text(request), "act_and_mul.v1;x=bfloat16[3,16,14];activation=silu;backend=auto");
  for (const Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
    request.activation = activation;
    EXPECT_EQ(parse_act(to_text(request)).activation, activation);
    refuses_or_parses_what_resembles(to_text(request), parse_act);
  }
  ActAndMulRequest backward = act_request(true);
  backward.activation = Activation::kGeluTanh;
  backward.backend = Backend::kSm80;
  EXPECT_EQ(to_text(backward),
            "act_and_mul_bwd.v1;x=bfloat16[3,16,14];dout=bfloat16[1,16,7];activation=gelu_tanh;backend=sm80");
  refuses_or_parses_what_resembles(to_text(backward), parse_act_bwd);
  EXPECT_THROW(parse_act(to_text(backward)), ValueError);
  EXPECT_THROW(parse_act_bwd(to_text(request)), ValueError);
}

TEST(ActAndMulProblem, BindsSizes) {
  const ActAndMulProblem problem = validate(act_request());
  EXPECT_EQ(problem.dtype, DType::kBFloat16);
  EXPECT_EQ(problem.lead, (Shape{3, 16}));
  EXPECT_EQ(problem.num_rows, 48);
  EXPECT_EQ(problem.hidden, 7);
  EXPECT_EQ(problem.out_shape(), (Shape{3, 16, 7}));
  EXPECT_EQ(problem.num_inputs(), 1);
  ActAndMulRequest request = act_request(true);
  request.operands[ActAndMulProblem::kX].shape = {1, 16, 14};
  request.operands[ActAndMulProblem::kDout].shape = {5, 1, 7};
  const ActAndMulProblem backward = validate(request);
  EXPECT_EQ(backward.out_shape(), (Shape{5, 16, 14}));
  EXPECT_EQ(backward.num_inputs(), 2);
}

TEST(ActAndMulProblem, AcceptsRowsThatAreNotThere) {
  ActAndMulRequest request = act_request();
  request.operands[ActAndMulProblem::kX].shape = {0, 2};
  EXPECT_EQ(validate(request).num_rows, 0);
  request.operands[ActAndMulProblem::kX].shape = {2};
  EXPECT_EQ(validate(request).num_rows, 1);
  EXPECT_EQ(validate(request).out_shape(), (Shape{1}));
}

TEST(ActAndMulProblem, NamesWhatIsWrong) {
  ActAndMulRequest request = act_request();
  TensorSpec& x = request.operands[ActAndMulProblem::kX];
  for (const int64_t width : {0, 1, 7}) {
    x.shape = {4, width};
    EXPECT_EQ(message_of<ValueError>(request),
              "x: got shape [4, " + std::to_string(width) + "] with a last axis of " + std::to_string(width) +
                  ", expected an even size of 2 or more: the gates, then what they are multiplied with");
  }
  x.shape = {};
  EXPECT_EQ(message_of<ValueError>(request), "x: got shape [] of rank 0, expected rank 1: [2 * hidden]");
  x = spec("float64", {4, 8});
  EXPECT_EQ(message_of<TypeError>(request), "x: got dtype float64, expected float32, float16 or bfloat16");
  x = {};
  EXPECT_EQ(message_of<ValueError>(request), "x: got nothing, expected a tensor");
  x = spec("float16", {1, 1, 1, 1, 1, 1, 1, 1, 1, 8});
  EXPECT_EQ(message_of<ValueError>(request), "x: got rank 10, expected at most 8 leading axes");
  x = spec("float16", {int64_t{1} << 31, int64_t{1} << 31});
  EXPECT_EQ(message_of<ValueError>(request), "x: got shape [2147483648, 2147483648], expected at most 2^60 elements");

  request = act_request(true);
  TensorSpec& dout = request.operands[ActAndMulProblem::kDout];
  dout.shape = {1, 16, 14};
  EXPECT_EQ(message_of<ValueError>(request),
            "dout: got shape [1, 16, 14] with hidden (half of the last axis of x) 14, expected hidden (half of the "
            "last axis of x) 7 as in x");
  dout = spec("float32", {1, 16, 7});
  EXPECT_EQ(message_of<TypeError>(request), "dout: got dtype float32, expected bfloat16 (the dtype of x)");
  dout = {};
  EXPECT_EQ(message_of<ValueError>(request), "dout: got nothing, expected a tensor");
  request.activation = static_cast<Activation>(3);
  dout = spec("bfloat16", {3, 16, 7});
  EXPECT_EQ(message_of<ValueError>(request), "activation: got 3, expected one of heed::Activation");
  request = act_request(true);
  request.is_backward = false;
  EXPECT_EQ(message_of<ValueError>(request), "dout: got a tensor, expected nothing in the forward pass");
  request = act_request();
  request.backend = static_cast<Backend>(4);
  EXPECT_EQ(message_of<ValueError>(request), "backend: got 4, expected one of heed::Backend");
}

// ---------------------------------------------------------------------------------------------------------------------
// RMS norms.

RmsNormRequest norm_request() {
  RmsNormRequest request{.num_row_axes = 2};
  request.operands[RmsNormProblem::kX] = spec("float32", {3, 1, 16, 5});
  request.operands[RmsNormProblem::kWeight] = spec("float32", {1, 5});
  request.operands[RmsNormProblem::kResidual] = spec("float32", {1, 1, 16, 5});
  return request;
}

RmsNormRequest norm_bwd_request() {
  RmsNormRequest request = norm_request();
  request.is_backward = true;
  request.operands[RmsNormProblem::kDout] = request.operands[RmsNormProblem::kX];
  std::swap(request.operands[RmsNormProblem::kResidual], request.operands[RmsNormProblem::kDsum]);
  return request;
}

RmsNormRequest parse_norm(const std::string& text) { return parse_rms_norm_request(text, false); }
RmsNormRequest parse_norm_bwd(const std::string& text) { return parse_rms_norm_request(text, true); }

TEST(RmsNormText, IsTheSchemaAndRoundTrips) {
  RmsNormRequest request = norm_request();
  request.eps = 0x1p-20;
  EXPECT_EQ(to_text(request),
            "rms_norm.v1;x=float32[3,1,16,5];weight=float32[1,5];residual=float32[1,1,16,5];rows=2;eps=0x1p-20;"
            "backend=auto");
  refuses_or_parses_what_resembles(to_text(request), parse_norm);
  EXPECT_EQ(to_text(norm_bwd_request()),
            "rms_norm_bwd.v1;x=float32[3,1,16,5];weight=float32[1,5];dout=float32[3,1,16,5];dsum=float32[1,1,16,5];"
            "rows=2;eps=0x1.0c6f7a0b5ed8dp-20;backend=auto");
  refuses_or_parses_what_resembles(to_text(norm_bwd_request()), parse_norm_bwd);
  EXPECT_THROW(parse_norm_bwd(to_text(request)), ValueError);
  EXPECT_THROW(parse_norm(to_text(norm_bwd_request())), ValueError);
}

TEST(RmsNormProblem, BindsSizes) {
  const RmsNormProblem problem = validate(norm_request());
  EXPECT_EQ(problem.lead, (Shape{3}));
  EXPECT_EQ(problem.rows, (Shape{1, 16}));
  EXPECT_EQ(problem.num_rows, 16);
  EXPECT_EQ(problem.hidden, 5);
  EXPECT_EQ(problem.x_shape(), (Shape{3, 1, 16, 5}));
  EXPECT_EQ(problem.num_inputs(), 3);
  EXPECT_EQ(problem.num_outputs(), 2);
  const RmsNormProblem backward = validate(norm_bwd_request());
  EXPECT_EQ(backward.num_inputs(), 4);
  EXPECT_EQ(backward.num_outputs(), 3);
  EXPECT_EQ(backward.dweight_shape(), (Shape{3, 5}));
  EXPECT_EQ(backward.workspace_shape(40), (Shape{3, 40}));
  EXPECT_EQ(backward.num_heads_in_all(), 3);
  EXPECT_TRUE(backward.has_dsum);
}

TEST(RmsNormProblem, LeadingAxesAreThoseOfTheWeight) {
  RmsNormRequest request = norm_request();
  request.operands[RmsNormProblem::kWeight].shape = {4, 3, 5};
  request.operands[RmsNormProblem::kX].shape = {1, 3, 16, 5};
  request.operands[RmsNormProblem::kResidual].shape = {4, 1, 16, 5};
  request.num_row_axes = 1;
  EXPECT_EQ(validate(request).x_shape(), (Shape{4, 3, 16, 5}));
  request.num_row_axes = 2;
  EXPECT_EQ(message_of<ValueError>(request),
            "weight: got shape [4, 3, 5] of rank 3, expected rank 2: [1 leading axes, hidden]");
  request = {.num_row_axes = 0};
  request.operands[RmsNormProblem::kX] = spec("float32", {1});
  request.operands[RmsNormProblem::kWeight] = spec("float32", {1});
  EXPECT_EQ(validate(request).num_rows, 1);
  request.operands[RmsNormProblem::kX].shape = {0, 7, 1};
  request.num_row_axes = 2;
  EXPECT_EQ(validate(request).num_rows, 0);
}

TEST(RmsNormProblem, NamesWhatIsWrong) {
  RmsNormRequest request = norm_request();
  request.operands[RmsNormProblem::kResidual].shape = {1, 1, 15, 5};
  EXPECT_EQ(message_of<ValueError>(request),
            "residual: got shape [1, 1, 15, 5] with rows_1 15, expected rows_1 16 as in x");
  request = norm_request();
  request.operands[RmsNormProblem::kResidual].dtype = "float16";
  EXPECT_EQ(message_of<TypeError>(request), "residual: got dtype float16, expected float32 (the dtype of x)");
  request = norm_request();
  request.operands[RmsNormProblem::kWeight] = spec("float32", {1, 6});
  EXPECT_EQ(message_of<ValueError>(request), "weight: got shape [1, 6] with hidden 6, expected hidden 5 as in x");
  request.operands[RmsNormProblem::kWeight] = spec("bfloat16", {1, 5});
  EXPECT_EQ(message_of<TypeError>(request), "weight: got dtype bfloat16, expected float32 (the dtype of x)");
  request = norm_request();
  request.operands[RmsNormProblem::kX] = spec("int32", {3, 1, 16, 5});
  EXPECT_EQ(message_of<TypeError>(request), "x: got dtype int32, expected float32, float16 or bfloat16");
  request = norm_request();
  request.eps = -1e-3;
  EXPECT_EQ(message_of<ValueError>(request), "eps: got -0.001000, expected 0 or a positive number");
  request.eps = NAN;
  EXPECT_EQ(message_of<ValueError>(request), "eps: got nan, expected a finite number");
  request.eps = 0;
  EXPECT_EQ(message_of<ValueError>(request), "");
  request.num_row_axes = 12;
  EXPECT_EQ(message_of<ValueError>(request), "x: got 12 axes that weight lacks, expected 0 to 11");
  request.num_row_axes = -1;
  EXPECT_EQ(message_of<ValueError>(request), "x: got -1 axes that weight lacks, expected 0 to 11");
  request = {};
  request.operands[RmsNormProblem::kX] = request.operands[RmsNormProblem::kWeight] = spec("float32", {0});
  EXPECT_EQ(message_of<ValueError>(request), "x: got shape [0], expected a last axis of 1 or more");

  request = norm_bwd_request();
  request.operands[RmsNormProblem::kDout] = {};
  EXPECT_EQ(message_of<ValueError>(request), "dout: got nothing, expected a tensor");
  request = norm_bwd_request();
  request.operands[RmsNormProblem::kResidual] = request.operands[RmsNormProblem::kX];
  EXPECT_EQ(message_of<ValueError>(request),
            "residual: got a tensor, expected nothing in the backward pass: x is the sum already");
  request = norm_bwd_request();
  request.is_backward = false;
  EXPECT_EQ(message_of<ValueError>(request), "dout: got a tensor, expected nothing in the forward pass");
}

}  // namespace
}  // namespace heed
