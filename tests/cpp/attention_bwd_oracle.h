// What the C++ tests of attention backward compare with: gradients by their formulas, in float64 and float32, from the
// same `out` and `lse` that the kernel is given. attention_bwd_oracle_test.cc holds them against finite differences.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attention_oracle.h"
#include "heed/heed.h"

namespace heed::testing_oracle {

// What the backward pass takes in addition: what the forward pass gave, and cotangents of it.
struct Cotangents {
  Tensor out, lse, dout, dlse;  // dlse may be absent
};

struct Gradients {
  std::vector<double> dq, dk, dv;       // shapes of q, k, v
  std::vector<double> dsinks, dslopes;  // [B, Hq]; empty without sinks, without slopes
};

// out and lse from the library's forward pass (so in the dtype and with the rounding of a real call), cotangents drawn.
inline Cotangents make_cotangents(const Case& c, Inputs& in, bool has_dlse) {
  Cotangents more;
  more.out = Tensor(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_v});
  more.lse = Tensor(DType::kFloat32, {c.batch, c.num_q_heads, c.q_len});
  attention_forward(make_args(in, more.out, more.lse), c.options);
  std::mt19937 random(54321);
  std::normal_distribution<double> normal;
  more.dout = Tensor(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_v}, c.layout);
  for (int64_t i = 0; i < more.dout.count(); ++i) more.dout.set(i, normal(random));
  if (has_dlse) {
    more.dlse = Tensor(DType::kFloat32, {c.batch, c.num_q_heads, c.q_len});
    for (int64_t i = 0; i < more.dlse.count(); ++i) more.dlse.set(i, normal(random));
  }
  return more;
}

// By the formulas, in `Real` arithmetic. With float, P, dS and gradients are rounded to the dtype as a plain
// implementation would.
template <class Real>
class BackwardOracle {
 public:
  BackwardOracle(const Case& c, const Inputs& in, const Cotangents& more, std::vector<Real> out, std::vector<Real> lse)
      : c_(c),
        in_(in),
        q_(read(in.q)),
        k_(read(in.k)),
        v_(read(in.v)),
        out_(std::move(out)),
        lse_(std::move(lse)),
        dout_(read(more.dout)),
        dlse_(read(more.dlse)),
        dq_(q_.size()),
        dk_(k_.size()),
        dv_(v_.size()),
        dsinks_(c.has_sinks ? heads() : 0),
        dslopes_(c.has_alibi ? heads() : 0) {}

  BackwardOracle(const Case& c, const Inputs& in, const Cotangents& more)
      : BackwardOracle(c, in, more, read(more.out), read(more.lse)) {}

  Gradients run() {
    for (int64_t b = 0; b < c_.batch; ++b) {
      for (int64_t h = 0; h < c_.num_q_heads; ++h) {
        for (int64_t i = 0; i < c_.q_len; ++i) add_row(b, h, i);
      }
    }
    return {finish(dq_, scale_, true), finish(dk_, scale_, true), finish(dv_, 1, true), finish(dsinks_, 1, false),
            finish(dslopes_, 1, false)};
  }

 private:
  static constexpr bool kIsNaive = sizeof(Real) == sizeof(float);

  static std::vector<Real> read(const Tensor& tensor) {
    if (!tensor.view.defined()) return {};
    std::vector<Real> values(static_cast<size_t>(tensor.count()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<Real>(tensor.get(static_cast<int64_t>(i)));
    return values;
  }
  Real store(Real x) const { return kIsNaive ? static_cast<Real>(round_to(x, c_.dtype)) : x; }
  std::vector<double> finish(const std::vector<Real>& sums, Real factor, bool is_stored) const {
    std::vector<double> values(sums.size());
    std::transform(sums.begin(), sums.end(), values.begin(),
                   [&](Real x) { return is_stored ? store(factor * x) : factor * x; });
    return values;
  }
  size_t heads() const { return static_cast<size_t>(c_.batch * c_.num_q_heads); }

  void add_row(int64_t b, int64_t h, int64_t i) {
    const int64_t row = (b * c_.q_len + i) * c_.num_q_heads + h;
    const int64_t head = b * c_.num_q_heads + h;
    const Real lse = lse_[head * c_.q_len + i];
    if (lse == -std::numeric_limits<Real>::infinity()) return;
    Real delta = 0;
    for (int64_t x = 0; x < c_.head_dim_v; ++x) delta += dout_[row * c_.head_dim_v + x] * out_[row * c_.head_dim_v + x];
    if (!dlse_.empty()) delta -= dlse_[head * c_.q_len + i];
    if (c_.has_sinks) dsinks_[head] -= std::exp(static_cast<Real>(in_.sinks.get(h)) - lse) * delta;
    for (int64_t j = 0; j < c_.kv_len; ++j) {
      if (is_visible(c_, in_, b, i, j)) add_pair(b, h, i, j, lse, delta);
    }
  }

  // Not instrumented: nine tenths of what the sanitized tests took were this function's own loops.
  __attribute__((no_sanitize("address", "undefined"))) void add_pair(int64_t b, int64_t h, int64_t i, int64_t j,
                                                                     Real lse, Real delta) {
    const int64_t row = (b * c_.q_len + i) * c_.num_q_heads + h;
    const int64_t kv_row = (b * c_.kv_len + j) * c_.num_kv_heads + h / (c_.num_q_heads / c_.num_kv_heads);
    const int64_t d = c_.head_dim_qk, dv = c_.head_dim_v;
    const Real cap = c_.options.softcap;
    const Real *const q = q_.data() + row * d, *const k = k_.data() + kv_row * d;
    const Real *const dout = dout_.data() + row * dv, *const v = v_.data() + kv_row * dv;
    Real s = 0, dp = 0, cap_slope = 1;
    for (int64_t x = 0; x < d; ++x) s += q[x] * k[x];
    for (int64_t x = 0; x < dv; ++x) dp += dout[x] * v[x];
    s *= scale_;
    if (cap > 0) {
      const Real saturation = std::tanh(s / cap);
      s = cap * saturation;
      cap_slope = 1 - saturation * saturation;
    }
    const Real distance = static_cast<Real>(std::abs(i + offset_ - j));
    if (c_.has_alibi) s -= static_cast<Real>(in_.slopes.get(h)) * distance;
    const Real p = std::exp(s - lse);
    const Real ds = p * (dp - delta);
    if (c_.has_alibi) dslopes_[b * c_.num_q_heads + h] -= ds * distance;
    const Real stored_p = store(p), stored_ds = store(ds * cap_slope);
    Real *const dq_row = dq_.data() + row * d, *const dk_row = dk_.data() + kv_row * d;
    Real* const dv_row = dv_.data() + kv_row * dv;
    for (int64_t x = 0; x < dv; ++x) dv_row[x] += stored_p * dout[x];
    for (int64_t x = 0; x < d; ++x) {
      dq_row[x] += stored_ds * k[x];
      dk_row[x] += stored_ds * q[x];
    }
  }

  const Case& c_;
  const Inputs& in_;
  const Real scale_ = c_.options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(c_.head_dim_qk)));
  const int64_t offset_ = c_.options.causal_align == CausalAlign::kBottomRight ? c_.kv_len - c_.q_len : 0;
  std::vector<Real> q_, k_, v_, out_, lse_, dout_, dlse_;
  std::vector<Real> dq_, dk_, dv_, dsinks_, dslopes_;
};

