// The Hopper forward kernel on the CPU, continued: rows that are computed once more by themselves, since they are not
// finite or too steep, in each of the variants; and what sinks of any size make of rows.
#include <gtest/gtest.h>

#include <cmath>

#include "emulated_sm90_attention_fwd.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

struct Features {
  bool segments = false, softcap = false, alibi = false, scales_first = false;
};
constexpr Sm90AttentionFwdSpec masked_with(const Features& features) {
  Sm90AttentionFwdSpec spec = kBf16Masked;
  spec.has_segment_ids = features.segments;
  spec.has_softcap = features.softcap;
  spec.has_alibi = features.alibi;
  spec.scales_first = features.scales_first;
  return spec;
}
constexpr Sm90AttentionFwdSpec kSegments = masked_with({.segments = true});
constexpr Sm90AttentionFwdSpec kAlibi = masked_with({.alibi = true});
constexpr Sm90AttentionFwdSpec kSoftcapAlibi = masked_with({.softcap = true, .alibi = true});
constexpr Sm90AttentionFwdSpec kScalesFirst = masked_with({.scales_first = true});

// Every other token from 40 on.
void spoil_every_other(Tensor& /*q*/, Tensor& /*k*/, Tensor& v) {
  const int64_t row = v.view.shape[2] * v.view.shape[3];
  for (int64_t i = 40 * row; i < v.count(); ++i) {
    if (i / row % 2 == 1) v.set(i, i % 3 == 0 ? kInfinity : i % 3 == 1 ? kNaN : -kInfinity);
  }
}
// A value of every 17th token: other columns stay finite.
void spoil_single_values(Tensor& /*q*/, Tensor& /*k*/, Tensor& v) {
  const int64_t row = v.view.shape[2] * v.view.shape[3];
  for (int64_t i = 0; i < v.count(); i += row * 17 + 3) v.set(i, i % 2 == 0 ? kInfinity : -kInfinity);
}

TEST(DeviceSm90AttentionFwdRowsTest, Segments) {
  Case c = causal_case_of(DType::kBFloat16, 150, 140, CausalAlign::kTopLeft);
  c.batch = 2;
  c.has_segments = true;
  for (const auto& edit : {spoil_every_other, spoil_single_values}) {
    c.edit = edit;
    expect_matches<kSegments>(c);
  }
  c.options.is_causal = false;
  c.options.window_left = 60;
  c.options.window_right = 30;
  c.options.softcap = 3.0;
  c.has_sinks = c.has_alibi = true;
  expect_matches<masked_with({.segments = true, .softcap = true, .alibi = true})>(c);
}

// Tiles and steps of several segments each, and no mask.
TEST(DeviceSm90AttentionFwdRowsTest, ManySegments) {
  constexpr Sm90AttentionFwdSpec kSpec = [] {
    Sm90AttentionFwdSpec spec = kSegments;
    spec.has_mask = false;
    return spec;
  }();
  Case c = case_of(DType::kBFloat16, 300, 700);
  c.has_segments = c.has_sinks = true;
  expect_matches<kSpec>(c);
}

TEST(DeviceSm90AttentionFwdRowsTest, SoftcapAndAlibi) {
  Case c = causal_case_of(DType::kBFloat16, 150, 140, CausalAlign::kBottomRight);
  c.has_alibi = true;
  c.edit = spoil_every_other;
  expect_matches<kAlibi>(c);
  c.options.softcap = 5.0;
  c.gain = 10.0;
  c.edit = spoil_single_values;
  expect_matches<kSoftcapAlibi>(c);
}

// Without a window or a causal mask: the variant is that with a mask, which hides nothing.
TEST(DeviceSm90AttentionFwdRowsTest, TransformedScoresWithoutAMask) {
  Case c = case_of(DType::kBFloat16, 140, 600);
  c.has_alibi = true;
  c.gain = 30.0;
  expect_matches<kAlibi>(c);
  c.options.softcap = 5.0;
  c.edit = spoil_single_values;
  expect_matches<kSoftcapAlibi>(c);
}

TEST(DeviceSm90AttentionFwdRowsTest, ScalesBeforeTheMaximum) {
  Case c = causal_case_of(DType::kBFloat16, 150, 140, CausalAlign::kBottomRight);
  for (const double scale : {-0.3, 0.0}) {
    c.options.softmax_scale = scale;
    for (const auto& edit : {spoil_every_other, spoil_single_values}) {
      c.edit = edit;
      expect_matches<kScalesFirst>(c);
    }
    c.edit = [](Tensor& q, Tensor& k, Tensor& /*v*/) {
      q.set(3 * 256, kNaN);
      q.set(20 * 256, kInfinity);
      k.set(77 * 256 + 5, -kInfinity);
    };
    expect_matches<kScalesFirst>(c);
  }
}

