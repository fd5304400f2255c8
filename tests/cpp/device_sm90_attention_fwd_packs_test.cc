// The Hopper forward kernel on the CPU with several heads of a group in a tile: few query rows.
#include <gtest/gtest.h>

#include "emulated_sm90_attention_fwd.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

constexpr Sm90AttentionFwdSpec packed(Sm90AttentionFwdSpec spec) {
  spec.packs_heads = true;
  return spec;
}

Case grouped_case_of(int64_t q_len, int64_t kv_len, int64_t group, int64_t head_dim = 64) {
  Case c = case_of(DType::kBFloat16, q_len, kv_len, head_dim);
  c.num_q_heads = 2 * group;
  c.num_kv_heads = 2;
  return c;
}

constexpr Sm90AttentionFwdSpec kFull = packed(spec_of(Element::kBFloat16, 64, 64));
constexpr Sm90AttentionFwdSpec kMasked = packed(spec_of(Element::kBFloat16, 64, 64, true));

// Two heads, and as many as divide the group, up to the 16 rows that a warp writes at a time; with `all`, all between.
template <Sm90AttentionFwdSpec kSpec>
void expect_matches_in_packs(const Case& c, bool all = true) {
  const int64_t group = c.num_q_heads / c.num_kv_heads;
  for (int shift = 1; shift <= 4 && group % (1 << shift) == 0; ++shift) {
    const bool is_largest = shift == 4 || group % (2 << shift) != 0;
    if (!all && shift != 1 && !is_largest) continue;
    SCOPED_TRACE(std::to_string(c.q_len) + " rows, group of " + std::to_string(group) + ", packs of " +
                 std::to_string(1 << shift));
    expect_matches<kSpec>(c, {.head_shift = shift});
  }
}

TEST(DeviceSm90AttentionFwdPacksTest, EveryNumberOfRows) {
  for (int64_t q_len = 1; q_len <= 65; ++q_len) {
    const int64_t groups[] = {2, 4, 6, 8, 16};
    expect_matches_in_packs<kFull>(grouped_case_of(q_len, 100 + q_len % 40, groups[q_len % 5]), q_len % 8 == 0);
  }
}

TEST(DeviceSm90AttentionFwdPacksTest, Causal) {
  for (const CausalAlign align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
    for (const int64_t q_len : {1, 3, 8, 16, 17, 33, 64, 65}) {
      for (const int64_t group : {2, 8}) {
        Case c = grouped_case_of(q_len, 150 - q_len, group);
        c.options.is_causal = true;
        c.options.causal_align = align;
        expect_matches_in_packs<kMasked>(c);
      }
    }
  }
}

TEST(DeviceSm90AttentionFwdPacksTest, Windows) {
  for (const int64_t q_len : {5, 20, 40}) {
    for (const auto& [left, right] : {std::pair{3, 0}, {60, 20}, {-1, 9}, {200, -1}}) {
      Case c = grouped_case_of(q_len, 300, 4);
      c.options.window_left = left;
      c.options.window_right = right;
      expect_matches_in_packs<kMasked>(c);
      c.options.causal_align = CausalAlign::kTopLeft;
      expect_matches_in_packs<kMasked>(c);
    }
  }
}

// Of the first rows, and of whole tiles.
TEST(DeviceSm90AttentionFwdPacksTest, RowsWithoutKeys) {
  Case c = grouped_case_of(60, 9, 8);
  c.options.is_causal = true;
  for (const bool has_sinks : {false, true}) {
    c.has_sinks = has_sinks;
    expect_matches_in_packs<kMasked>(c);
  }
  c.kv_len = 0;
  expect_matches_in_packs<kFull>(c);
}

TEST(DeviceSm90AttentionFwdPacksTest, SinksOfEachHead) {
  Case c = grouped_case_of(7, 140, 8);
  c.has_sinks = true;
  expect_matches_in_packs<kFull>(c);
}

TEST(DeviceSm90AttentionFwdPacksTest, BatchStridesAndSoftcap) {
  constexpr Sm90AttentionFwdSpec kSpec = [] {
    Sm90AttentionFwdSpec spec = kMasked;
    spec.has_softcap = true;
    return spec;
  }();
  Case c = grouped_case_of(21, 90, 4);
  c.batch = 3;
  c.layout = Layout::kHeadsFirst;
  c.options.is_causal = true;
  c.options.softcap = 2.0;
  expect_matches_in_packs<kSpec>(c);
}

// Each row that is not finite is computed again, with its own head; and scores that outgrow their reference.
TEST(DeviceSm90AttentionFwdPacksTest, RowsThatAreNotFinite) {
  Case c = grouped_case_of(40, 45, 4);
  c.options.is_causal = true;
  c.edit = spoil_values;
  c.has_sinks = true;
  expect_matches_in_packs<kMasked>(c);
  c = grouped_case_of(19, 200, 4);
  c.edit = [](Tensor& q, Tensor& k, Tensor& /*v*/) {
    q.set((3 * 8 + 5) * 64, kNaN);  // row 3 of head 5
    for (int64_t i = 0; i < k.count(); ++i) k.set(i, k.get(i) * (1.0 + static_cast<double>(i / 128) / 2));
  };
  expect_matches_in_packs<kFull>(c);
}

template <int kQk, int kV>
void check_head_dims() {
  Case c = grouped_case_of(19, 200, 8, kQk);
  c.head_dim_v = kV;
  expect_matches<packed(spec_of(Element::kBFloat16, kQk, kV))>(c, {.head_shift = 2});
  c.options.is_causal = true;
  expect_matches<packed(spec_of(Element::kBFloat16, kQk, kV, true))>(c, {.head_shift = 3});
  c.edit = spoil_values;
  expect_matches<packed(spec_of(Element::kBFloat16, kQk, kV, true))>(c, {.head_shift = 3});
}

TEST(DeviceSm90AttentionFwdPacksTest, HeadDim80) { check_head_dims<80, 80>(); }
TEST(DeviceSm90AttentionFwdPacksTest, HeadDim128) { check_head_dims<128, 128>(); }
TEST(DeviceSm90AttentionFwdPacksTest, HeadDims192And128) { check_head_dims<192, 128>(); }
TEST(DeviceSm90AttentionFwdPacksTest, HeadDim192) { check_head_dims<192, 192>(); }
TEST(DeviceSm90AttentionFwdPacksTest, HeadDim256) { check_head_dims<256, 256>(); }

}  // namespace
}  // namespace heed