template <class Real>
Gradients backward(const Case& c, const Inputs& in, const Cotangents& more) {
  return BackwardOracle<Real>(c, in, more).run();
}

// Where a call's gradients go, full of a value that no gradient is.
struct GradientTensors {
  Tensor dq, dk, dv, dsinks, dslopes;
  std::vector<float> workspace;

  GradientTensors() = default;
  GradientTensors(const Case& c, Layout layout) {
    const Layout distinct = layout == Layout::kZeroTokenStride ? Layout::kContiguous : layout;
    dq = Tensor(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_qk}, distinct);
    dk = Tensor(c.dtype, {c.batch, c.kv_len, c.num_kv_heads, c.head_dim_qk}, distinct);
    dv = Tensor(c.dtype, {c.batch, c.kv_len, c.num_kv_heads, c.head_dim_v}, distinct);
    if (c.has_sinks) dsinks = Tensor(DType::kFloat32, {c.batch, c.num_q_heads});
    if (c.has_alibi) dslopes = Tensor(DType::kFloat32, {c.batch, c.num_q_heads});
  }
};

// The views of a call but for its workspace.
inline AttentionBackwardArgs make_backward_args(Inputs& in, Cotangents& more, GradientTensors& to) {
  AttentionBackwardArgs args;
  args.q = in.q.view, args.k = in.k.view, args.v = in.v.view;
  args.sinks = in.sinks.view, args.alibi_slopes = in.slopes.view;
  args.q_segment_ids = in.q_ids.view, args.kv_segment_ids = in.kv_ids.view;
  args.out = more.out.view, args.lse = more.lse.view, args.dout = more.dout.view, args.dlse = more.dlse.view;
  args.dq = to.dq.view, args.dk = to.dk.view, args.dv = to.dv.view;
  args.dsinks = to.dsinks.view, args.dalibi_slopes = to.dslopes.view;
  return args;
}

// Runs the call with a workspace of the exact size, full of NaN.
inline void run_backward(AttentionBackwardArgs& args, const AttentionOptions& options, GradientTensors& to) {
  const int64_t bytes = attention_backward_workspace_bytes(args, options);
  ASSERT_EQ(bytes % 4, 0);
  to.workspace.assign(static_cast<size_t>(bytes / 4), std::numeric_limits<float>::quiet_NaN());
  if (bytes > 0) args.workspace = TensorView::contiguous(to.workspace.data(), DType::kFloat32, {bytes / 4});
  attention_backward(args, options);
}

// The one tolerance rule on every gradient.
inline void expect_gradients(const GradientTensors& got, const Gradients& naive, const Gradients& oracle, DType dtype,
                             const std::string& what) {
  // The noise of a row of a few elements is a matter of luck: those are judged together.
  const auto row_size = [](const Tensor& tensor) {
    const int64_t last = tensor.view.shape[tensor.view.rank - 1];
    return last < 8 ? std::max<int64_t>(tensor.count(), 1) : last;
  };
  expect_close(got.dq, naive.dq, oracle.dq, dtype, row_size(got.dq), what + " dq");
  expect_close(got.dk, naive.dk, oracle.dk, dtype, row_size(got.dk), what + " dk");
  expect_close(got.dv, naive.dv, oracle.dv, dtype, row_size(got.dv), what + " dv");
  const auto all = [](const Tensor& tensor) { return std::max<int64_t>(tensor.count(), 1); };
  if (got.dsinks.view.defined()) {
    expect_close(got.dsinks, naive.dsinks, oracle.dsinks, DType::kFloat32, all(got.dsinks), what + " dsinks");
  }
  if (got.dslopes.view.defined()) {
    expect_close(got.dslopes, naive.dslopes, oracle.dslopes, DType::kFloat32, all(got.dslopes),
                 what + " dalibi_slopes");
  }
}

}  // namespace heed::testing_oracle
