// The oracle of attention backward against the float64 forward pass: central differences along random directions. Their
// error falls with the square of the step, so half the step must leave about a quarter of it if, and only if, the
// derivative is right (or, where the pass is linear, nothing but the rounding of float64).
#include "attention_bwd_oracle.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention_oracle.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

double loss(const Case& c, const Inputs& in, const Cotangents& more) {
  const Expected result = attention<double>(c, in);
  double total = 0;
  for (size_t i = 0; i < result.out.size(); ++i) total += result.out[i] * more.dout.get(static_cast<int64_t>(i));
  for (size_t i = 0; more.dlse.view.defined() && i < result.lse.size(); ++i) {
    // Rows without a visible key are constant.
    if (std::isfinite(result.lse[i])) total += result.lse[i] * more.dlse.get(static_cast<int64_t>(i));
  }
  return total;
}

// |difference quotient - derivative| along signs of +-1 for every element of the tensor.
double difference_error(const Case& c, Inputs& in, const Cotangents& more, Tensor& tensor,
                        const std::vector<double>& gradient, double step) {
  std::mt19937 random(99);
  std::vector<double> saved(gradient.size()), signs(gradient.size());
  double derivative = 0;
  for (size_t i = 0; i < gradient.size(); ++i) {
    saved[i] = tensor.get(static_cast<int64_t>(i));
    signs[i] = (random() & 1) != 0 ? 1.0 : -1.0;
    derivative += gradient[i] * signs[i];
  }
  const auto loss_at = [&](double by) {
    for (size_t i = 0; i < signs.size(); ++i) tensor.set(static_cast<int64_t>(i), saved[i] + by * signs[i]);
    return loss(c, in, more);
  };
  const double quotient = (loss_at(step) - loss_at(-step)) / (2 * step);
  loss_at(0);
  return std::abs(quotient - derivative);
}

std::vector<double> sum_over_batch(const std::vector<double>& per_row, int64_t num_heads) {
  std::vector<double> sums(static_cast<size_t>(num_heads));
  for (size_t i = 0; i < per_row.size(); ++i) sums[i % sums.size()] += per_row[i];
  return sums;
}

void check(const Case& c, bool has_dlse) {
  SCOPED_TRACE(c.name);
  Inputs in = make_inputs(c);
  for (Tensor* tensor : {&in.q, &in.k, &in.v, &in.sinks, &in.slopes}) {  // so that float32 holds every step exactly
    for (int64_t i = 0; tensor->view.defined() && i < tensor->count(); ++i) {
      tensor->set(i, std::nearbyint(tensor->get(i) * 1024) / 1024);
    }
  }
  const Cotangents more = make_cotangents(c, in, has_dlse);
  const Expected forward = attention<double>(c, in);
  const Gradients gradients = BackwardOracle<double>(c, in, more, forward.out, forward.lse).run();
  const auto expect_derivative = [&](Tensor& tensor, const std::vector<double>& gradient, const char* name) {
    const double coarse = difference_error(c, in, more, tensor, gradient, 0x1p-5);
    const double fine = difference_error(c, in, more, tensor, gradient, 0x1p-6);
    double size = 0;
    for (double x : gradient) size += std::abs(x);
    EXPECT_LE(fine, 0.3 * coarse + 0x1p-40 * size) << name << ": errors of " << coarse << " and " << fine;
  };
  expect_derivative(in.q, gradients.dq, "q");
  expect_derivative(in.k, gradients.dk, "k");
  expect_derivative(in.v, gradients.dv, "v");
  if (c.has_sinks) expect_derivative(in.sinks, sum_over_batch(gradients.dsinks, c.num_q_heads), "sinks");
  if (c.has_alibi) expect_derivative(in.slopes, sum_over_batch(gradients.dslopes, c.num_q_heads), "slopes");
}

TEST(BackwardOracle, IsTheDerivativeOfTheForwardPass) {
  for (int bits = 0; bits < 128; ++bits) {
    Case c{.name = "variants " + std::to_string(bits),
           .batch = 2,
           .q_len = 11,
           .kv_len = 14,
           .num_q_heads = 4,
           .num_kv_heads = 2,
           .head_dim_qk = 6,
           .head_dim_v = 5};
    c.has_sinks = (bits & 1) != 0;
    c.has_alibi = (bits & 2) != 0;
    c.has_segments = (bits & 4) != 0;
    if ((bits & 8) != 0) c.options.softcap = 2.0;
    c.options.is_causal = (bits & 16) != 0;
    if ((bits & 32) != 0) {
      c.options.window_left = 6;
      c.options.causal_align = CausalAlign::kTopLeft;
    }
    check(c, (bits & 64) != 0);
  }
}

}  // namespace
}  // namespace heed
