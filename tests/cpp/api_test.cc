// The public C++ interface: results, optional operands, broadcasting, and typed errors.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

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

TEST(Library, ReportsItself) {
  EXPECT_NE(std::string(version()), "");
  EXPECT_GE(num_threads(), 1);
  EXPECT_FALSE(cpu_targets().empty());
  EXPECT_EQ(cpu_target(), cpu_targets().front());
}

}  // namespace
}  // namespace heed
