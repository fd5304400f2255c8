// The public C++ interface: results, optional operands, broadcasting, and typed errors.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention_bwd_oracle.h"
#include "attention_oracle.h"
#include "cuda/jit/jit.h"
#include "heed/heed.h"

namespace heed {
namespace {

std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

struct Case {
  int q_len, kv_len, dim;
  std::vector<float> q, k, v, out, lse;
  AttentionForwardArgs args;

  Case(int q_len_, int kv_len_, int dim_)
      : q_len(q_len_),
        kv_len(kv_len_),
        dim(dim_),
        q(random_values(q_len * dim, 1)),
        k(random_values(kv_len * dim, 2)),
        v(random_values(kv_len * dim, 3)),
        out(q_len * dim, -7.0F),
        lse(q_len) {
    args.q = TensorView::contiguous(q.data(), DType::kFloat32, {1, q_len, 1, dim});
    args.k = TensorView::contiguous(k.data(), DType::kFloat32, {1, kv_len, 1, dim});
    args.v = TensorView::contiguous(v.data(), DType::kFloat32, {1, kv_len, 1, dim});
    args.out = TensorView::contiguous(out.data(), DType::kFloat32, {1, q_len, 1, dim});
    args.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {1, 1, q_len});
  }
};

TEST(AttentionForward, ObeysTheToleranceRule) {
  for (bool is_causal : {false, true}) {
    testing_oracle::Case c{.name = "api", .batch = 2, .q_len = 37, .kv_len = 53, .num_q_heads = 4, .num_kv_heads = 2};
    c.head_dim_qk = 24, c.head_dim_v = 40;
    c.options.is_causal = is_causal;
    testing_oracle::Inputs in = testing_oracle::make_inputs(c);
    testing_oracle::Tensor out(c.dtype, {2, 37, 4, 40});
    testing_oracle::Tensor lse(DType::kFloat32, {2, 4, 37});
    attention_forward(testing_oracle::make_args(in, out, lse), c.options);
    const testing_oracle::Expected naive = testing_oracle::attention<float>(c, in);
    const testing_oracle::Expected oracle = testing_oracle::attention<double>(c, in);
    testing_oracle::expect_close(out, naive.out, oracle.out, c.dtype, 40, "out");
    testing_oracle::expect_close(lse, naive.lse, oracle.lse, DType::kFloat32, 37, "lse");
  }
}

TEST(AttentionForward, ARowThatSeesNothingIsZeroAndItsLseMinusInfinity) {
  Case problem(5, 3, 8);  // bottom-right causal: the first two queries see no key
  AttentionOptions options;
  options.is_causal = true;
  attention_forward(problem.args, options);
  for (int i = 0; i < 2 * 8; ++i) EXPECT_EQ(problem.out[i], 0.0F);
  EXPECT_EQ(problem.lse[0], -std::numeric_limits<float>::infinity());
  EXPECT_EQ(problem.lse[1], -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isfinite(problem.lse[2]));
}

TEST(AttentionForward, LeadingAxesOfSizeOneBroadcast) {
  Case problem(6, 9, 16);
  std::vector<float> out(3 * 6 * 16);
  std::vector<float> q(3 * 6 * 16);
  for (size_t i = 0; i < q.size(); ++i) q[i] = problem.q[i % problem.q.size()];
  AttentionForwardArgs args;
  args.q = TensorView::contiguous(q.data(), DType::kFloat32, {3, 1, 6, 1, 16});
  args.k = TensorView::contiguous(problem.k.data(), DType::kFloat32, {1, 1, 9, 1, 16});
  args.v = TensorView::contiguous(problem.v.data(), DType::kFloat32, {1, 1, 9, 1, 16});
  args.out = TensorView::contiguous(out.data(), DType::kFloat32, {3, 1, 6, 1, 16});
  attention_forward(args);
  attention_forward(problem.args);
  for (size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], problem.out[i % problem.out.size()]) << i;
}

TEST(AttentionForward, ErrorsAreTypedAndLeaveTheOutputAlone) {
  Case problem(4, 4, 8);
  AttentionForwardArgs args = problem.args;
  args.k.dtype = DType::kInt32;
  EXPECT_THROW(attention_forward(args), TypeError);
  args = problem.args;
  args.out.shape[1] = 5;
  EXPECT_THROW(attention_forward(args), ValueError);
  args = problem.args;
  args.out.strides[1] = 0;  // rows of the output would overlap
  EXPECT_THROW(attention_forward(args), ValueError);
  args = problem.args;
  args.q.data = nullptr;
  EXPECT_THROW(attention_forward(args), ValueError);
  args = problem.args;
  args.q.data = reinterpret_cast<char*>(problem.q.data()) + 1;
  EXPECT_THROW(attention_forward(args), ValueError);
  args = problem.args;
  args.q = TensorView{};
  EXPECT_THROW(attention_forward(args), ValueError);
  AttentionOptions options;
  options.backend = Backend::kSm90;
  try {
    attention_forward(problem.args, options);
    FAIL() << "expected UnsupportedError";
  } catch (const UnsupportedError& error) {
    ASSERT_EQ(error.candidates().size(), 3U);
    for (const Candidate& candidate : error.candidates()) EXPECT_FALSE(candidate.reason.empty());
  }
  for (float value : problem.out) EXPECT_EQ(value, -7.0F);
}

