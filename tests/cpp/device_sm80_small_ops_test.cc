// The device code of the GPU kernels of gated activations and RMS norms, run on the CPU
// (device_emulation/) with the parameters that the host side makes, and compared with float64 by the one tolerance
// rule.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "attention_oracle.h"
#include "core/small_problems.h"
#include "cuda/device/sm80_act_and_mul.cuh"
#include "cuda/device/sm80_rms_norm.cuh"
#include "cuda/device/sm80_rms_norm_bwd.cuh"
#include "cuda/sm80_act_and_mul.h"
#include "cuda/sm80_rms_norm.h"
#include "emulated_rows.h"
#include "guarded.h"
#include "ops/views.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary
using cuda::Element;

// ---------------------------------------------------------------------------------------------------------------------
// Gated activations.

constexpr Activation activation_of(cuda::Gate gate) {
  return gate == cuda::Gate::kSilu   ? Activation::kSilu
         : gate == cuda::Gate::kGelu ? Activation::kGelu
                                     : Activation::kGeluTanh;
}

template <class Real>
struct Gated {
  Real value, slope;
};
template <class Real>
Gated<Real> gated(Activation activation, Real x) {
  constexpr double kPi = 3.14159265358979323846;
  if (activation == Activation::kSilu) {
    const Real sigma = 1 / (1 + std::exp(-x));
    return {x * sigma, sigma * (1 + x * (1 - sigma))};
  }
  if (activation == Activation::kGelu) {
    const Real phi = std::erfc(-x / std::sqrt(Real{2})) / 2;
    return {x * phi, phi + x * std::exp(-x * x / 2) / static_cast<Real>(std::sqrt(2 * kPi))};
  }
  const Real factor = static_cast<Real>(std::sqrt(2 / kPi));
  const Real u = factor * (x + static_cast<Real>(0.044715) * x * x * x);
  const Real slope_of_u = factor * (1 + 3 * static_cast<Real>(0.044715) * x * x);
  // (1 + tanh u) / 2 and (1 - tanh u) / 2, without cancellation.
  const Real sigma = 1 / (1 + std::exp(-2 * u));
  const Real rest = 1 / (1 + std::exp(2 * u));
  return {x * sigma, sigma + x * sigma * rest * 2 * slope_of_u};
}

// out, or dx if `dout` is given; row-major.
template <class Real>
std::vector<double> act_and_mul(Activation activation, const Tensor& x, const Tensor* dout, const Tensor& result) {
  const int64_t hidden = x.view.shape[x.view.rank - 1] / 2;
  const int64_t width = dout == nullptr ? hidden : 2 * hidden;
  std::vector<double> all(static_cast<size_t>(result.count()));
  const auto at = [&](const Tensor& tensor, int64_t row, int64_t column) {
    const int64_t columns = tensor.view.shape[tensor.view.rank - 1];
    return static_cast<Real>(tensor.get(own_row(tensor, result, row) * columns + column));
  };
  for (int64_t row = 0; row < result.count() / width; ++row) {
    const auto store = [&](int64_t column, Real value) {
      all[static_cast<size_t>(row * width + column)] =
          rounded(static_cast<double>(value), x.view.dtype, sizeof(Real) == 4);
    };
    for (int64_t i = 0; i < hidden; ++i) {
      const Gated<Real> gate = gated(activation, at(x, row, i));
      const Real factor = at(x, row, hidden + i);
      if (dout == nullptr) {
        store(i, gate.value * factor);
      } else {
        const Real gradient = at(*dout, row, i);
        store(i, gradient * factor * gate.slope);
        store(hidden + i, gradient * gate.value);
      }
    }
  }
  return all;
}

struct ActCase {
  Shape x_shape, dout_shape{};  // dout_shape: backward
  Layout layout = Layout::kContiguous;
  std::function<void(Tensor& x)> edit{};
};

