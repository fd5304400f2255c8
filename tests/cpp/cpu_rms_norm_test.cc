// The CPU kernels of RMS norms: every instruction set of this build against float64.
#include "cpu_small_ops.h"
#include "guarded.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

struct Case {
  std::string name{};
  DType dtype = DType::kFloat32;
  std::vector<int64_t> lead{}, x_lead{}, weight_lead{};  // the first: full sizes
  std::vector<int64_t> rows{};
  int64_t hidden = 1;
  double eps = 1e-6;
  bool has_residual = false;  // backward: dsum
  Layout layout = Layout::kContiguous;
  double gain = 1.0;

  std::vector<int64_t> shape(const std::vector<int64_t>& leading) const {
    std::vector<int64_t> all = leading;
    all.insert(all.end(), rows.begin(), rows.end());
    all.push_back(hidden);
    return all;
  }
  int64_t num_rows() const { return product_of(rows); }
};

// A layout that reorders or reverses tokens needs three axes.
Tensor rows_tensor(const Case& c, const std::vector<int64_t>& leading) {
  const std::vector<int64_t> shape = c.shape(leading);
  return Tensor(c.dtype, shape, shape.size() < 3 && c.layout != Layout::kSpacedDims ? Layout::kContiguous : c.layout);
}

Tensor random_rows(const Case& c, const std::vector<int64_t>& leading, unsigned seed, double gain) {
  Tensor tensor = rows_tensor(c, leading);
  const Tensor values = random_tensor(c.dtype, c.shape(leading), seed, gain);
  for (int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, values.get(i));
  return tensor;
}

template <class Real>
struct Expected {
  std::vector<double> out, sum, dx, dweight;
};

// Calls body(flat row of the full shape, row of x, weight's leading index).
template <class Body>
void for_rows(const Case& c, const Tensor& x, const Tensor& weight, const Body& body) {
  for (int64_t index = 0; index < product_of(c.lead); ++index) {
    for (int64_t row = 0; row < c.num_rows(); ++row) {
      body(index * c.num_rows() + row, broadcast_index(c.lead, x.view, index) * c.num_rows() + row,
           broadcast_index(c.lead, weight.view, index));
    }
  }
}

template <class Real>
Real rstd_of(const std::vector<Real>& s, double eps) {
  Real sum = 0;
  for (Real value : s) sum += value * value;
  return 1 / std::sqrt(sum / static_cast<Real>(s.size()) + static_cast<Real>(eps));
}

template <class Real>
Expected<Real> expected_forward(const Case& c, const Tensor& x, const Tensor& weight, const Tensor& residual) {
  const int64_t h = c.hidden;
  const std::vector<Real> xs = values_of<Real>(x);
  const std::vector<Real> weights = values_of<Real>(weight);
  const std::vector<Real> residuals = c.has_residual ? values_of<Real>(residual) : std::vector<Real>{};
  Expected<Real> result;
  for_rows(c, x, weight, [&](int64_t flat, int64_t x_row, int64_t w_row) {
    std::vector<Real> s(xs.begin() + x_row * h, xs.begin() + (x_row + 1) * h);
    if (c.has_residual) {
      // The sum is rounded to the dtype before it is normalised, in every precision.
      for (int64_t i = 0; i < h; ++i) {
        const double sum = static_cast<double>(s[i]) + static_cast<double>(residuals[flat * h + i]);
        s[i] = static_cast<Real>(round_to(sum, c.dtype));
        result.sum.push_back(static_cast<double>(s[i]));
      }
    }
    const Real rstd = rstd_of(s, c.eps);
    for (int64_t i = 0; i < h; ++i) result.out.push_back(stored<Real>(s[i] * rstd * weights[w_row * h + i], c.dtype));
  });
  return result;
}

