// The Hopper forward kernel on the CPU, continued: its other head dims, and what changes scores.
#include <gtest/gtest.h>

#include "emulated_sm90_attention_fwd.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

template <int kQk, int kV, Element kElement = Element::kBFloat16>
void check_head_dims() {
  constexpr DType kDType = kElement == Element::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
  Case c = case_of(kDType, 150, 300, kQk);
  c.head_dim_v = kV;
  expect_matches<spec_of(kElement, kQk, kV)>(c);
  c = causal_case_of(kDType, 200, 230, CausalAlign::kBottomRight, kQk);
  c.head_dim_v = kV;
  expect_matches<spec_of(kElement, kQk, kV, true)>(c);
}

TEST(DeviceSm90AttentionFwdVariantsTest, HeadDim64) { check_head_dims<64, 64>(); }
TEST(DeviceSm90AttentionFwdVariantsTest, HeadDim80) { check_head_dims<80, 80>(); }
TEST(DeviceSm90AttentionFwdVariantsTest, HeadDim96) { check_head_dims<96, 96, Element::kFloat16>(); }
TEST(DeviceSm90AttentionFwdVariantsTest, HeadDim192) { check_head_dims<192, 192>(); }
TEST(DeviceSm90AttentionFwdVariantsTest, HeadDim256) { check_head_dims<256, 256>(); }
TEST(DeviceSm90AttentionFwdVariantsTest, HeadDims192And128) { check_head_dims<192, 128>(); }

TEST(DeviceSm90AttentionFwdVariantsTest, PackedHeadDim80) {
  Case c = causal_case_of(DType::kBFloat16, 150, 260, CausalAlign::kBottomRight, 80);
  expect_matches<varlen(spec_of(Element::kBFloat16, 80, 80, true))>(
      c, {.bounds = {.q = {2, 20, 148}, .k = {1, 190, 260}}});
}

constexpr Sm90AttentionFwdSpec kMasked = spec_of(Element::kBFloat16, 128, 128, true);

TEST(DeviceSm90AttentionFwdVariantsTest, Segments) {
  constexpr Sm90AttentionFwdSpec kSpec = [] {
    Sm90AttentionFwdSpec spec = kMasked;
    spec.has_segment_ids = true;
    return spec;
  }();
  Case c = causal_case_of(DType::kBFloat16, 190, 210, CausalAlign::kTopLeft);
  c.batch = 2;
  c.has_segments = true;
  expect_matches<kSpec>(c);
}

TEST(DeviceSm90AttentionFwdVariantsTest, Softcap) {
  constexpr Sm90AttentionFwdSpec kSpec = [] {
    Sm90AttentionFwdSpec spec = kMasked;
    spec.has_softcap = true;
    return spec;
  }();
  Case c = causal_case_of(DType::kBFloat16, 190, 210, CausalAlign::kBottomRight);
  c.options.softcap = 2.0;
  c.gain = 4.0;
  expect_matches<kSpec>(c);
}

TEST(DeviceSm90AttentionFwdVariantsTest, SoftcapAlibiAndSegments) {
  constexpr Sm90AttentionFwdSpec kSpec = [] {
    Sm90AttentionFwdSpec spec = kMasked;
    spec.has_softcap = true;
    spec.has_alibi = true;
    spec.has_segment_ids = true;
    return spec;
  }();
  Case c = causal_case_of(DType::kBFloat16, 190, 190, CausalAlign::kBottomRight);
  c.options.softcap = 2.0;
  c.has_alibi = true;
  c.has_segments = true;
  expect_matches<kSpec>(c);
}

TEST(DeviceSm90AttentionFwdVariantsTest, ScalesBeforeTheMaximum) {
  constexpr Sm90AttentionFwdSpec kSpec = [] {
    Sm90AttentionFwdSpec spec = spec_of(Element::kBFloat16, 128, 128);
    spec.scales_first = true;
    return spec;
  }();
  Case c = case_of(DType::kBFloat16, 100, 300);
  for (const double scale : {-0.1, 0.0}) {
    c.options.softmax_scale = scale;
    expect_matches<kSpec>(c);
  }
}

}  // namespace
}  // namespace heed
