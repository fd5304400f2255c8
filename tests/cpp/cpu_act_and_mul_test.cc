// The CPU kernels of gated activations: every instruction set of this build against float64.
#include <limits>

#include "cpu_small_ops.h"
#include "guarded.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh};
constexpr double kSqrt2OverPi = 0.79788456080286535588;

// The definitions without cancellation.
template <class Real>
Real activate_exactly(Activation activation, Real x) {
  const Real one = 1;
  const Real u = static_cast<Real>(kSqrt2OverPi) * (x + static_cast<Real>(0.044715) * x * x * x);
  if (activation == Activation::kSilu) return x / (one + std::exp(-x));
  if (activation == Activation::kGelu) return x / 2 * std::erfc(-x * static_cast<Real>(std::sqrt(0.5)));
  return x / (one + std::exp(-2 * u));
}

// Those in double; in float, as they are usually written.
template <class Real>
Real activate(Activation activation, Real x) {
  const Real one = 1;
  if (sizeof(Real) == sizeof(double) || activation == Activation::kSilu) return activate_exactly<Real>(activation, x);
  if (activation == Activation::kGelu) return x / 2 * (one + std::erf(x * static_cast<Real>(std::sqrt(0.5))));
  const Real u = static_cast<Real>(kSqrt2OverPi) * (x + static_cast<Real>(0.044715) * x * x * x);
  return x / 2 * (one + std::tanh(u));
}

template <class Real>
Real derivative(Activation activation, Real x) {
  const Real one = 1;
  if (activation == Activation::kSilu) {
    const Real sigmoid = one / (one + std::exp(-x));
    return sigmoid * (one + x * (one - sigmoid));
  }
  if (activation == Activation::kGelu) {
    const Real bell = std::exp(-x * x / 2) * static_cast<Real>(0.39894228040143267794);
    const Real cdf = sizeof(Real) == sizeof(double) ? static_cast<Real>(std::erfc(-x / std::sqrt(2.0)) / 2)
                                                    : (one + std::erf(x * static_cast<Real>(std::sqrt(0.5)))) / 2;
    return cdf + x * bell;
  }
  const Real u = static_cast<Real>(kSqrt2OverPi) * (x + static_cast<Real>(0.044715) * x * x * x);
  const Real slope = static_cast<Real>(kSqrt2OverPi) * (one + static_cast<Real>(3 * 0.044715) * x * x);
  const Real tanh = std::tanh(u);
  return (one + tanh) / 2 + x / 2 * (one - tanh * tanh) * slope;
}

struct Case {
  std::string name{};
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;
  std::vector<int64_t> x_lead{}, dout_lead{}, lead{};  // the last one: full sizes
  int64_t hidden = 1;
  Layout layout = Layout::kContiguous;
  double gain = 2.0;
};

template <class Real>
std::vector<double> expected_out(const Case& c, const Tensor& x) {
  const std::vector<Real> values = values_of<Real>(x);
  const int64_t h = c.hidden;
  std::vector<double> out(values.size() / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t gate = i / h * 2 * h + i % h;
    out[i] = stored<Real>(activate<Real>(c.activation, values[gate]) * values[gate + h], c.dtype);
  }
  return out;
}

template <class Real>
std::vector<double> expected_dx(const Case& c, const Tensor& x, const Tensor& dout) {
  const std::vector<Real> values = values_of<Real>(x);
  const std::vector<Real> gradients = values_of<Real>(dout);
  const int64_t h = c.hidden;
  std::vector<double> dx(static_cast<size_t>(product_of(c.lead) * 2 * h));
  for (int64_t row = 0; row < product_of(c.lead); ++row) {
    const Real* from = values.data() + broadcast_index(c.lead, x.view, row) * 2 * h;
    const Real* gradient = gradients.data() + broadcast_index(c.lead, dout.view, row) * h;
    for (int64_t i = 0; i < h; ++i) {
      const Real gate = from[i];
      const Real up = from[h + i];
      dx[row * 2 * h + i] = stored<Real>(gradient[i] * up * derivative<Real>(c.activation, gate), c.dtype);
      dx[row * 2 * h + h + i] = stored<Real>(gradient[i] * activate<Real>(c.activation, gate), c.dtype);
    }
  }
  return dx;
}