template <class Real>
Expected<Real> expected_backward(const Case& c, const Tensor& x, const Tensor& weight, const Tensor& dout,
                                 const Tensor& dsum) {
  const int64_t h = c.hidden;
  const std::vector<Real> xs = values_of<Real>(x);
  const std::vector<Real> weights = values_of<Real>(weight);
  const std::vector<Real> douts = values_of<Real>(dout);
  const std::vector<Real> dsums = c.has_residual ? values_of<Real>(dsum) : std::vector<Real>{};
  Expected<Real> result;
  std::vector<Real> dweight(static_cast<size_t>(product_of(c.lead) * h));
  for_rows(c, x, weight, [&](int64_t flat, int64_t x_row, int64_t w_row) {
    const std::vector<Real> s(xs.begin() + x_row * h, xs.begin() + (x_row + 1) * h);
    const Real rstd = rstd_of(s, c.eps);
    Real mean = 0;
    for (int64_t i = 0; i < h; ++i) mean += douts[flat * h + i] * weights[w_row * h + i] * (s[i] * rstd);
    mean /= static_cast<Real>(h);
    for (int64_t i = 0; i < h; ++i) {
      Real dx = (douts[flat * h + i] * weights[w_row * h + i] - s[i] * rstd * mean) * rstd;
      if (c.has_residual) dx += dsums[flat * h + i];
      result.dx.push_back(stored<Real>(dx, c.dtype));
      dweight[flat / std::max<int64_t>(c.num_rows(), 1) * h + i] += douts[flat * h + i] * (s[i] * rstd);
    }
  });
  result.dweight.assign(dweight.begin(), dweight.end());
  return result;
}

class RmsNorm : public EveryTarget {
 protected:
  static void check(const Case& c) {
    SCOPED_TRACE(c.name);
    const Tensor x = random_rows(c, c.x_lead, 1, c.gain);
    const Tensor weight = random_tensor(c.dtype, shape_of(c.weight_lead, {c.hidden}), 2, 1.0,
                                        c.layout == Layout::kSpacedDims ? c.layout : Layout::kContiguous);
    const Tensor full = random_rows(c, c.lead, 3, c.gain);
    check_forward(c, x, weight, full);
    check_backward(c, x, weight, random_rows(c, c.lead, 4, 1.0), full);
  }

  static void check_forward(const Case& c, const Tensor& x, const Tensor& weight, const Tensor& residual) {
    Tensor out = rows_tensor(c, c.lead);
    Tensor sum = rows_tensor(c, c.lead);
    RmsNormArgs args{.x = x.view, .weight = weight.view, .residual = {}, .out = out.view, .sum = {}};
    if (c.has_residual) args.residual = residual.view, args.sum = sum.view;
    rms_norm(args, c.eps);
    const auto oracle = expected_forward<double>(c, x, weight, residual);
    const auto naive = expected_forward<float>(c, x, weight, residual);
    const int64_t row_size = row_size_of(c.hidden, oracle.out);
    expect_close(out, naive.out, oracle.out, c.dtype, row_size, c.name + " out");
    for (size_t i = 0; i < oracle.sum.size(); ++i) ASSERT_EQ(sum.get(static_cast<int64_t>(i)), oracle.sum[i]);
  }

  static void check_backward(const Case& c, const Tensor& x, const Tensor& weight, const Tensor& dout,
                             const Tensor& dsum) {
    Tensor dx = rows_tensor(c, c.lead);
    Tensor dweight(DType::kFloat32, shape_of(c.lead, {c.hidden}),
                   c.layout == Layout::kSpacedDims ? c.layout : Layout::kContiguous);
    RmsNormBackwardArgs args;
    args.x = x.view, args.weight = weight.view, args.dout = dout.view, args.dx = dx.view, args.dweight = dweight.view;
    if (c.has_residual) args.dsum = dsum.view;
    const int64_t bytes = rms_norm_backward_workspace_bytes(args);
    std::vector<float> workspace(static_cast<size_t>(bytes / 4 + 16), std::nanf(""));
    args.workspace = TensorView::contiguous(workspace.data(), DType::kFloat32, {bytes / 4});
    rms_norm_backward(args, c.eps);
    const auto oracle = expected_backward<double>(c, x, weight, dout, dsum);
    const auto naive = expected_backward<float>(c, x, weight, dout, dsum);
    const int64_t row_size = row_size_of(c.hidden, oracle.dx);
    expect_close(dx, naive.dx, oracle.dx, c.dtype, row_size, c.name + " dx");
    expect_close(dweight, naive.dweight, oracle.dweight, DType::kFloat32, row_size_of(c.hidden, oracle.dweight),
                 c.name + " dweight");
    for (size_t i = static_cast<size_t>(bytes / 4); i < workspace.size(); ++i) ASSERT_TRUE(std::isnan(workspace[i]));
  }
};