TEST(DeviceSm90AttentionFwdRowsTest, SinksOfAnySize) {
  for (const double sink : {kInfinity, -kInfinity, kNaN, 300.0, -300.0}) {
    Case c = causal_case_of(DType::kBFloat16, 70, 140, CausalAlign::kTopLeft);
    c.has_sinks = true;
    c.sinks = {sink, 0.5};
    expect_matches<kBf16Masked>(c);
    for (const auto& edit : {spoil_every_other, spoil_single_values}) {
      c.edit = edit;
      expect_matches<kBf16Masked>(c);
    }
    if (!(sink < kInfinity)) continue;
    c.options.causal_align = CausalAlign::kBottomRight;
    c.q_len = 140;
    c.kv_len = 60;  // the first rows see nothing
    expect_matches<kBf16Masked>(c);
    c.edit = [](Tensor& q, Tensor& /*k*/, Tensor& /*v*/) {
      for (int64_t i = 0; i < q.count(); i += 128) q.set(i, -kInfinity);
    };
    expect_matches<kBf16Masked>(c);
  }
}

// Infinite values count, however small the probabilities of their keys are.
TEST(DeviceSm90AttentionFwdRowsTest, InfiniteValuesOfSmallWeight) {
  for (const double slope : {2.0, 8.0}) {
    Case c = case_of(DType::kBFloat16, 40, 200);
    c.options.softmax_scale = 1.0;
    c.edit = [slope](Tensor& q, Tensor& k, Tensor& v) {
      for (int64_t i = 0; i < q.count(); ++i) q.set(i, i % 128 == 0 ? 1.0 : 0.0);
      for (int64_t i = 0; i < k.count(); ++i) k.set(i, i % 128 == 0 ? -slope * static_cast<double>(i / 256) : 0.0);
      for (int64_t key = 0; key < 200; ++key) v.set(key * 256 + key % 128, kInfinity);
    };
    expect_matches<kBf16>(c);
    c.has_sinks = true;
    c.sinks = {50.0, 500.0};
    expect_matches<kBf16>(c);
  }
}

TEST(DeviceSm90AttentionFwdRowsTest, SteepRows) {
  for (const double gain : {3e4, 1e6, 1e9}) {
    Case c = causal_case_of(DType::kBFloat16, 80, 200, CausalAlign::kBottomRight);
    c.gain = gain;
    c.has_sinks = true;
    c.edit = [gain](Tensor& /*q*/, Tensor& k, Tensor& /*v*/) {
      for (int64_t i = 0; i < k.count(); ++i) k.set(i, gain * std::round(4 * k.get(i)));
    };
    expect_matches<kBf16Masked>(c);
    c.has_alibi = true;
    expect_matches<kAlibi>(c);
  }
}

TEST(DeviceSm90AttentionFwdRowsTest, PackedSequences) {
  Case c = causal_case_of(DType::kBFloat16, 150, 260, CausalAlign::kBottomRight);
  c.has_sinks = true;
  c.edit = spoil_every_other;
  const Details details{.bounds = {.q = {3, 23, 148}, .k = {5, 190, 258}, .used = {129, 33}}};
  expect_matches<varlen(kBf16Masked)>(c, details);
  c.has_alibi = true;
  c.options.softcap = 4.0;
  expect_matches<varlen(kSoftcapAlibi)>(c, details);
}

// Columns beyond the head dims, groups of heads and other strides.
TEST(DeviceSm90AttentionFwdRowsTest, HeadDimsThatFillNoPart) {
  Case c = causal_case_of(DType::kBFloat16, 70, 140, CausalAlign::kTopLeft, 120);
  c.head_dim_v = 104;
  c.batch = 2;
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  c.layout = Layout::kHeadsFirst;
  c.edit = spoil_every_other;
  expect_matches<kBf16Masked>(c);
}

TEST(DeviceSm90AttentionFwdRowsTest, F16) {
  Case c = causal_case_of(DType::kFloat16, 150, 140, CausalAlign::kTopLeft);
  c.edit = spoil_every_other;
  expect_matches<spec_of(Element::kFloat16, 128, 128, true)>(c);
  c.edit = [](Tensor& /*q*/, Tensor& /*k*/, Tensor& v) {
    for (int64_t i = 0; i < v.count(); ++i) v.set(i, i % 2 == 0 ? -65504.0 : 65504.0);
  };
  expect_matches<spec_of(Element::kFloat16, 128, 128, true)>(c);
}

}  // namespace
}  // namespace heed
