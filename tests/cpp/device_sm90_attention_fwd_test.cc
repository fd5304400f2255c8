// The device code of the Hopper forward kernel, run on the CPU (device_emulation/) with the tensor maps that the host
// makes, and compared with the float64 oracle: its tiles, masks, barriers, copies, products and arithmetic, on machines
// without a GPU. How fast it is and what a compiler makes of it are not tested here.
#include <gtest/gtest.h>

#include "emulated_sm90_attention_fwd.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

TEST(DeviceSm90AttentionFwdTest, Bf16) {
  Case c = case_of(DType::kBFloat16, 150, 300);  // two tiles a head, several steps
  c.batch = 2;
  expect_matches<kBf16>(c);
}

TEST(DeviceSm90AttentionFwdTest, Bf16Causal) {
  expect_matches<kBf16Masked>(causal_case_of(DType::kBFloat16, 300, 270, CausalAlign::kTopLeft));
}

TEST(DeviceSm90AttentionFwdTest, Bf16CausalBottomRight) {
  expect_matches<kBf16Masked>(causal_case_of(DType::kBFloat16, 130, 300, CausalAlign::kBottomRight));
}

// The first rows see no keys.
TEST(DeviceSm90AttentionFwdTest, Bf16CausalWithFewKeys) {
  expect_matches<kBf16Masked>(causal_case_of(DType::kBFloat16, 300, 70, CausalAlign::kBottomRight));
}

TEST(DeviceSm90AttentionFwdTest, F16) { expect_matches<kF16>(case_of(DType::kFloat16, 100, 300)); }

TEST(DeviceSm90AttentionFwdTest, WindowAndSinks) {
  Case c = case_of(DType::kBFloat16, 200, 400);
  c.options.window_left = 150;
  c.options.window_right = 20;
  c.has_sinks = true;
  expect_matches<kBf16Masked>(c);
  c.options.causal_align = CausalAlign::kBottomRight;
  c.options.window_left = 5;
  c.options.window_right = -1;
  expect_matches<kBf16Masked>(c);
}

// Rows from 250 on see nothing: tiles without keys between others.
TEST(DeviceSm90AttentionFwdTest, TilesWithoutKeys) {
  Case c = case_of(DType::kBFloat16, 390, 150);
  c.options.window_left = 100;
  c.options.causal_align = CausalAlign::kTopLeft;
  c.has_sinks = true;
  expect_matches<kBf16Masked>(c);
}

TEST(DeviceSm90AttentionFwdTest, SingleRowsAndKeys) {
  for (const int64_t len : {1, 2, 65}) expect_matches<kBf16>(case_of(DType::kBFloat16, len, 66 - len));
}

TEST(DeviceSm90AttentionFwdTest, NoKeys) {
  Case c = case_of(DType::kBFloat16, 130, 0);
  expect_matches<kBf16>(c);
  c.has_sinks = true;
  expect_matches<kBf16>(c);
}

// All weight on one key: its values, bit by bit, when the launch is replayed too.
TEST(DeviceSm90AttentionFwdTest, OneKeyIsCopied) {
  Case c = case_of(DType::kFloat16, 270, 1);
  const Inputs in = make_inputs(c);
  const Tensor out(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_v});
  const Tensor lse(DType::kFloat32, {c.batch, c.num_q_heads, c.q_len});
  auto params = make_params<Sm90AttentionFwdParams>(c);
  set_operands(params, in, out, lse);
  make_maps<kF16>(params, c);
  run_kernel<kF16>(params, kReplayed);
  for (int64_t i = 0; i < out.count(); ++i) ASSERT_EQ(out.get(i), in.v.get(i % c.head_dim_v));
}

TEST(DeviceSm90AttentionFwdTest, PackedSequencesAndRowsOutside) {
  Case c = causal_case_of(DType::kBFloat16, 250, 260, CausalAlign::kBottomRight);
  c.has_sinks = true;
  expect_matches<varlen(kBf16Masked)>(c, {.bounds = {.q = {3, 3, 8, 160, 160, 241}, .k = {1, 1, 6, 150, 155, 256}}});
}

// Beyond what is used of a sequence's keys, and between sequences, lie values that are not numbers.
TEST(DeviceSm90AttentionFwdTest, PackedSequencesWithUsedKeys) {
  Case c = case_of(DType::kBFloat16, 150, 260);
  expect_matches<varlen(kBf16)>(c, {.bounds = {.q = {0, 20, 150}, .k = {0, 190, 260}, .used = {129, 33}}});
}

// A sequence's keys, and another one's queries, end at each row of a tile.
TEST(DeviceSm90AttentionFwdTest, PackedSequencesOfEveryLength) {
  constexpr int kMostKeys = 129;
  Bounds bounds{.q = {0}, .k = {0}};
  for (int len = 1; len <= kMostKeys; ++len) {
    bounds.q.push_back(bounds.q.back() + kMostKeys + 1 - len);
    bounds.k.push_back(bounds.k.back() + len);
  }
  Case c = case_of(DType::kBFloat16, bounds.q.back(), bounds.k.back());
  c.num_q_heads = 1;
  const auto row = [&](int token) { return static_cast<int64_t>(token) * c.head_dim_v; };
  c.edit = [&](Tensor&, Tensor&, Tensor& v) {  // one of them only: its neighbours do not read its keys
    for (int64_t i = row(bounds.k[65]); i < row(bounds.k[66]); ++i) v.set(i, kNaN);
  };
  expect_matches<varlen(kBf16)>(c, {.bounds = bounds});
}