template <cuda::Sm80ActAndMulSpec kSpec>
void expect_act(const ActCase& c) {
  const DType dtype = dtype_of(kSpec.element);
  constexpr Activation kActivation = activation_of(kSpec.gate);
  Tensor x = random_tensor(dtype, c.x_shape, 1, c.layout);
  if (c.edit) c.edit(x);
  Tensor dout;
  ActAndMulRequest request;
  request.activation = kActivation;
  request.is_backward = kSpec.is_backward;
  request.operands[ActAndMulProblem::kX] = spec_of("x", x.view);
  if (kSpec.is_backward) {
    dout = random_tensor(dtype, c.dout_shape, 2, c.layout);
    request.operands[ActAndMulProblem::kDout] = spec_of("dout", dout.view);
  }
  const ActAndMulProblem problem = validate(request);
  Tensor result(dtype, problem.out_shape(), c.layout);
  const auto guards = guard(c.layout, {&x, &dout, &result});
  const Tensor* given_dout = kSpec.is_backward ? &dout : nullptr;
  const std::vector<double> oracle = act_and_mul<double>(kActivation, x, given_dout, result);
  const std::vector<double> naive = act_and_mul<float>(kActivation, x, given_dout, result);
  cuda::Sm80ActAndMulPlan plan{};
  if constexpr (kSpec.is_backward) {
    plan = cuda::plan_sm80_act_and_mul_bwd(problem, {.x = x.view, .dout = dout.view, .dx = result.view});
  } else {
    plan = cuda::plan_sm80_act_and_mul(problem, {.x = x.view, .out = result.view});
  }
  ASSERT_EQ(plan.spec, kSpec) << "the host chose another kernel";
  run_blocks<cuda::Sm80ActAndMul<kSpec>>(plan.params, plan.num_blocks);
  expect_close(result, naive, oracle, dtype, problem.out_shape().back(), "act_and_mul");
}

using ActSpec = cuda::Sm80ActAndMulSpec;
constexpr ActSpec kActBf16{.element = Element::kBFloat16};
constexpr ActSpec kActBf16Bwd{.element = Element::kBFloat16, .is_backward = true};
constexpr ActSpec kActF32{.element = Element::kFloat32};

TEST(DeviceSm80ActAndMulTest, RowsThatFillNoBlock) { expect_act<kActBf16>({.x_shape = {5, 3, 2 * 136}}); }
TEST(DeviceSm80ActAndMulTest, OddRows) {
  expect_act<ActSpec{.element = Element::kBFloat16, .is_aligned = false}>({.x_shape = {13, 2 * 101}});
  expect_act<ActSpec{.element = Element::kFloat32, .is_aligned = false}>({.x_shape = {3, 2}});
}
TEST(DeviceSm80ActAndMulTest, OneRow) { expect_act<ActSpec{.element = Element::kFloat16}>({.x_shape = {2 * 4096}}); }
TEST(DeviceSm80ActAndMulTest, Strides) {
  expect_act<ActSpec{.element = Element::kFloat16, .is_aligned = false}>(
      {.x_shape = {2, 7, 2 * 24}, .layout = Layout::kSpacedDims});
  expect_act<kActF32>({.x_shape = {3, 5, 4, 2 * 12}, .layout = Layout::kHeadsFirst});
  expect_act<kActF32>({.x_shape = {2, 6, 3, 2 * 8}, .layout = Layout::kReversedTokens});
}
TEST(DeviceSm80ActAndMulTest, Gelu) {
  expect_act<ActSpec{.element = Element::kFloat32, .gate = cuda::Gate::kGelu}>({.x_shape = {40, 2 * 8}});
  expect_act<ActSpec{.element = Element::kFloat16, .gate = cuda::Gate::kGelu}>({.x_shape = {40, 2 * 8}});
  expect_act<ActSpec{.element = Element::kFloat32, .gate = cuda::Gate::kGelu, .is_backward = true}>(
      {.x_shape = {40, 2 * 8}, .dout_shape = {40, 8}});
  expect_act<ActSpec{.element = Element::kFloat16, .gate = cuda::Gate::kGelu, .is_backward = true}>(
      {.x_shape = {40, 2 * 8}, .dout_shape = {40, 8}});
}
TEST(DeviceSm80ActAndMulTest, GeluTanh) {
  expect_act<ActSpec{.element = Element::kFloat32, .gate = cuda::Gate::kGeluTanh}>({.x_shape = {40, 2 * 8}});
  expect_act<ActSpec{.element = Element::kBFloat16, .gate = cuda::Gate::kGeluTanh, .is_backward = true}>(
      {.x_shape = {40, 2 * 8}, .dout_shape = {40, 8}});
}
TEST(DeviceSm80ActAndMulTest, Backward) {
  expect_act<kActBf16Bwd>({.x_shape = {7, 2 * 40}, .dout_shape = {7, 40}});
  expect_act<ActSpec{.element = Element::kFloat32, .is_aligned = false, .is_backward = true}>(
      {.x_shape = {9, 2 * 5}, .dout_shape = {9, 5}});
}
TEST(DeviceSm80ActAndMulTest, BackwardBroadcasts) {
  expect_act<kActBf16Bwd>({.x_shape = {1, 5, 2 * 16}, .dout_shape = {3, 1, 16}});
}

