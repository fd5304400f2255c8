// The public C++ interface: results, optional operands, broadcasting, and typed errors.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

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

// One head, batch 1, float64: softmax(q k^T / sqrt(d)) v, causal if asked for.
std::vector<double> oracle(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                           int q_len, int kv_len, int dim, bool is_causal) {
  std::vector<double> out(static_cast<size_t>(q_len) * dim, 0.0);
  for (int i = 0; i < q_len; ++i) {
    std::vector<double> weights(kv_len);
    double sum = 0.0;
    for (int j = 0; j < kv_len; ++j) {
      double score = 0.0;
      for (int d = 0; d < dim; ++d) score += static_cast<double>(q[i * dim + d]) * k[j * dim + d];
      const bool is_kept = !is_causal || j <= i + kv_len - q_len;
      weights[j] = is_kept ? std::exp(score / std::sqrt(dim)) : 0.0;
      sum += weights[j];
    }
    for (int j = 0; j < kv_len; ++j) {
      for (int d = 0; d < dim; ++d) out[i * dim + d] += weights[j] / sum * v[j * dim + d];
    }
  }
  return out;
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

TEST(AttentionForward, MatchesAFloat64Loop) {
  for (bool is_causal : {false, true}) {
    Case problem(37, 53, 24);
    AttentionOptions options;
    options.is_causal = is_causal;
    attention_forward(problem.args, options);
    const std::vector<double> expected = oracle(problem.q, problem.k, problem.v, 37, 53, 24, is_causal);
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_NEAR(problem.out[i], expected[i], 16 * std::numeric_limits<float>::epsilon()) << i;
    }
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

TEST(AttentionForward, CudaTensorsAreRefusedWithReasons) {
  Case problem(4, 4, 8);
  AttentionForwardArgs args = problem.args;
  for (TensorView* view : {&args.q, &args.k, &args.v, &args.out, &args.lse}) view->device = {DeviceType::kCuda, 0};
  EXPECT_THROW(attention_forward(args), UnsupportedError);
  args.k.device = {};  // mixed devices
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