class ActAndMul : public EveryTarget {
 protected:
  static void check(const Case& c) {
    SCOPED_TRACE(c.name);
    const Tensor x = random_tensor(c.dtype, shape_of(c.x_lead, {2 * c.hidden}), 1, c.gain, c.layout);
    if (c.x_lead == c.lead) {
      Tensor out(c.dtype, shape_of(c.lead, {c.hidden}), c.layout);
      act_and_mul({x.view, out.view}, c.activation);
      const std::vector<double> oracle = expected_out<double>(c, x);
      expect_close(out, expected_out<float>(c, x), oracle, c.dtype, row_size_of(c.hidden, oracle), c.name + " out");
    }
    const Tensor dout = random_tensor(c.dtype, shape_of(c.dout_lead, {c.hidden}), 2, 1.0, c.layout);
    Tensor dx(c.dtype, shape_of(c.lead, {2 * c.hidden}), c.layout);
    act_and_mul_backward({x.view, dout.view, dx.view}, c.activation);
    const std::vector<double> oracle = expected_dx<double>(c, x, dout);
    expect_close(dx, expected_dx<float>(c, x, dout), oracle, c.dtype, row_size_of(2 * c.hidden, oracle),
                 c.name + " dx");
  }
};

INSTANTIATE_TEST_SUITE_P(, ActAndMul, testing::ValuesIn(cpu_targets()), target_name);

TEST_P(ActAndMul, SizesAndDtypes) {
  for (DType dtype : kFloats) {
    for (Activation activation : kActivations) {
      for (int64_t hidden : {1, 2, 3, 7, 8, 15, 16, 17, 33, 63, 64, 65, 127, 513, 2050}) {
        for (const std::vector<int64_t>& lead : {std::vector<int64_t>{}, {5}, {3, 2, 2}}) {
          check({.name = std::string(info(dtype).name) + " " + std::to_string(static_cast<int>(activation)) + " H " +
                         std::to_string(hidden) + " rank " + std::to_string(lead.size() + 1),
                 .dtype = dtype,
                 .activation = activation,
                 .x_lead = lead,
                 .dout_lead = lead,
                 .lead = lead,
                 .hidden = hidden});
        }
      }
    }
  }
}

TEST_P(ActAndMul, ManyShortRowsAndLongOnes) {
  for (auto [rows, hidden] : {std::pair{30000, 1}, {4001, 11}, {3, 70001}}) {
    const std::vector<int64_t> lead = {rows};
    check({.name = std::to_string(rows) + " x " + std::to_string(hidden),
           .x_lead = lead,
           .dout_lead = lead,
           .lead = lead,
           .hidden = hidden});
  }
}

TEST_P(ActAndMul, Layouts) {
  for (DType dtype : kFloats) {
    for (Layout layout : {Layout::kHeadsFirst, Layout::kReversedTokens, Layout::kSpacedDims}) {
      for (int64_t hidden : {5, 70, 2500}) {
        const std::vector<int64_t> lead = {4, 3};
        check({.name = "layout " + std::to_string(static_cast<int>(layout)) + " H " + std::to_string(hidden),
               .dtype = dtype,
               .activation = Activation::kGelu,
               .x_lead = lead,
               .dout_lead = lead,
               .lead = lead,
               .hidden = hidden,
               .layout = layout});
      }
    }
  }
}

TEST_P(ActAndMul, LeadingAxesBroadcast) {
  struct Leads {
    std::vector<int64_t> x, dout, full;
  };
  const Leads all[] = {{{1, 3}, {4, 3}, {4, 3}}, {{4, 3}, {4, 1}, {4, 3}}, {{4, 1, 2}, {1, 3, 2}, {4, 3, 2}}};
  for (const Leads& leads : all) {
    for (int64_t hidden : {6, 96}) {
      check({.name = "broadcast H " + std::to_string(hidden),
             .activation = Activation::kGeluTanh,
             .x_lead = leads.x,
             .dout_lead = leads.dout,
             .lead = leads.full,
             .hidden = hidden});
    }
  }
}

// Small results far out on the negative side have no less significant digits: rows of 16 neighbouring gates, judged by
// a plain implementation that does not cancel there.
TEST_P(ActAndMul, TailsAreExact) {
  for (Activation activation : kActivations) {
    const double least = activation == Activation::kSilu ? -89.0 : activation == Activation::kGelu ? -12.8 : -8.9;
    std::vector<double> gates;
    for (double x = least; x < -least; x += -least / 9973) gates.push_back(round_to(x, DType::kFloat32));
    for (double x = 1e-30; x < 1.0; x *= 1.01) gates.push_back(round_to(x, DType::kFloat32));
    gates.resize(gates.size() / 16 * 16);
    const auto hidden = static_cast<int64_t>(gates.size());
    std::vector<double> values = gates;
    values.insert(values.end(), gates.size(), 1.0);
    const Tensor x = tensor_of(DType::kFloat32, {2 * hidden}, values);
    Tensor out(DType::kFloat32, {hidden});
    act_and_mul({x.view, out.view}, activation);
    const Case c{.activation = activation, .hidden = hidden};
    const std::vector<double> oracle = expected_out<double>(c, x);
    std::vector<double> naive;
    for (double gate : gates) naive.push_back(activate_exactly<float>(activation, static_cast<float>(gate)));
    expect_close(out, naive, oracle, DType::kFloat32, 16, std::to_string(static_cast<int>(activation)));
  }
}