// Every gate of a 16-bit dtype up to 1000, one to a row: the rule then looks at every value by itself, in the tails
// too.
template <Element kElement, cuda::Gate kGate>
void expect_every_gate() {
  constexpr int64_t kCount = 1 << 16;
  const auto edit = [](Tensor& x) {
    for (int64_t i = 0; i < kCount; ++i) {
      static_cast<uint16_t*>(x.view.data)[2 * i] = static_cast<uint16_t>(i);
      if (!std::isfinite(x.get(2 * i)) || std::abs(x.get(2 * i)) > 1e3) x.set(2 * i, 0.5);
      x.set(2 * i + 1, 1.0);
    }
  };
  expect_act<ActSpec{.element = kElement, .gate = kGate, .is_aligned = false}>({.x_shape = {kCount, 2}, .edit = edit});
  expect_act<ActSpec{.element = kElement, .gate = kGate, .is_aligned = false, .is_backward = true}>(
      {.x_shape = {kCount, 2}, .dout_shape = {kCount, 1}, .edit = edit});
}
TEST(DeviceSm80ActAndMulTest, EveryGate) {
  expect_every_gate<Element::kBFloat16, cuda::Gate::kSilu>();
  expect_every_gate<Element::kBFloat16, cuda::Gate::kGelu>();
  expect_every_gate<Element::kBFloat16, cuda::Gate::kGeluTanh>();
  expect_every_gate<Element::kFloat16, cuda::Gate::kSilu>();
  expect_every_gate<Element::kFloat16, cuda::Gate::kGelu>();
  expect_every_gate<Element::kFloat16, cuda::Gate::kGeluTanh>();
}
TEST(DeviceSm80ActAndMulTest, NotFinite) {
  const auto edit = [](Tensor& x) {
    const double values[] = {kInfinity, kNaN, 3e38, -3e38, 1e20, -1e20};
    for (int64_t i = 0; i < 6; ++i) {
      x.set(i, values[i]);
      x.set(8 + i, 1.0);
    }
  };
  expect_act<kActF32>({.x_shape = {1, 16}, .edit = edit});
  expect_act<kActBf16>({.x_shape = {1, 16}, .edit = edit});
  expect_act<ActSpec{.element = Element::kBFloat16, .gate = cuda::Gate::kGelu}>({.x_shape = {1, 16}, .edit = edit});
  expect_act<ActSpec{.element = Element::kBFloat16, .gate = cuda::Gate::kGeluTanh}>({.x_shape = {1, 16}, .edit = edit});
}
TEST(DeviceSm80ActAndMulTest, NoRows) {
  ActAndMulRequest request;
  Tensor x(DType::kFloat32, {0, 16}), out(DType::kFloat32, {0, 8});
  request.operands[ActAndMulProblem::kX] = spec_of("x", x.view);
  EXPECT_EQ(cuda::plan_sm80_act_and_mul(validate(request), {.x = x.view, .out = out.view}).num_blocks, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// RMS norms.

// What the forward and the backward kernel should give. Tensors are [rows, H].
struct Norm {
  std::vector<double> out, sum, dx, dweight;
};
template <class Real>
Norm rms_norm(const Tensor& x, const Tensor& weight, const Tensor* addend, const Tensor* dout, double eps) {
  const bool is_naive = sizeof(Real) == 4;
  const DType dtype = x.view.dtype;
  const int64_t hidden = x.view.shape[x.view.rank - 1];
  const int64_t rows = x.count() / hidden;
  Norm all;
  std::vector<Real> dweight(static_cast<size_t>(hidden));
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<Real> s(static_cast<size_t>(hidden));
    Real squares = 0;
    for (int64_t i = 0; i < hidden; ++i) {
      s[i] = static_cast<Real>(x.get(row * hidden + i));
      if (addend != nullptr && dout == nullptr) {
        s[i] = static_cast<Real>(round_to(s[i] + static_cast<Real>(addend->get(row * hidden + i)), dtype));
        all.sum.push_back(s[i]);
      }
      squares += s[i] * s[i];
    }
    const Real inverse = 1 / std::sqrt(squares / static_cast<Real>(hidden) + static_cast<Real>(eps));
    Real product = 0;
    for (int64_t i = 0; i < hidden; ++i) {
      const Real w = static_cast<Real>(weight.get(i));
      all.out.push_back(rounded(static_cast<double>(s[i] * inverse * w), dtype, is_naive));
      if (dout != nullptr) product += static_cast<Real>(dout->get(row * hidden + i)) * w * s[i] * inverse;
    }
    if (dout == nullptr) continue;
    for (int64_t i = 0; i < hidden; ++i) {
      const Real d = static_cast<Real>(dout->get(row * hidden + i));
      const Real xhat = s[i] * inverse;
      Real dx = (d * static_cast<Real>(weight.get(i)) - xhat * product / static_cast<Real>(hidden)) * inverse;
      if (addend != nullptr) dx += static_cast<Real>(addend->get(row * hidden + i));
      all.dx.push_back(rounded(static_cast<double>(dx), dtype, is_naive));
      dweight[i] += d * xhat;
    }
  }
  all.dweight.assign(dweight.begin(), dweight.end());
  return all;
}

constexpr cuda::Sm80RmsNormSpec norm_spec(Element element, int64_t hidden, bool is_aligned, bool has_addend,
                                          bool is_backward) {
  return cuda::with_row_length({.element = element, .is_aligned = is_aligned, .has_addend = has_addend}, hidden,
                               is_backward);
}

// As a larger call would have them: several steps for each block. There are no leading axes.
void set_rows_per_block(cuda::Sm80RmsNormPlan& plan, int rows) {
  plan.num_blocks = (plan.params.num_rows + rows - 1) / rows;
  plan.params.rows_per_block = rows;
  plan.params.blocks_per_lead = cuda::make_divisor(static_cast<unsigned>(plan.num_blocks));
}

template <Element kElement, int64_t kHidden, bool kIsAligned, bool kHasResidual = false>
void expect_norm(Shape rows, Layout layout = Layout::kContiguous, int rows_per_block = 0) {
  constexpr cuda::Sm80RmsNormSpec kSpec = norm_spec(kElement, kHidden, kIsAligned, kHasResidual, false);
  constexpr DType kDtype = kElement == Element::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
  static_assert(kElement != Element::kFloat16);
  RmsNormRequest request;
  request.num_row_axes = static_cast<int64_t>(rows.size());
  request.eps = 1e-5;
  rows.push_back(kHidden);
  Tensor x = random_tensor(kDtype, rows, 3, layout);
  Tensor weight = random_tensor(kDtype, {kHidden}, 4);
  Tensor out(kDtype, rows, layout);
  const auto guards = guard(layout, {&x, &weight, &out});
  Tensor residual, sum;
  request.operands[RmsNormProblem::kX] = spec_of("x", x.view);
  request.operands[RmsNormProblem::kWeight] = spec_of("weight", weight.view);
  RmsNormArgs args;
  args.x = x.view, args.weight = weight.view, args.out = out.view;
  if (kHasResidual) {
    residual = random_tensor(kDtype, rows, 5);
    sum = Tensor(kDtype, rows);
    request.operands[RmsNormProblem::kResidual] = spec_of("residual", residual.view);
    args.residual = residual.view;
    args.sum = sum.view;
  }
  cuda::Sm80RmsNormPlan plan = cuda::plan_sm80_rms_norm(validate(request), args);
  if (rows_per_block > 0) set_rows_per_block(plan, rows_per_block);
  ASSERT_EQ(plan.spec, kSpec) << "the host chose another kernel";
  run_blocks<cuda::Sm80RmsNorm<kSpec>>(plan.params, plan.num_blocks);
  const Tensor* addend = kHasResidual ? &residual : nullptr;
  const Norm oracle = rms_norm<double>(x, weight, addend, nullptr, 1e-5);
  const Norm naive = rms_norm<float>(x, weight, addend, nullptr, 1e-5);
  expect_close(out, naive.out, oracle.out, kDtype, kHidden, "out");
  if (!kHasResidual) return;
  for (int64_t i = 0; i < sum.count(); ++i) ASSERT_EQ(sum.get(i), oracle.sum[i]) << "sum, element " << i;
}

TEST(DeviceSm80RmsNormTest, ManyThreadsARow) {
  expect_norm<Element::kBFloat16, 1048, true>({3, 2});
  expect_norm<Element::kFloat32, 1000, true>({5});
}
TEST(DeviceSm80RmsNormTest, ManyRowsABlock) {
  expect_norm<Element::kBFloat16, 128, true>({37});
  expect_norm<Element::kFloat32, 12, true>({70});
  expect_norm<Element::kFloat32, 1, false>({300});
}
TEST(DeviceSm80RmsNormTest, RowsOfSeveralWarpsThatShareABlock) { expect_norm<Element::kFloat32, 260, true>({7}); }
TEST(DeviceSm80RmsNormTest, OddRows) {
  expect_norm<Element::kBFloat16, 59, false>({11});
  expect_norm<Element::kBFloat16, 301, false>({4});
}
TEST(DeviceSm80RmsNormTest, LongRows) {
  expect_norm<Element::kBFloat16, 16392, true>({2});
  expect_norm<Element::kFloat32, 2051, false, true>({2});
}
TEST(DeviceSm80RmsNormTest, Residual) {
  expect_norm<Element::kBFloat16, 136, true, true>({9});
  expect_norm<Element::kBFloat16, 1048, true, true>({3});
  expect_norm<Element::kFloat32, 7, false, true>({9});
}
TEST(DeviceSm80RmsNormTest, Strides) {
  expect_norm<Element::kFloat32, 24, true>({3, 5, 2}, Layout::kHeadsFirst);
  expect_norm<Element::kFloat32, 24, false>({3, 5, 2}, Layout::kSpacedDims);
}
TEST(DeviceSm80RmsNormTest, SeveralStepsABlock) {
  expect_norm<Element::kBFloat16, 1048, true, true>({8}, Layout::kContiguous, 3);
  expect_norm<Element::kFloat32, 260, true>({17}, Layout::kContiguous, 9);
  expect_norm<Element::kFloat32, 4099, false>({5}, Layout::kContiguous, 3);
}

template <Element kElement, int64_t kHidden, bool kIsAligned, bool kHasDsum = false>
void expect_norm_bwd(Shape rows, int rows_per_block = 0) {
  constexpr cuda::Sm80RmsNormSpec kSpec = norm_spec(kElement, kHidden, kIsAligned, kHasDsum, true);
  const DType dtype = dtype_of(kElement);
  RmsNormRequest request;
  request.num_row_axes = static_cast<int64_t>(rows.size());
  request.eps = 1e-5;
  request.is_backward = true;
  rows.push_back(kHidden);
  Tensor x = random_tensor(dtype, rows, 6), dout = random_tensor(dtype, rows, 7);
  Tensor weight = random_tensor(dtype, {kHidden}, 8);
  Tensor dx(dtype, rows), dweight(DType::kFloat32, {kHidden});
  const auto guards = guard(Layout::kContiguous, {&x, &dout, &weight, &dx, &dweight});
  Tensor dsum;
  request.operands[RmsNormProblem::kX] = spec_of("x", x.view);
  request.operands[RmsNormProblem::kWeight] = spec_of("weight", weight.view);
  request.operands[RmsNormProblem::kDout] = spec_of("dout", dout.view);
  RmsNormBackwardArgs args;
  args.x = x.view, args.weight = weight.view, args.dout = dout.view, args.dx = dx.view, args.dweight = dweight.view;
  if (kHasDsum) {
    dsum = random_tensor(dtype, rows, 9);
    request.operands[RmsNormProblem::kDsum] = spec_of("dsum", dsum.view);
    args.dsum = dsum.view;
  }
  const RmsNormProblem problem = validate(request);
  Tensor workspace(DType::kFloat32, {std::max<int64_t>(1, cuda::sm80_rms_norm_bwd_workspace(problem))});
  const Guarded guarded(workspace);
  for (int64_t i = 0; i < workspace.count(); ++i) workspace.set(i, kNaN);
  args.workspace = workspace.view;
  cuda::Sm80RmsNormPlan plan = cuda::plan_sm80_rms_norm_bwd(problem, args);
  if (rows_per_block > 0) set_rows_per_block(plan, rows_per_block);
  ASSERT_EQ(plan.spec, kSpec) << "the host chose another kernel";
  run_blocks<cuda::Sm80RmsNormBwd<kSpec>>(plan.params, plan.num_blocks);
  run_blocks<cuda::Sm80RmsNormWeightSum<cuda::kRmsNormSumStrips>>(plan.params, plan.num_sum_blocks);
  const Tensor* addend = kHasDsum ? &dsum : nullptr;
  const Norm oracle = rms_norm<double>(x, weight, addend, &dout, 1e-5);
  const Norm naive = rms_norm<float>(x, weight, addend, &dout, 1e-5);
  expect_close(dx, naive.dx, oracle.dx, dtype, kHidden, "dx");
  expect_close(dweight, naive.dweight, oracle.dweight, DType::kFloat32, kHidden, "dweight");
}

TEST(DeviceSm80RmsNormBwdTest, ManyThreadsARow) {
  expect_norm_bwd<Element::kBFloat16, 2056, true>({2, 2});
  expect_norm_bwd<Element::kFloat32, 520, true>({6});
}
TEST(DeviceSm80RmsNormBwdTest, ManyRowsABlock) {
  expect_norm_bwd<Element::kBFloat16, 128, true>({37});
  expect_norm_bwd<Element::kFloat16, 64, true, true>({100});
  expect_norm_bwd<Element::kFloat32, 5, false>({90});
}
TEST(DeviceSm80RmsNormBwdTest, RowsOfSeveralWarpsThatShareABlock) {
  expect_norm_bwd<Element::kFloat32, 260, true>({7});
}
TEST(DeviceSm80RmsNormBwdTest, OddRows) {
  expect_norm_bwd<Element::kBFloat16, 59, false>({11});
  expect_norm_bwd<Element::kFloat32, 301, false, true>({4});
}
TEST(DeviceSm80RmsNormBwdTest, SeveralStepsABlock) {
  expect_norm_bwd<Element::kFloat32, 520, true>({11}, 4);
  expect_norm_bwd<Element::kBFloat16, 128, true, true>({70}, 32);
  expect_norm_bwd<Element::kFloat32, 260, true>({17}, 9);
  expect_norm_bwd<Element::kFloat32, 5, false>({2000}, 32);
}
TEST(DeviceSm80RmsNormBwdTest, LongRows) { expect_norm_bwd<Element::kFloat32, 1031, false, true>({5}, 3); }

// Each leading index gives what it gives alone.
TEST(DeviceSm80RmsNormTest, LeadingAxes) {
  constexpr int64_t kHidden = 40, kRows = 5;
  constexpr cuda::Sm80RmsNormSpec kForward = norm_spec(Element::kFloat32, kHidden, true, false, false);
  constexpr cuda::Sm80RmsNormSpec kBackward = norm_spec(Element::kFloat32, kHidden, true, false, true);
  Tensor x = random_tensor(DType::kFloat32, {1, 3, kRows, kHidden}, 1);
  Tensor weight = random_tensor(DType::kFloat32, {2, 1, kHidden}, 2);
  Tensor dout = random_tensor(DType::kFloat32, {2, 3, kRows, kHidden}, 3);
  Tensor out(DType::kFloat32, {2, 3, kRows, kHidden}), dx(DType::kFloat32, {2, 3, kRows, kHidden});
  Tensor dweight(DType::kFloat32, {2, 3, kHidden});
  RmsNormRequest request;
  request.num_row_axes = 1;
  request.operands[RmsNormProblem::kX] = spec_of("x", x.view);
  request.operands[RmsNormProblem::kWeight] = spec_of("weight", weight.view);
  RmsNormArgs args;
  args.x = x.view, args.weight = weight.view, args.out = out.view;
  const cuda::Sm80RmsNormPlan forward = cuda::plan_sm80_rms_norm(validate(request), args);
  ASSERT_EQ(forward.spec, kForward);
  run_blocks<cuda::Sm80RmsNorm<kForward>>(forward.params, forward.num_blocks);

  request.is_backward = true;
  request.operands[RmsNormProblem::kDout] = spec_of("dout", dout.view);
  const RmsNormProblem problem = validate(request);
  Tensor workspace(DType::kFloat32, {2, 3, cuda::sm80_rms_norm_bwd_workspace(problem)});
  RmsNormBackwardArgs bwd;
  bwd.x = x.view, bwd.weight = weight.view, bwd.dout = dout.view, bwd.dx = dx.view, bwd.dweight = dweight.view;
  bwd.workspace = workspace.view;
  const cuda::Sm80RmsNormPlan backward = cuda::plan_sm80_rms_norm_bwd(problem, bwd);
  ASSERT_EQ(backward.spec, kBackward);
  run_blocks<cuda::Sm80RmsNormBwd<kBackward>>(backward.params, backward.num_blocks);
  run_blocks<cuda::Sm80RmsNormWeightSum<cuda::kRmsNormSumStrips>>(backward.params, backward.num_sum_blocks);

  const auto part_of = [](const Tensor& tensor, Shape shape, int64_t index) {
    Tensor part(DType::kFloat32, shape);
    for (int64_t i = 0; i < part.count(); ++i) part.set(i, tensor.get(index * part.count() + i));
    return part;
  };
  const Shape rows = {kRows, kHidden};
  for (int64_t lead = 0; lead < 6; ++lead) {
    const Tensor own_x = part_of(x, rows, lead % 3), own_weight = part_of(weight, {kHidden}, lead / 3);
    const Tensor own_dout = part_of(dout, rows, lead);
    const Norm oracle = rms_norm<double>(own_x, own_weight, nullptr, &own_dout, 1e-6);
    const Norm naive = rms_norm<float>(own_x, own_weight, nullptr, &own_dout, 1e-6);
    const std::string what = "leading index " + std::to_string(lead) + ": ";
    expect_close(part_of(out, rows, lead), naive.out, oracle.out, DType::kFloat32, kHidden, what + "out");
    expect_close(part_of(dx, rows, lead), naive.dx, oracle.dx, DType::kFloat32, kHidden, what + "dx");
    expect_close(part_of(dweight, {kHidden}, lead), naive.dweight, oracle.dweight, DType::kFloat32, kHidden,
                 what + "dweight");
  }
}
TEST(DeviceSm80RmsNormBwdTest, NoRows) { expect_norm_bwd<Element::kFloat32, 40, true>({0}); }

// ---------------------------------------------------------------------------------------------------------------------
// What is declined.

TEST(DeviceSm80SmallOpsTest, DeclineWhatTheyCannotServe) {
  const Target gpu = parse_target("sm_80");
  ActAndMulProblem act;
  act.num_rows = 4, act.hidden = 8;
  EXPECT_EQ(cuda::sm80_act_and_mul_declines(act, gpu), "");
  EXPECT_NE(cuda::sm80_act_and_mul_declines(act, parse_target("cpu")), "");
  act.num_rows = int64_t{1} << 31;
  EXPECT_NE(cuda::sm80_act_and_mul_bwd_declines(act, gpu), "");
  RmsNormProblem norm;
  norm.num_rows = 4, norm.hidden = 8;
  EXPECT_EQ(cuda::sm80_rms_norm_declines(norm, gpu), "");
  EXPECT_NE(cuda::sm80_rms_norm_bwd_declines(norm, parse_target("sm_75")), "");
  norm.lead = {1 << 30};  // a block for each leading index and row
  EXPECT_NE(cuda::sm80_rms_norm_declines(norm, gpu), "");
}

// Divisions by multiplication, of all kinds of numbers below 2^31.
TEST(DeviceSm80SmallOpsTest, DivisionIsExact) {
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const auto any = static_cast<unsigned>(random());
    const unsigned divisor = 1 + (static_cast<unsigned>(random()) >> (1 + i % 31)) % 0x7FFFFFFFu;
    const cuda::Divisor by = cuda::make_divisor(divisor);
    for (const unsigned number : {any, divisor - 1, divisor, 0x7FFFFFFFu, 0x7FFFFFFFu / divisor * divisor}) {
      const unsigned below = number & 0x7FFFFFFFu;
      ASSERT_EQ(cuda::divide(below, by), below / divisor) << below << " / " << divisor;
    }
  }
  EXPECT_EQ(cuda::divide((1ull << 40) + 5, cuda::make_divisor(3)), ((1ull << 40) + 5) / 3);
}

}  // namespace
}  // namespace heed