INSTANTIATE_TEST_SUITE_P(, RmsNorm, testing::ValuesIn(cpu_targets()), target_name);

TEST_P(RmsNorm, SizesAndDtypes) {
  for (DType dtype : kFloats) {
    for (bool has_residual : {false, true}) {
      for (int64_t hidden : {1, 2, 3, 7, 15, 16, 17, 64, 65, 130, 511, 2049, 5000}) {
        for (const std::vector<int64_t>& rows : {std::vector<int64_t>{}, {1}, {7}, {3, 3}}) {
          check({.name = std::string(info(dtype).name) + " H " + std::to_string(hidden) + " rows " +
                         std::to_string(product_of(rows)) + (has_residual ? " residual" : ""),
                 .dtype = dtype,
                 .rows = rows,
                 .hidden = hidden,
                 .has_residual = has_residual});
        }
      }
    }
  }
}

TEST_P(RmsNorm, ManyRows) {
  for (auto [rows, hidden] : {std::pair{5003, 1}, {4001, 13}, {1501, 100}, {260, 1030}}) {
    check({.name = std::to_string(rows) + " x " + std::to_string(hidden),
           .rows = {rows},
           .hidden = hidden,
           .has_residual = true});
  }
}

TEST_P(RmsNorm, EpsAndGains) {
  for (double eps : {0.0, 1e-12, 1e-5, 3.0}) {
    for (double gain : {1e-6, 1.0, 1e4}) {
      check({.name = "eps " + std::to_string(eps) + " gain " + std::to_string(gain),
             .rows = {5},
             .hidden = 70,
             .eps = eps,
             .gain = gain});
    }
  }
}

TEST_P(RmsNorm, LayoutsAndBroadcasts) {
  for (DType dtype : kFloats) {
    for (Layout layout : {Layout::kHeadsFirst, Layout::kReversedTokens, Layout::kSpacedDims}) {
      for (int64_t hidden : {6, 70, 2100}) {
        check({.name = "layout " + std::to_string(static_cast<int>(layout)) + " H " + std::to_string(hidden),
               .dtype = dtype,
               .rows = {5, 3},
               .hidden = hidden,
               .has_residual = true,
               .layout = layout});
      }
    }
  }
  struct Leads {
    std::vector<int64_t> full, x, weight;
  };
  for (const Leads& leads : {Leads{{4}, {4}, {4}}, {{4}, {1}, {4}}, {{4}, {4}, {1}}, {{2, 3}, {1, 3}, {2, 1}}}) {
    for (bool has_residual : {false, true}) {
      for (int64_t rows : {1, 40}) {
        check({.name = "leading axes",
               .lead = leads.full,
               .x_lead = leads.x,
               .weight_lead = leads.weight,
               .rows = {rows},
               .hidden = 33,
               .has_residual = has_residual});
      }
    }
  }
}

TEST_P(RmsNorm, NoRows) {
  check({.name = "no rows", .rows = {0}, .hidden = 9});
  check({.name = "no rows, residual",
         .lead = {2},
         .x_lead = {2},
         .weight_lead = {1},
         .rows = {0, 3},
         .hidden = 9,
         .has_residual = true});
}

TEST_P(RmsNorm, SpecialValues) {
  for (double value : {kNaN, kInfinity}) {
    const Case c{.rows = {3}, .hidden = 40};
    Tensor x = random_rows(c, {}, 1, 1.0);
    x.set(45, value);
    const Tensor weight = random_tensor(DType::kFloat32, {40}, 2);
    check_forward(c, x, weight, {});
    Tensor out(DType::kFloat32, {3, 40});
    rms_norm({.x = x.view, .weight = weight.view, .residual = {}, .out = out.view, .sum = {}});
    EXPECT_TRUE(std::isnan(out.get(45)));
    EXPECT_TRUE(std::isfinite(out.get(5)));
  }
}

