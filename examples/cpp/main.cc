// heed from C++: makes q, k and v, calls heed::attention_forward, checks the result against a plain loop, shows what an
// error looks like, and takes one step of a decoder with the ops around attention. Exits with 1 if anything is not as
// it should be.
#include <heed/heed.h>
#include <heed/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

namespace {

constexpr int64_t kBatch = 2, kQLen = 37, kKvLen = 61, kNumQHeads = 6, kNumKvHeads = 2, kHeadDim = 64;

std::vector<float> random_tensor(int64_t size, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = normal(generator);
  return values;
}

// One row of causal attention (bottom-right aligned), as the formula says it, in double precision.
// q, k, v: [batch, tokens, heads, head_dim], contiguous. Returns [head_dim].
std::vector<double> naive_row(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                              int64_t batch, int64_t row, int64_t head) {
  const int64_t kv_head = head / (kNumQHeads / kNumKvHeads);
  const int64_t num_visible = row + kKvLen - kQLen + 1;
  const auto q_at = [&](int64_t d) { return q[((batch * kQLen + row) * kNumQHeads + head) * kHeadDim + d]; };
  const auto kv_at = [&](const std::vector<float>& tensor, int64_t j, int64_t d) {
    return tensor[((batch * kKvLen + j) * kNumKvHeads + kv_head) * kHeadDim + d];
  };

  std::vector<double> scores(static_cast<size_t>(num_visible));
  double max_score = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < num_visible; ++j) {
    double dot = 0.0;
    for (int64_t d = 0; d < kHeadDim; ++d) dot += static_cast<double>(q_at(d)) * kv_at(k, j, d);
    scores[j] = dot / std::sqrt(static_cast<double>(kHeadDim));
    max_score = std::max(max_score, scores[j]);
  }
  double sum = 0.0;
  for (double& score : scores) sum += score = std::exp(score - max_score);

  std::vector<double> out(static_cast<size_t>(kHeadDim), 0.0);
  for (int64_t j = 0; j < num_visible; ++j) {
    for (int64_t d = 0; d < kHeadDim; ++d) out[d] += scores[j] / sum * kv_at(v, j, d);
  }
  return out;
}

// The largest difference between heed's output and the plain loop.
double max_error(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v,
                 const std::vector<float>& out) {
  double worst = 0.0;
  for (int64_t batch = 0; batch < kBatch; ++batch) {
    for (int64_t row = 0; row < kQLen; ++row) {
      for (int64_t head = 0; head < kNumQHeads; ++head) {
        const std::vector<double> expected = naive_row(q, k, v, batch, row, head);
        for (int64_t d = 0; d < kHeadDim; ++d) {
          const double got = out[((batch * kQLen + row) * kNumQHeads + head) * kHeadDim + d];
          const double error = std::abs(got - expected[d]);
          worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
        }
      }
    }
  }
  return worst;
}

heed::TensorView view(const std::vector<float>& tensor, std::initializer_list<int64_t> shape) {
  return heed::TensorView::contiguous(tensor.data(), heed::DType::kFloat32, shape);
}

// Attention of a batch: forward.
bool attend() {
  std::printf("heed %s on %s, %d threads\n", heed::version(), heed::cpu_target().c_str(), heed::num_threads());

  // The caller owns all memory, outputs included; a TensorView only describes it.
  const std::vector<float> q = random_tensor(kBatch * kQLen * kNumQHeads * kHeadDim, 1);
  const std::vector<float> k = random_tensor(kBatch * kKvLen * kNumKvHeads * kHeadDim, 2);
  const std::vector<float> v = random_tensor(kBatch * kKvLen * kNumKvHeads * kHeadDim, 3);
  std::vector<float> out(q.size());
  std::vector<float> lse(static_cast<size_t>(kBatch * kNumQHeads * kQLen));

  heed::AttentionForwardArgs args;
  args.q = view(q, {kBatch, kQLen, kNumQHeads, kHeadDim});
  args.k = view(k, {kBatch, kKvLen, kNumKvHeads, kHeadDim});
  args.v = view(v, {kBatch, kKvLen, kNumKvHeads, kHeadDim});
  args.out = view(out, {kBatch, kQLen, kNumQHeads, kHeadDim});
  args.lse = view(lse, {kBatch, kNumQHeads, kQLen});
  heed::AttentionOptions options;
  options.is_causal = true;
  heed::attention_forward(args, options);

  const double error = max_error(q, k, v, out);
  std::printf("out[0, 0, 0, :4] = %.5f %.5f %.5f %.5f   lse[0, 0, 0] = %.5f\n", out[0], out[1], out[2], out[3], lse[0]);
  std::printf("max |heed - plain loop| = %.2e\n", error);
  if (error > 1e-5) {
    std::fprintf(stderr, "error: the results differ\n");
    return false;
  }

  // Arguments are checked before anything runs, and every error has a type.
  args.k = view(k, {kBatch, kKvLen, kNumKvHeads * 2, kHeadDim / 2});
  try {
    heed::attention_forward(args, options);
  } catch (const heed::ValueError& mistake) {
    std::printf("a wrong shape raises heed::ValueError: %s\n", mistake.what());
    return true;
  }
  std::fprintf(stderr, "error: a wrong shape was accepted\n");
  return false;
}