TEST_P(ActAndMul, SpecialValues) {
  const std::vector<double> gates = {kInfinity, -kInfinity, kNaN, 0.0, -0.0, 1e38, -1e38, 300.0, -300.0};
  const auto hidden = static_cast<int64_t>(gates.size());
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (Activation activation : kActivations) {
      std::vector<double> values = gates;
      values.insert(values.end(), gates.size(), 1.0);
      const Tensor x = tensor_of(dtype, {2 * hidden}, values);
      Tensor out(dtype, {hidden});
      act_and_mul({x.view, out.view}, activation);
      const Case c{.dtype = dtype, .activation = activation, .hidden = hidden};
      std::vector<double> oracle = expected_out<double>(c, x);
      for (double& value : oracle) value = round_to(value, dtype);  // e^-300 is 0
      expect_close(out, oracle, oracle, dtype, 1, "activation " + std::to_string(static_cast<int>(activation)));

      // Far out on either side the derivative is exactly 1 or 0; a NaN stays one.
      const Tensor dout = tensor_of(dtype, {hidden}, std::vector<double>(gates.size(), 1.0));
      Tensor dx(dtype, {2 * hidden});
      act_and_mul_backward({x.view, dout.view, dx.view}, activation);
      EXPECT_TRUE(std::isnan(dx.get(2)));
      EXPECT_EQ(dx.get(3), 0.5);
      EXPECT_EQ(dx.get(5), 1.0);
      EXPECT_EQ(dx.get(6), 0.0);
      EXPECT_EQ(dx.get(7), 1.0);
      EXPECT_EQ(dx.get(8), 0.0);
    }
  }
}

TEST_P(ActAndMul, TouchesNothingElse) {
  for (DType dtype : kFloats) {
    for (int64_t hidden : {1, 5, 67, 131}) {
      Tensor x = random_tensor(dtype, {3, 2 * hidden}, 1);
      Tensor dout = random_tensor(dtype, {3, hidden}, 2);
      Tensor out(dtype, {3, hidden});
      Tensor dx(dtype, {3, 2 * hidden});
      const Guarded guards[] = {Guarded(x), Guarded(dout), Guarded(out), Guarded(dx)};
      act_and_mul({x.view, out.view}, Activation::kSilu);
      act_and_mul_backward({x.view, dout.view, dx.view}, Activation::kSilu);
    }
  }
}

TEST_P(ActAndMul, NoRows) {
  const Tensor x(DType::kFloat32, {0, 8});
  Tensor out(DType::kFloat32, {0, 4});
  Tensor dx(DType::kFloat32, {0, 8});
  act_and_mul({x.view, out.view}, Activation::kSilu);
  act_and_mul_backward({x.view, out.view, dx.view}, Activation::kSilu);
}

// A call that is too large for the caches writes past them, and gives the bytes of small calls.
TEST(ActAndMulCalls, LargeCallsGiveTheBytesOfSmallOnes) {
  constexpr int64_t kRows = 1400;
  constexpr int64_t kHidden = 6001;  // rows at every alignment
  const Tensor x = random_tensor(DType::kBFloat16, {kRows, 2 * kHidden}, 1);
  Tensor out(DType::kBFloat16, {kRows, kHidden});
  act_and_mul({x.view, out.view}, Activation::kGeluTanh);
  Tensor dx(DType::kBFloat16, {kRows, 2 * kHidden});
  act_and_mul_backward({x.view, out.view, dx.view}, Activation::kGeluTanh);
  const auto row_of = [](const Tensor& tensor, int64_t row, int64_t columns) {
    TensorView view = TensorView::contiguous(tensor.view.data, tensor.view.dtype, {1, columns});
    view.data = static_cast<uint16_t*>(view.data) + row * columns;
    return view;
  };
  Tensor small_out(DType::kBFloat16, {1, kHidden});
  Tensor small_dx(DType::kBFloat16, {1, 2 * kHidden});
  for (int64_t row = 0; row < kRows; row += 7) {
    const TensorView x_row = row_of(x, row, 2 * kHidden);
    act_and_mul({x_row, small_out.view}, Activation::kGeluTanh);
    ASSERT_EQ(std::memcmp(small_out.view.data, row_of(out, row, kHidden).data, 2 * kHidden), 0) << row;
    act_and_mul_backward({x_row, row_of(out, row, kHidden), small_dx.view}, Activation::kGeluTanh);
    ASSERT_EQ(std::memcmp(small_dx.view.data, row_of(dx, row, 2 * kHidden).data, 4 * kHidden), 0) << row;
  }
}

}  // namespace
}  // namespace heed