TEST_P(RmsNorm, TouchesNothingElse) {
  for (DType dtype : kFloats) {
    for (int64_t hidden : {1, 5, 67, 131}) {
      const Case c{.dtype = dtype, .rows = {7}, .hidden = hidden};
      Tensor x = random_rows(c, {}, 1, 1.0), residual = random_rows(c, {}, 2, 1.0), out = rows_tensor(c, {});
      Tensor sum = rows_tensor(c, {}), dx = rows_tensor(c, {}), weight = random_tensor(dtype, {hidden}, 3);
      Tensor dweight(DType::kFloat32, {hidden});
      const Guarded guards[] = {Guarded(x),  Guarded(residual), Guarded(out),    Guarded(sum),
                                Guarded(dx), Guarded(weight),   Guarded(dweight)};
      rms_norm({.x = x.view, .weight = weight.view, .residual = residual.view, .out = out.view, .sum = sum.view});
      RmsNormBackwardArgs args;
      args.x = x.view, args.weight = weight.view, args.dout = residual.view, args.dx = dx.view;
      args.dweight = dweight.view;
      ASSERT_EQ(rms_norm_backward_workspace_bytes(args), 0);
      rms_norm_backward(args);
    }
  }
}

// Calls that are too large for the caches write past them, and give the bytes of small calls.
TEST(RmsNormCalls, LargeCallsGiveTheBytesOfSmallOnes) {
  for (bool has_residual : {false, true}) {
    const Case c{
        .dtype = DType::kBFloat16, .rows = {4100}, .hidden = has_residual ? 1601 : 3201, .has_residual = has_residual};
    const int64_t h = c.hidden;
    const Tensor x = random_rows(c, {}, 1, 1.0), residual = random_rows(c, {}, 2, 1.0);
    const Tensor weight = random_tensor(c.dtype, {h}, 3);
    Tensor out = rows_tensor(c, {}), sum = rows_tensor(c, {}), small_out(c.dtype, {1, h}), small_sum(c.dtype, {1, h});
    const auto row_of = [&](const Tensor& tensor, int64_t row) {
      return TensorView::contiguous(static_cast<uint16_t*>(tensor.view.data) + row * h, c.dtype, {1, h});
    };
    RmsNormArgs args{.x = x.view, .weight = weight.view, .residual = {}, .out = out.view, .sum = {}};
    if (has_residual) args.residual = residual.view, args.sum = sum.view;
    rms_norm(args);
    for (int64_t row = 0; row < 4100; row += 97) {
      RmsNormArgs small{.x = row_of(x, row), .weight = weight.view, .residual = {}, .out = small_out.view, .sum = {}};
      if (has_residual) small.residual = row_of(residual, row), small.sum = small_sum.view;
      rms_norm(small);
      ASSERT_EQ(std::memcmp(small_out.view.data, row_of(out, row).data, 2 * h), 0) << row;
      if (!has_residual) continue;
      ASSERT_EQ(std::memcmp(small_sum.view.data, row_of(sum, row).data, 2 * h), 0) << row;
    }
  }
}

TEST(RmsNormCalls, LargeBackwardIsExactAndRepeatable) {
  const Case c{.dtype = DType::kBFloat16, .rows = {5001}, .hidden = 2003};
  const Tensor x = random_rows(c, {}, 1, 1.0), dout = random_rows(c, {}, 2, 1.0);
  const Tensor weight = random_tensor(c.dtype, {c.hidden}, 3);
  std::vector<char> first_dx, first_dweight;
  for (int repeat = 0; repeat < 3; ++repeat) {
    Tensor dx = rows_tensor(c, {}), dweight(DType::kFloat32, {c.hidden});
    RmsNormBackwardArgs args;
    args.x = x.view, args.weight = weight.view, args.dout = dout.view, args.dx = dx.view, args.dweight = dweight.view;
    const int64_t bytes = rms_norm_backward_workspace_bytes(args);
    ASSERT_GT(bytes, 0);
    std::vector<float> workspace(static_cast<size_t>(bytes / 4), std::nanf(""));
    args.workspace = TensorView::contiguous(workspace.data(), DType::kFloat32, {bytes / 4});
    rms_norm_backward(args);
    if (repeat == 0) {
      first_dx = dx.memory, first_dweight = dweight.memory;
      const auto oracle = expected_backward<double>(c, x, weight, dout, {});
      const auto naive = expected_backward<float>(c, x, weight, dout, {});
      expect_close(dx, naive.dx, oracle.dx, c.dtype, c.hidden, "dx");
      expect_close(dweight, naive.dweight, oracle.dweight, DType::kFloat32, c.hidden, "dweight");
    }
    EXPECT_EQ(dx.memory, first_dx);
    EXPECT_EQ(dweight.memory, first_dweight);
  }
}

}  // namespace
}  // namespace heed