TEST(AttentionForward, RanksAndEnumeratorsOutOfRangeAreRefused) {
  Case problem(4, 4, 8);
  for (TensorView AttentionForwardArgs::*view :
       {&AttentionForwardArgs::q, &AttentionForwardArgs::v, &AttentionForwardArgs::out, &AttentionForwardArgs::lse}) {
    AttentionForwardArgs args = problem.args;
    (args.*view).rank = 1000000;
    EXPECT_THROW(attention_forward(args), ValueError);
    args = problem.args;
    (args.*view).dtype = static_cast<DType>(200);
    EXPECT_THROW(attention_forward(args), TypeError);
  }
  AttentionOptions options;
  options.backend = static_cast<Backend>(200);
  EXPECT_THROW(attention_forward(problem.args, options), ValueError);
  options = {};
  options.causal_align = static_cast<CausalAlign>(77);
  EXPECT_THROW(attention_forward(problem.args, options), ValueError);
}

TEST(AttentionForward, OutputsWhoseElementsShareMemoryAreRefused) {
  Case problem(4, 4, 8);
  AttentionForwardArgs args = problem.args;
  args.out.strides = {32, 4, 1, 1};  // rows of 8 elements, 4 apart
  EXPECT_THROW(attention_forward(args), ValueError);
  std::vector<float> padded(4 * 11 + 8);
  args.out = TensorView::contiguous(padded.data() + 3 * 11, DType::kFloat32, {1, 4, 1, 8});
  args.out.strides = {0, -11, 5, 1};  // padded rows, last one first; axes of size 1 may have any stride
  attention_forward(args);
  attention_forward(problem.args);
  EXPECT_EQ(padded[3 * 11], problem.out[0]);
  EXPECT_EQ(padded[7], problem.out[3 * 8 + 7]);
}