// A token of a decoder: its query is rotated to its position and attends to a cache of rotated keys; what comes out is
// gated and normalised. Rotating the keys where they are read gives the same.
bool decode() {
  const int64_t position = kKvLen - 1, hidden = kNumQHeads * kHeadDim;
  std::vector<float> q = random_tensor(hidden, 4), keys = random_tensor(kKvLen * kNumKvHeads * kHeadDim, 5);
  const std::vector<float> v = random_tensor(kKvLen * kNumKvHeads * kHeadDim, 6);
  std::vector<float> rotated_q(q.size()), rotated_keys(keys.size()), out(q.size()), out_of_fused(q.size());

  // Each function takes queries and keys of the same tokens; here the tokens of either are rotated by themselves.
  const std::vector<int32_t> indptr = {0, static_cast<int32_t>(kKvLen)}, offsets = {0};
  const std::vector<int32_t> pos_ids = {static_cast<int32_t>(position)};
  const auto integers = [](const std::vector<int32_t>& values) {
    return heed::TensorView::contiguous(values.data(), heed::DType::kInt32, {static_cast<int64_t>(values.size())});
  };
  std::vector<float> unused_q(q.size()), unused_keys(keys.size());
  heed::apply_rope({.q = view(q, {1, kNumQHeads, kHeadDim}),
                    .k = view(q, {1, kNumQHeads, kHeadDim}),
                    .pos_ids = integers(pos_ids),
                    .q_rope = view(rotated_q, {1, kNumQHeads, kHeadDim}),
                    .k_rope = view(unused_q, {1, kNumQHeads, kHeadDim})});
  heed::apply_rope({.q = view(keys, {kKvLen, kNumKvHeads, kHeadDim}),
                    .k = view(keys, {kKvLen, kNumKvHeads, kHeadDim}),
                    .indptr = integers(indptr),
                    .offsets = integers(offsets),
                    .q_rope = view(unused_keys, {kKvLen, kNumKvHeads, kHeadDim}),
                    .k_rope = view(rotated_keys, {kKvLen, kNumKvHeads, kHeadDim})});

  const auto attend_to = [&](std::vector<float>& query, std::vector<float>& cache, std::vector<float>& result,
                             const heed::SingleDecodeOptions& options) {
    heed::SingleDecodeArgs args{.q = view(query, {kNumQHeads, kHeadDim}),
                                .k = view(cache, {kKvLen, kNumKvHeads, kHeadDim}),
                                .v = view(v, {kKvLen, kNumKvHeads, kHeadDim}),
                                .out = view(result, {kNumQHeads, kHeadDim})};
    const int64_t floats = heed::single_decode_workspace_bytes(args, options) / 4;
    const std::vector<float> workspace(static_cast<size_t>(floats));
    args.workspace = view(workspace, {floats});
    heed::single_decode(args, options);
  };
  attend_to(rotated_q, rotated_keys, out, {});
  attend_to(q, keys, out_of_fused, {.rope_theta = 1e4});
  double worst = 0.0;
  for (size_t i = 0; i < out.size(); ++i) worst = std::max(worst, std::abs(double{out[i]} - out_of_fused[i]));
  std::printf("single_decode: max |rotated before - rotated inside| = %.2e\n", worst);

  std::vector<float> gated(static_cast<size_t>(hidden / 2)), normed(gated.size());
  const std::vector<float> weight(gated.size(), 1.0F);
  heed::act_and_mul({.x = view(out, {1, hidden}), .out = view(gated, {1, hidden / 2})}, heed::Activation::kSilu);
  heed::rms_norm(
      {.x = view(gated, {1, hidden / 2}), .weight = view(weight, {hidden / 2}), .out = view(normed, {1, hidden / 2})},
      /*eps=*/0.0);
  double mean_square = 0.0;
  for (const float value : normed) mean_square += static_cast<double>(value) * value / static_cast<double>(hidden / 2);
  std::printf("rms_norm: mean square %.6f\n", mean_square);
  if (worst < 1e-5 && std::abs(mean_square - 1.0) < 1e-5) return true;
  std::fprintf(stderr, "error: the decoder's step is wrong\n");
  return false;
}

}  // namespace

int main() {
  try {
    return attend() && decode() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
