// The Hopper forward kernel on the CPU, continued: tiles of 192 rows, three warpgroups that compute.
#include <gtest/gtest.h>

#include "emulated_sm90_attention_fwd.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

constexpr int64_t kDim = 64;

constexpr Sm90AttentionFwdSpec tall(Element element, bool has_mask = false) {
  Sm90AttentionFwdSpec spec = spec_of(element, kDim, kDim, has_mask);
  spec.is_tall = true;
  return spec;
}
constexpr Sm90AttentionFwdSpec kTall = tall(Element::kBFloat16), kTallMasked = tall(Element::kBFloat16, true);
constexpr Sm90AttentionFwdSpec kTallF16 = tall(Element::kFloat16);

static_assert(cuda::sm90_attention_fwd_tile(kTall).q_rows() == 192);
static_assert(cuda::sm90_attention_fwd_tile(kTall).num_threads() == 512);

// All registers of a multiprocessor, and what a launch gives each thread is a multiple of 8.
constexpr bool uses_all_registers(const Sm90AttentionFwdSpec& spec) {
  const cuda::Sm90AttentionFwdTile tile = cuda::sm90_attention_fwd_tile(spec);
  const int at_launch = 65536 / tile.num_threads() / 8 * 8;
  return tile.num_consumers * tile.consumer_registers() + tile.producer_registers() ==
         (tile.num_consumers + 1) * at_launch;
}
static_assert(uses_all_registers(kTall) && uses_all_registers(kBf16));

TEST(DeviceSm90AttentionFwdTallTest, LengthsAroundTheTile) {
  for (const int64_t len : {1, 64, 65, 128, 191, 192, 193, 400}) {
    expect_matches<kTall>(case_of(DType::kBFloat16, len, 401 - len, kDim));
    expect_matches<kTallMasked>(causal_case_of(DType::kBFloat16, len, len, CausalAlign::kBottomRight, kDim));
  }
}

TEST(DeviceSm90AttentionFwdTallTest, F16) {
  Case c = case_of(DType::kFloat16, 250, 520, kDim);
  c.batch = 2;
  expect_matches<kTallF16>(c);
}

TEST(DeviceSm90AttentionFwdTallTest, WindowsAndSinks) {
  Case c = case_of(DType::kBFloat16, 410, 500, kDim);
  c.has_sinks = true;
  c.options.window_left = 150;
  c.options.window_right = 20;
  expect_matches<kTallMasked>(c);
  c.options.causal_align = CausalAlign::kTopLeft;
  c.kv_len = 150;  // the last rows see nothing
  expect_matches<kTallMasked>(c);
}

TEST(DeviceSm90AttentionFwdTallTest, NoKeys) { expect_matches<kTall>(case_of(DType::kBFloat16, 200, 0, kDim)); }

TEST(DeviceSm90AttentionFwdTallTest, PackedSequences) {
  Case c = causal_case_of(DType::kBFloat16, 450, 460, CausalAlign::kBottomRight, kDim);
  c.has_sinks = true;
  expect_matches<varlen(kTallMasked)>(c, {.bounds = {.q = {3, 3, 8, 260, 260, 441}, .k = {1, 1, 6, 250, 255, 456}}});
  c = case_of(DType::kBFloat16, 250, 260, kDim);
  expect_matches<varlen(kTall)>(c, {.bounds = {.q = {0, 20, 250}, .k = {0, 190, 260}, .used = {129, 33}}});
}

// Rows that are mended: some of a warp's, all of many tiles, beside keys that they do not see; and their sinks.
TEST(DeviceSm90AttentionFwdTallTest, ValuesThatAreNotFinite) {
  Case c = causal_case_of(DType::kBFloat16, 280, 280, CausalAlign::kTopLeft, kDim);
  c.edit = [](Tensor&, Tensor&, Tensor& v) { v.set(200 * kDim + 5, kNaN); };
  expect_matches<kTallMasked>(c);
  c = causal_case_of(DType::kBFloat16, 210, 210, CausalAlign::kTopLeft, kDim);
  c.edit = spoil_values;
  c.has_sinks = true;
  expect_matches<kTallMasked>(c);
  c = case_of(DType::kBFloat16, 400, 9, kDim);
  c.edit = [](Tensor&, Tensor&, Tensor& v) { v.set(3 * kDim + 5, kInfinity); };
  c.has_sinks = true;
  expect_matches<kTall>(c);
  c.dtype = DType::kFloat16;
  expect_matches<kTallF16>(c);
}

TEST(DeviceSm90AttentionFwdTallTest, ScoresThatAreNotFinite) {
  Case c = case_of(DType::kBFloat16, 250, 300, kDim);
  c.edit = [](Tensor& q, Tensor& /*k*/, Tensor& /*v*/) {
    q.set(3 * 2 * kDim, kNaN);         // row 3 of head 0
    q.set(150 * 2 * kDim, kInfinity);  // scores of both signs
  };
  expect_matches<kTall>(c);
  c = case_of(DType::kBFloat16, 210, 200, kDim);
  c.edit = [](Tensor& /*q*/, Tensor& k, Tensor& /*v*/) { k.set(150 * kDim + 7, -kInfinity); };
  expect_matches<kTall>(c);
}

// A window, packed, and rows of the second sequence that a key's infinity reaches.
TEST(DeviceSm90AttentionFwdTallTest, PackedValuesThatAreNotFinite) {
  Case c = case_of(DType::kBFloat16, 450, 460, kDim);
  c.options.window_left = 30;
  c.options.window_right = 5;
  c.edit = [](Tensor& /*q*/, Tensor& /*k*/, Tensor& v) {
    v.set(300 * kDim + 5, kInfinity);
    v.set(390 * kDim, kNaN);
  };
  expect_matches<varlen(kTallMasked)>(c, {.bounds = {.q = {3, 203, 441}, .k = {1, 210, 456}}});
}

// References get too old, and steps are computed again.
TEST(DeviceSm90AttentionFwdTallTest, GrowingScores) {
  Case c = case_of(DType::kBFloat16, 230, 300, kDim);
  c.edit = make_growing;
  expect_matches<kTall>(c);
  c.dtype = DType::kFloat16;
  expect_matches<kTallF16>(c);
  c = causal_case_of(DType::kBFloat16, 230, 300, CausalAlign::kBottomRight, kDim);
  c.edit = make_growing;
  expect_matches<kTallMasked>(c);
  c = case_of(DType::kBFloat16, 210, 300, kDim);
  c.edit = make_mixed;
  expect_matches<kTall>(c);
}

TEST(DeviceSm90AttentionFwdTallTest, StridesSectionsAndNoLse) {
  Case c = causal_case_of(DType::kBFloat16, 210, 140, CausalAlign::kTopLeft, kDim);
  c.batch = 3;
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  c.layout = Layout::kHeadsFirst;
  const auto edit = [](Sm90AttentionFwdParams& params) {
    params.section_heads = 2;
    params.num_tail_heads = 3;
    params.lse.data = nullptr;
  };
  expect_matches<kTallMasked>(c, {.edit = edit});
}

}  // namespace
}  // namespace heed