TEST(AttentionForward, CudaTensorsGoToTheirDeviceOnly) {
  Case problem(4, 4, 8);
  AttentionForwardArgs args = problem.args;
  args.k.device = {DeviceType::kCuda, 0};  // mixed devices
  EXPECT_THROW(attention_forward(args), ValueError);
  const auto on_device = [&](int32_t index) {
    for (TensorView* view : {&args.q, &args.k, &args.v, &args.out, &args.lse})
      view->device = {DeviceType::kCuda, index};
  };
  on_device(0);
  AttentionOptions options;
  options.backend = Backend::kCpu;
  EXPECT_THROW(attention_forward(args, options), UnsupportedError);
  if (cuda::device_count() == 0) {
    EXPECT_THROW(attention_forward(args), std::runtime_error);
  }
  on_device(99);
  EXPECT_THROW(attention_forward(args), ValueError);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward.

using testing_oracle::Cotangents;
using testing_oracle::Gradients;
using testing_oracle::GradientTensors;
using testing_oracle::Inputs;

// A call with sinks and slopes. Its gradients start at a value that none of them has.
struct BackwardCase {
  testing_oracle::Case of{.name = "api backward",
                          .batch = 2,
                          .q_len = 21,
                          .kv_len = 34,
                          .num_q_heads = 4,
                          .num_kv_heads = 2,
                          .head_dim_qk = 24,
                          .head_dim_v = 40,
                          .has_sinks = true,
                          .has_alibi = true};
  Inputs in = make_inputs(of);
  Cotangents more = make_cotangents(of, in, true);
  GradientTensors to{of, testing_oracle::Layout::kContiguous};
  std::vector<float> workspace;
  AttentionBackwardArgs args = make_backward_args(in, more, to);

  BackwardCase() {
    for (testing_oracle::Tensor* tensor : all()) {
      for (int64_t i = 0; i < tensor->count(); ++i) tensor->set(i, kUntouched);
    }
    workspace.resize(static_cast<size_t>(attention_backward_workspace_bytes(args) / 4));
    args.workspace =
        TensorView::contiguous(workspace.data(), DType::kFloat32, {static_cast<int64_t>(workspace.size())});
  }
  std::array<testing_oracle::Tensor*, 5> all() { return {&to.dq, &to.dk, &to.dv, &to.dsinks, &to.dslopes}; }
  void expect_untouched() {
    for (testing_oracle::Tensor* tensor : all()) {
      for (int64_t i = 0; i < tensor->count(); ++i) ASSERT_EQ(tensor->get(i), kUntouched);
    }
  }

  static constexpr double kUntouched = -7777.0;
};

TEST(AttentionBackward, ObeysTheToleranceRule) {
  for (bool is_causal : {false, true}) {
    BackwardCase c;
    c.of.options.is_causal = is_causal;
    c.more = make_cotangents(c.of, c.in, true);
    const TensorView workspace = c.args.workspace;
    c.args = make_backward_args(c.in, c.more, c.to);
    c.args.workspace = workspace;
    attention_backward(c.args, c.of.options);
    const Gradients naive = testing_oracle::backward<float>(c.of, c.in, c.more);
    const Gradients oracle = testing_oracle::backward<double>(c.of, c.in, c.more);
    expect_gradients(c.to, naive, oracle, c.of.dtype, c.of.name);
  }
}

TEST(AttentionBackward, ErrorsAreTypedAndLeaveTheGradientsAlone) {
  using View = TensorView AttentionBackwardArgs::*;
  BackwardCase c;
  const auto refused = [&](const auto& change) -> std::string {
    AttentionBackwardArgs args = c.args;
    change(args);
    try {
      attention_backward(args);
    } catch (const ValueError& error) {
      return error.what();
    } catch (const TypeError& error) {
      return std::string("TypeError: ") + error.what();
    }
    return "";
  };
  const auto starts_with = [](const std::string& message, const std::string& start) {
    EXPECT_EQ(message.substr(0, start.size()), start);
  };
  const std::pair<View, std::string> required[] = {
      {&AttentionBackwardArgs::out, "out"},       {&AttentionBackwardArgs::lse, "lse"},
      {&AttentionBackwardArgs::dout, "dout"},     {&AttentionBackwardArgs::dq, "dq"},
      {&AttentionBackwardArgs::dk, "dk"},         {&AttentionBackwardArgs::dv, "dv"},
      {&AttentionBackwardArgs::dsinks, "dsinks"}, {&AttentionBackwardArgs::dalibi_slopes, "dalibi_slopes"}};
  for (const auto& [view, name] : required) {
    starts_with(refused([&, view = view](auto& args) { args.*view = {}; }), name + ": got nothing, expected ");
    starts_with(refused([&, view = view](auto& args) { (args.*view).data = nullptr; }), name + ": got a null pointer");
    starts_with(
        refused([&, view = view](auto& args) { (args.*view).data = static_cast<char*>((args.*view).data) + 1; }),
        name + ": got a misaligned pointer");
    starts_with(refused([&, view = view](auto& args) { (args.*view).shape[0] += 1; }), name + ": got ");
    starts_with(refused([&, view = view](auto& args) { (args.*view).rank = 77; }), name + ": got rank 77");
    starts_with(refused([&, view = view](auto& args) { (args.*view).dtype = DType::kInt32; }),
                "TypeError: " + name + ": got ");
    starts_with(refused([&, view = view](auto& args) { (args.*view).device.type = DeviceType::kCuda; }),
                name + ": got another device than q");
  }
  for (View view : {&AttentionBackwardArgs::dq, &AttentionBackwardArgs::dk, &AttentionBackwardArgs::dv}) {
    EXPECT_NE(refused([&](auto& args) { (args.*view).strides[1] = 0; }), "");  // rows of a gradient would overlap
  }
  starts_with(refused([](auto& args) { args.sinks = {}; }), "dsinks: got a tensor, expected nothing without sinks");
  starts_with(refused([](auto& args) { args.alibi_slopes = {}; }),
              "dalibi_slopes: got a tensor, expected nothing without alibi_slopes");
  starts_with(refused([](auto& args) { args.dsinks.shape = {4, 2}; }), "dsinks: got float32 [4, 2], expected");
  AttentionOptions options;
  options.backend = Backend::kSm90;
  EXPECT_THROW(attention_backward(c.args, options), UnsupportedError);
  EXPECT_THROW(attention_backward_workspace_bytes(c.args, options), UnsupportedError);
  c.expect_untouched();
}

TEST(AttentionForward, TheCpuHasNoUseForAWorkspaceAndTakesOne) {
  std::vector<float> q(5 * 2 * 8, 0.5f), out(q.size()), scratch(4);
  AttentionForwardArgs args;
  args.q = args.k = args.v = TensorView::contiguous(q.data(), DType::kFloat32, {1, 5, 2, 8});
  EXPECT_EQ(attention_forward_workspace_bytes(args), 0);  // out need not be there
  args.out = TensorView::contiguous(out.data(), DType::kFloat32, {1, 5, 2, 8});
  args.workspace = TensorView::contiguous(scratch.data(), DType::kFloat32, {4});
  attention_forward(args);
  EXPECT_EQ(out[0], 0.5f);
  AttentionOptions options;
  options.backend = Backend::kSm90;
  EXPECT_THROW(attention_forward_workspace_bytes(args, options), UnsupportedError);
  args.k.shape[3] = 7;
  EXPECT_THROW(attention_forward_workspace_bytes(args), ValueError);
}

TEST(AttentionBackward, TheWorkspaceIsKnownWithoutMemory) {
  BackwardCase c;
  const int64_t bytes = attention_backward_workspace_bytes(c.args);
  AttentionBackwardArgs args = c.args;
  args.dq = args.dk = args.dv = args.dsinks = args.dalibi_slopes = args.workspace = {};
  for (TensorView* view :
       {&args.q, &args.k, &args.v, &args.sinks, &args.alibi_slopes, &args.out, &args.lse, &args.dout, &args.dlse}) {
    view->data = nullptr;
  }
  EXPECT_EQ(attention_backward_workspace_bytes(args), bytes);
  args.lse.shape[2] += 1;
  EXPECT_THROW(attention_backward_workspace_bytes(args), ValueError);
  if (bytes > 0) {
    args = c.args;
    args.workspace.shape[0] -= 1;
    EXPECT_THROW(attention_backward(args), ValueError);
    args.workspace = {};
    EXPECT_THROW(attention_backward(args), ValueError);
    c.expect_untouched();
  }
}

TEST(AttentionBackward, LeadingAxesOfSizeOneBroadcast) {
  // Two cotangents of one forward pass, as jacobians have them: each must give what it gives alone.
  BackwardCase first, second;
  for (int64_t i = 0; i < second.more.dout.count(); ++i) second.more.dout.set(i, 0.5 - 2 * second.more.dout.get(i));
  attention_backward(first.args);
  attention_backward(second.args);
  testing_oracle::Tensor dout(DType::kFloat32, {2, 2, 21, 4, 40});
  for (int64_t i = 0; i < dout.count(); ++i) {
    const int64_t one = dout.count() / 2;
    dout.set(i, (i < one ? first : second).more.dout.get(i % one));
  }
  AttentionBackwardArgs args = first.args;
  const auto with_lead = [](TensorView view) {
    std::copy_backward(view.shape.begin(), view.shape.begin() + view.rank, view.shape.begin() + view.rank + 1);
    std::copy_backward(view.strides.begin(), view.strides.begin() + view.rank, view.strides.begin() + view.rank + 1);
    view.shape[0] = 1;
    view.strides[0] = 12345;  // means nothing
    view.rank += 1;
    return view;
  };
  for (TensorView* view :
       {&args.q, &args.k, &args.v, &args.sinks, &args.alibi_slopes, &args.out, &args.lse, &args.dlse}) {
    *view = with_lead(*view);
  }
  args.dout = dout.view;
  std::vector<testing_oracle::Tensor> gradients;
  for (const testing_oracle::Tensor* one : first.all()) {
    std::vector<int64_t> shape = {2};
    shape.insert(shape.end(), one->view.shape.begin(), one->view.shape.begin() + one->view.rank);
    gradients.emplace_back(DType::kFloat32, shape);
  }
  args.dq = gradients[0].view, args.dk = gradients[1].view, args.dv = gradients[2].view;
  args.dsinks = gradients[3].view, args.dalibi_slopes = gradients[4].view;
  std::vector<float> workspace(static_cast<size_t>(attention_backward_workspace_bytes(args) / 4));
  args.workspace = TensorView::contiguous(workspace.data(), DType::kFloat32, {static_cast<int64_t>(workspace.size())});
  attention_backward(args);
  for (size_t n = 0; n < gradients.size(); ++n) {
    const int64_t one = gradients[n].count() / 2;
    for (int64_t i = 0; i < 2 * one; ++i) {
      ASSERT_EQ(gradients[n].get(i), (i < one ? first : second).all()[n]->get(i % one)) << n << " " << i;
    }
  }
}

TEST(Library, ReportsItself) {
  EXPECT_NE(std::string(version()), "");
  EXPECT_GE(num_threads(), 1);
  EXPECT_FALSE(cpu_targets().empty());
  EXPECT_EQ(cpu_target(), cpu_targets().front());
}

}  // namespace
}  // namespace heed