// Sections of two heads and of the one that is left, then three in one section: every tile is somebody's.
TEST(DeviceSm90AttentionFwdTest, SectionsOfHeads) {
  Case c = causal_case_of(DType::kBFloat16, 140, 140, CausalAlign::kTopLeft);
  c.batch = 3;
  const auto set_order = [](Sm90AttentionFwdParams& params) {
    params.section_heads = 2;
    params.num_tail_heads = 3;
  };
  expect_matches<kBf16Masked>(c, {.edit = set_order});
}

TEST(DeviceSm90AttentionFwdTest, StridesGroupsAndNoLse) {
  Case c = case_of(DType::kFloat16, 70, 140);
  c.batch = 2;
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  c.layout = Layout::kHeadsFirst;
  expect_matches<kF16>(c, {.edit = [](Sm90AttentionFwdParams& params) { params.lse.data = nullptr; }});
}

// A key that a row does not see must not reach it.
TEST(DeviceSm90AttentionFwdTest, HiddenValuesThatAreNotFinite) {
  Case c = causal_case_of(DType::kBFloat16, 70, 75, CausalAlign::kTopLeft);
  c.edit = spoil_values;
  expect_matches<kBf16Masked>(c);
  c = causal_case_of(DType::kBFloat16, 280, 280, CausalAlign::kTopLeft);
  c.edit = [](Tensor&, Tensor&, Tensor& v) { v.set(200 * 128 + 5, kNaN); };
  expect_matches<kBf16Masked>(c);
}

// All rows of many tiles are computed again: more than there are records of tiles.
TEST(DeviceSm90AttentionFwdTest, ManyTilesThatAreNotFinite) {
  Case c = case_of(DType::kBFloat16, 280, 9);
  c.num_q_heads = 4;
  c.edit = [](Tensor&, Tensor&, Tensor& v) { v.set(3 * 128 + 5, kInfinity); };
  expect_matches<kBf16>(c);
}

// The next sequence's rows are behind the end of this one's.
TEST(DeviceSm90AttentionFwdTest, NeighboursThatAreNotFinite) {
  Case c = case_of(DType::kBFloat16, 40, 70);
  c.batch = 2;
  c.edit = [](Tensor& q, Tensor& k, Tensor& v) {
    for (Tensor* tensor : {&q, &k, &v}) {
      for (int64_t i = tensor->count() / 2; i < tensor->count(); ++i) tensor->set(i, kNaN);
    }
  };
  expect_matches<kBf16>(c);
}

TEST(DeviceSm90AttentionFwdTest, ScoresThatAreNotFinite) {
  Case c = case_of(DType::kBFloat16, 90, 200);
  c.edit = [](Tensor& q, Tensor& /*k*/, Tensor& /*v*/) {
    q.set(3 * 256, kNaN);        // row 3 of head 0
    q.set(20 * 256, kInfinity);  // scores of both signs
  };
  expect_matches<kBf16>(c);
  c.edit = [](Tensor& /*q*/, Tensor& k, Tensor& /*v*/) { k.set(150 * 128 + 7, -kInfinity); };
  expect_matches<kBf16>(c);
  c = causal_case_of(DType::kFloat16, 200, 200, CausalAlign::kTopLeft);
  c.edit = [](Tensor& /*q*/, Tensor& k, Tensor& /*v*/) { k.set(150 * 128 + 7, kNaN); };
  expect_matches<spec_of(Element::kFloat16, 128, 128, true)>(c);
}

TEST(DeviceSm90AttentionFwdTest, ScoresOfTenThousand) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    Case c = case_of(dtype, 80, 300);
    c.gain = 2500.0;
    if (dtype == DType::kFloat16) expect_matches<kF16>(c);
    if (dtype == DType::kBFloat16) expect_matches<kBf16>(c);
  }
}

TEST(DeviceSm90AttentionFwdTest, GrowingScores) {
  Case c = case_of(DType::kBFloat16, 100, 300);
  c.edit = make_growing;
  expect_matches<kBf16>(c);
  c.dtype = DType::kFloat16;
  expect_matches<kF16>(c);
}

// Probabilities far above 1, while a reference is old, times values near the largest ones that there are.
TEST(DeviceSm90AttentionFwdTest, LargeValuesUnderGrowingScores) {
  Case c = case_of(DType::kBFloat16, 70, 300);
  c.edit = [](Tensor& q, Tensor& k, Tensor& v) {
    make_growing(q, k, v);
    for (int64_t i = 0; i < v.count(); ++i) v.set(i, 1e36 * v.get(i));
  };
  expect_matches<kBf16>(c);
}

TEST(DeviceSm90AttentionFwdTest, SteepRowsBesideFlatOnes) {
  Case c = case_of(DType::kBFloat16, 70, 300);
  c.edit = make_mixed;
  expect_matches<kBf16>(c);
}

}  // namespace
}  // namespace heed
