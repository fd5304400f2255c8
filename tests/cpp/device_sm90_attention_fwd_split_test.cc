// Tiles of the Hopper forward kernel whose steps several blocks share, on the CPU (device_sm90_attention_fwd_test.cc
// has the others): many ways to cut them, orders of the blocks, whatever the workspace held before.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>

#include "emulated_sm90_attention_fwd.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

constexpr Sm90AttentionFwdSpec split(Sm90AttentionFwdSpec spec) {
  spec.splits_steps = true;
  return spec;
}
constexpr Sm90AttentionFwdSpec kSplit = split(kBf16);
constexpr Sm90AttentionFwdSpec kSplit64 = split(spec_of(Element::kBFloat16, 64, 64));
constexpr Sm90AttentionFwdSpec kSplitF16 = split(kF16);

struct Cut {
  unsigned num_blocks, num_whole_tiles, num_parts;
  bool takes_turns = true;
  int head_shift = 0;  // with heads that share tiles, of which the exponent of 2 is this
};

template <Sm90AttentionFwdSpec kSpec>
class SplitLaunch {
 public:
  SplitLaunch(const Case& c, const Cut& cut)
      : c_(c),
        cut_(cut),
        in_(make_inputs(c)),
        oracle_(packed_attention<double>(c, in_, {})),
        naive_(packed_attention<float>(c, in_, {})),
        out_(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_v}),
        lse_(DType::kFloat32, {c.batch, c.num_q_heads, c.q_len}),
        params_(make_params<Sm90AttentionFwdParams>(c)) {
    constexpr int kQRows = cuda::sm90_attention_fwd_tile(kSpec).q_rows();
    set_operands(params_, in_, out_, lse_);
    params_.head_shift = cut.head_shift;
    params_.num_heads >>= cut.head_shift;
    make_maps<kSpec>(params_, c);
    params_.num_tiles = ((params_.q_len << cut.head_shift) + kQRows - 1) / kQRows;
    const unsigned num_tiles = static_cast<unsigned>(params_.num_tiles) * params_.num_heads;
    num_slots_ = num_tiles - cut.num_whole_tiles + cut.num_parts - 1;
    params_.num_whole_tiles = cut.num_whole_tiles;
    params_.num_tiles_in_all = cut.num_whole_tiles + cut.num_parts;
    params_.next_tile = cut.takes_turns ? counter_ : nullptr;
    for (unsigned i = 0; i < 3; ++i) params_.nonce[i] = 80 + i;
    memory_.assign(kSlotBytes * num_slots_ + 128, static_cast<char>(0xEE));
    params_.slots = memory_.data() + 128 - reinterpret_cast<uintptr_t>(memory_.data()) % 128;
  }

  void run(unsigned block) {
    gridDim.x = cut_.num_blocks;
    device_emulation::run_block(block, Kernel::kNumThreads, Kernel::kSharedBytes, [&] { Kernel::run(params_); });
  }
  void run_all(bool is_backwards) {
    for (unsigned i = 0; i < cut_.num_blocks; ++i) run(is_backwards ? cut_.num_blocks - 1 - i : i);
  }
  void run_all(std::mt19937& random) {
    std::vector<unsigned> blocks(cut_.num_blocks);
    std::iota(blocks.begin(), blocks.end(), 0U);
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (const unsigned block : blocks) run(block);
  }

  // As if all parts were there, of the launch before.
  void set_flags() {
    const uint64_t mark = params_.nonce[0] | static_cast<uint64_t>(params_.nonce[1]) << 32;
    for_flags([&](char* flag) { std::memcpy(flag, &mark, 8); });
  }
  void expect_clean() {
    for_flags([&](const char* flag) {
      uint64_t value = 0;
      std::memcpy(&value, flag, 8);
      EXPECT_TRUE(value == 0 || value == 0xEEEEEEEEEEEEEEEE);  // a tile in one part leaves nothing
    });
    if (!cut_.takes_turns || cut_.num_whole_tiles == 0) return;
    for (const unsigned word : counter_) EXPECT_EQ(word, 0U);
  }
  void clear_results() {
    for (int64_t i = 0; i < out_.count(); ++i) out_.set(i, 7.0);
    for (int64_t i = 0; i < lse_.count(); ++i) lse_.set(i, 7.0);
  }
  std::vector<double> results() const {
    std::vector<double> values;
    for (int64_t i = 0; i < out_.count(); ++i) values.push_back(std::isnan(out_.get(i)) ? 1e300 : out_.get(i));
    for (int64_t i = 0; i < lse_.count(); ++i) values.push_back(std::isnan(lse_.get(i)) ? 1e300 : lse_.get(i));
    return values;
  }
  void expect_right() const {
    expect_close(out_, naive_.out, oracle_.out, c_.dtype, c_.head_dim_v, "out");
    expect_close(lse_, naive_.lse, oracle_.lse, DType::kFloat32, c_.q_len, "lse");
  }

 private:
  using Kernel = cuda::Sm90AttentionFwd<kSpec>;
  static constexpr size_t kSlotBytes = cuda::sm90_attention_fwd_slot_bytes(kSpec);

  template <class F>
  void for_flags(const F& f) {
    for (unsigned slot = 0; slot < num_slots_; ++slot) {
      for (int warp = 0; warp < 8; ++warp) f(params_.slots + (slot + 1) * kSlotBytes - 128 + warp * 8);
    }
  }

  Case c_;
  Cut cut_;
  Inputs in_;
  Expected oracle_, naive_;
  Tensor out_, lse_;
  Sm90AttentionFwdParams params_;
  alignas(16) unsigned counter_[4] = {7, 8, 9, 10};
  unsigned num_slots_ = 0;
  std::vector<char> memory_;
};

// Forwards, then, as a graph does, once more with the same parameters, backwards and in any order; or one of these two.
template <Sm90AttentionFwdSpec kSpec>
void expect_split_matches(const Case& c, const Cut& cut, bool both = true) {
  SCOPED_TRACE(testing::Message() << c.q_len << " rows, " << c.kv_len << " keys, " << cut.num_whole_tiles
                                  << " whole tiles, " << cut.num_parts << " parts, packs of " << (1 << cut.head_shift));
  static std::mt19937 random{1};
  const int left_out = both ? 0 : 1 + static_cast<int>(random() % 2);
  SplitLaunch<kSpec> launch(c, cut);
  std::vector<double> first;
  for (int round = 0; round < 3; ++round) {
    if (round > 0 && round == left_out) continue;
    device_emulation::block.copies_late = round == 1;
    device_emulation::block.copies_vary = round == 2;
    launch.clear_results();
    if (round == 2) {
      launch.run_all(random);
    } else {
      launch.run_all(round == 1);
    }
    launch.expect_right();
    launch.expect_clean();
    if (first.empty()) first = launch.results();
    EXPECT_TRUE(launch.results() == first) << "not the same bits in round " << round;
  }
}

Case split_case_of(int64_t q_len, int64_t num_heads, int64_t kv_len, int64_t head_dim) {
  Case c = case_of(DType::kBFloat16, q_len, kv_len, head_dim);
  c.num_q_heads = num_heads;
  c.num_kv_heads = 1;
  return c;
}

// One tile of up to five steps, the last one not full, in parts of every length.
TEST(DeviceSm90AttentionFwdSplitTest, OneTile) {
  for (unsigned steps = 1; steps <= 5; ++steps) {
    for (unsigned parts = 1; parts <= steps; ++parts) {
      expect_split_matches<kSplit64>(split_case_of(20, 1, steps * 128 - 31, 64), {parts, 0, parts});
    }
  }
}

// Parts that end one tile and begin the next one.
TEST(DeviceSm90AttentionFwdSplitTest, SeveralTiles) {
  for (const unsigned parts : {2U, 3U, 4U, 5U, 6U}) {
    expect_split_matches<kSplit64>(split_case_of(150, 1, 3 * 128, 64), {parts, 0, parts});
  }
  for (const unsigned parts : {3U, 4U, 5U, 7U, 11U, 12U}) {
    expect_split_matches<kSplit64>(split_case_of(30, 3, 4 * 128 - 1, 64), {parts, 0, parts});
  }
}

// The end of a tile, a whole one and the beginning of another.
TEST(DeviceSm90AttentionFwdSplitTest, PartsLongerThanATile) {
  expect_split_matches<kSplit64>(split_case_of(30, 4, 5 * 128, 64), {3, 0, 3});
  expect_split_matches<kSplit64>(split_case_of(30, 6, 4 * 128, 64), {3, 0, 3});
  expect_split_matches<kSplit64>(split_case_of(30, 5, 3 * 128, 64), {4, 0, 4});
  expect_split_matches<kSplit64>(split_case_of(30, 11, 3 * 128, 64), {4, 4, 4});
}

// Whole tiles before, as many as blocks and more; a launch of more blocks than parts.
TEST(DeviceSm90AttentionFwdSplitTest, WholeTilesFirst) {
  for (const bool takes_turns : {true, false}) {
    expect_split_matches<kSplit64>(split_case_of(20, 5, 300, 64), {3, 3, 3, takes_turns});
    expect_split_matches<kSplit64>(split_case_of(20, 5, 300, 64), {4, 4, 2, takes_turns});
    expect_split_matches<kSplit64>(split_case_of(20, 6, 300, 64), {2, 4, 2, takes_turns});
    expect_split_matches<kSplit64>(split_case_of(140, 4, 500, 64), {3, 6, 3, takes_turns});
  }
}

TEST(DeviceSm90AttentionFwdSplitTest, HeadDim128AndFloat16) {
  Case c = split_case_of(100, 3, 500, 128);
  expect_split_matches<kSplit>(c, {4, 0, 4});
  c.dtype = DType::kFloat16;
  expect_split_matches<kSplitF16>(c, {4, 0, 4});
}

TEST(DeviceSm90AttentionFwdSplitTest, OtherHeadDims) {
  expect_split_matches<split(spec_of(Element::kBFloat16, 80, 80))>(split_case_of(30, 3, 500, 80), {4, 0, 4});
  Case c = split_case_of(30, 3, 500, 192);
  c.head_dim_v = 128;
  expect_split_matches<split(spec_of(Element::kBFloat16, 192, 128))>(c, {4, 0, 4});
}

TEST(DeviceSm90AttentionFwdSplitTest, Sinks) {
  Case c = split_case_of(40, 3, 400, 128);
  c.has_sinks = true;
  expect_split_matches<kSplit>(c, {4, 0, 4});
}

// References that differ widely among parts, and within them get too old.
TEST(DeviceSm90AttentionFwdSplitTest, GrowingAndSteepScores) {
  Case c = split_case_of(60, 2, 512, 128);
  for (const bool grows : {true, false}) {
    c.edit = [&](Tensor& q, Tensor& k, Tensor& /*v*/) {
      const int64_t dim = q.view.shape[3], num_heads = q.view.shape[2];
      for (int64_t row = 0; row < q.count() / dim; ++row) {
        const int64_t token = row / num_heads;
        q.set(row * dim, token % 3 == 0 ? 0.0 : static_cast<double>(token) / 4);
      }
      for (int64_t key = 0; key < k.count() / dim; ++key) {
        k.set(key * dim, static_cast<double>(grows ? key : 512 - key) / 2);
      }
    };
    expect_split_matches<kSplit>(c, {3, 0, 3});
  }
  c.edit = make_mixed;
  expect_split_matches<kSplit>(c, {5, 0, 5});
  c.edit = nullptr;
  c.gain = 2500.0;
  expect_split_matches<kSplit>(c, {3, 0, 3});
}

// In some parts, rows see nothing but scores of -inf.
TEST(DeviceSm90AttentionFwdSplitTest, ScoresThatAreMinusInfinity) {
  for (const bool is_first : {true, false}) {
    Case c = split_case_of(40, 2, 512, 128);
    c.edit = [&](Tensor& q, Tensor& k, Tensor& /*v*/) {
      for (int64_t row = 0; row < q.count() / 128; ++row) q.set(row * 128, 1.0);
      for (int64_t key = 0; key < 512; ++key) {
        if ((key < 256) == is_first) k.set(key * 128, -kInfinity);
      }
    };
    expect_split_matches<kSplit>(c, {4, 0, 4});
    expect_split_matches<kSplit>(c, {3, 0, 3});
  }
}

// The rows are computed again over all keys, by those who merge.
TEST(DeviceSm90AttentionFwdSplitTest, WhatIsNotFinite) {
  Case c = split_case_of(140, 2, 400, 128);
  c.edit = [](Tensor& q, Tensor& k, Tensor& v) {
    q.set(3 * 256, kNaN);        // row 3 of head 0
    q.set(20 * 256, kInfinity);  // scores of both signs
    k.set(150 * 128 + 7, -kInfinity);
    v.set(200 * 128 + 5, kInfinity);
  };
  expect_split_matches<kSplit>(c, {5, 0, 5});
  expect_split_matches<kSplit>(c, {3, 0, 3});
  expect_split_matches<kSplit>(c, {3, 2, 2});
  c.edit = [](Tensor& /*q*/, Tensor& /*k*/, Tensor& v) { v.set(399 * 128 + 5, kNaN); };
  expect_split_matches<kSplit>(c, {7, 0, 7});
}

// Several that find all parts, of which any may be first: the same bits.
TEST(DeviceSm90AttentionFwdSplitTest, EveryPartMergesAlike) {
  Case c = split_case_of(140, 1, 640, 64);
  SplitLaunch<kSplit64> launch(c, {5, 0, 5});
  launch.run_all(false);
  launch.expect_right();
  const std::vector<double> first = launch.results();
  for (unsigned block = 0; block < 5; ++block) {
    launch.set_flags();
    launch.run(block);
    EXPECT_TRUE(launch.results() == first) << block;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Masks, where a head has one tile of rows, and heads that share tiles.

constexpr Sm90AttentionFwdSpec with_packs(Sm90AttentionFwdSpec spec) {
  spec.packs_heads = true;
  return spec;
}
constexpr Sm90AttentionFwdSpec kMasked64 = split(spec_of(Element::kBFloat16, 64, 64, true));
constexpr Sm90AttentionFwdSpec kMasked = split(kBf16Masked);
constexpr Sm90AttentionFwdSpec kPacked64 = with_packs(kSplit64);
constexpr Sm90AttentionFwdSpec kMaskedPacked64 = with_packs(kMasked64);
constexpr Sm90AttentionFwdSpec kMaskedPacked = with_packs(kMasked);

Case grouped(Case c, int64_t group) {
  c.num_kv_heads = 2;
  c.num_q_heads = 2 * group;
  return c;
}
Case masked(Case c, int64_t left, int64_t right, CausalAlign align) {
  c.options.window_left = left;
  c.options.window_right = right;
  c.options.causal_align = align;
  return c;
}

TEST(DeviceSm90AttentionFwdSplitTest, PacksOfHeads) {
  for (const int64_t q_len : {1, 5, 16, 33}) {
    const Case c = grouped(split_case_of(q_len, 1, 4 * 128 - 9, 64), 8);
    for (const int shift : {1, 2, 3}) {
      const unsigned tiles = (16U >> shift) * static_cast<unsigned>(((q_len << shift) + 127) / 128);
      expect_split_matches<kPacked64>(c, {tiles + 3, 0, tiles + 3, true, shift}, false);
      expect_split_matches<kPacked64>(c, {2, tiles - 1, 2, true, shift}, false);
    }
  }
  expect_split_matches<kPacked64>(grouped(split_case_of(7, 1, 300, 64), 16), {5, 0, 5, false, 4}, false);
  expect_split_matches<kPacked64>(grouped(split_case_of(7, 1, 300, 64), 6), {7, 0, 7, true, 1}, false);
}

TEST(DeviceSm90AttentionFwdSplitTest, Causal) {
  for (const int64_t q_len : {2, 64, 100, 128}) {
    for (const int64_t kv_len : {128, 300, 513, 640}) {
      const unsigned steps = static_cast<unsigned>(kv_len + 127) / 128;
      for (const unsigned parts : {steps, 2 * steps - 1, 2 * steps}) {
        Case c = split_case_of(q_len, 2, kv_len, 64);
        c.options.is_causal = true;
        expect_split_matches<kMasked64>(c, {parts, 0, parts}, false);
      }
    }
  }
}

// The first and the last rows see nothing of some parts: of those at either end, of all but one, or of any.
TEST(DeviceSm90AttentionFwdSplitTest, Windows) {
  const struct {
    int64_t left, right;
  } windows[] = {{-1, 0}, {-1, 200}, {0, 0}, {60, 30}, {200, 0}, {300, 300}, {130, -1}, {1000, 0}};
  for (const CausalAlign align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
    for (const auto& [left, right] : windows) {
      const Case c = masked(split_case_of(90, 3, 700, 64), left, right, align);
      const auto keys = cuda::sm90_attention_fwd_keys(90, 700, left, right, align == CausalAlign::kBottomRight);
      const auto steps = static_cast<unsigned>((keys.end + 127) / 128 - keys.begin / 128);
      for (const unsigned parts : {2U, 4U, 3 * steps}) {
        if (parts <= 3 * steps) expect_split_matches<kMasked64>(c, {parts, 0, parts}, false);
      }
      if (steps > 1) expect_split_matches<kMasked64>(c, {2, 2, 2}, false);
    }
  }
}

// Rows that see no key in any part, whether there are none or their scores are -inf.
TEST(DeviceSm90AttentionFwdSplitTest, RowsWithoutKeys) {
  for (const bool has_sinks : {false, true}) {
    Case c = masked(split_case_of(100, 2, 60, 64), 0, -1, CausalAlign::kTopLeft);
    c.has_sinks = has_sinks;
    expect_split_matches<kMasked64>(c, {2, 0, 2});
    c = grouped(split_case_of(16, 1, 400, 64), 4);
    c.options.is_causal = true;
    c.has_sinks = has_sinks;
    c.edit = [](Tensor& q, Tensor& k, Tensor& /*v*/) {
      for (int64_t row = 0; row < q.count() / 64; ++row) q.set(row * 64, 1.0);
      for (int64_t key = 0; key < 400; ++key) {
        if (key < 256 || key > 393) k.set(key * 2 * 64, -kInfinity);  // of the first KV head
        k.set((key * 2 + 1) * 64, -kInfinity);
      }
    };
    expect_split_matches<kMaskedPacked64>(c, {5, 0, 5, true, 2});
  }
}

TEST(DeviceSm90AttentionFwdSplitTest, MaskedPacksOfHeads) {
  const struct { int64_t left, right; } windows[] = {{-1, 0}, {140, 0}, {30, 290}, {-1, 250}};
  for (const CausalAlign align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
    for (const auto& [left, right] : windows) {
      for (const int64_t q_len : {2, 15}) {
        const Case c = masked(grouped(split_case_of(q_len, 1, 700, 64), 8), left, right, align);
        const auto keys = cuda::sm90_attention_fwd_keys(q_len, 700, left, right, align == CausalAlign::kBottomRight);
        const auto steps = static_cast<unsigned>((keys.end + 127) / 128 - keys.begin / 128);
        for (const int shift : {1, 3}) {
          const unsigned tiles = 16U >> shift, parts = std::min(tiles + 3, tiles * steps);
          expect_split_matches<kMaskedPacked64>(c, {parts, 0, parts, true, shift}, false);
          if (steps > 1) expect_split_matches<kMaskedPacked64>(c, {2, tiles - 1, 2, true, shift}, false);
        }
      }
    }
  }
}

// Rows of products are weights of 0 there, and 0 * NaN is NaN.
TEST(DeviceSm90AttentionFwdSplitTest, HiddenKeysThatAreNotFinite) {
  Case c = grouped(split_case_of(16, 1, 520, 128), 4);
  c.options.is_causal = true;
  c.has_sinks = true;
  c.edit = [](Tensor& q, Tensor& k, Tensor& v) {
    for (int64_t key = 510; key < 520; ++key) {
      v.set((key * 2) * 128 + 3, key % 2 == 0 ? kNaN : kInfinity);
      k.set((key * 2 + 1) * 128 + 3, kNaN);
    }
    q.set((2 * 8 + 5) * 128, kNaN);  // row 2 of head 5
  };
  expect_split_matches<kMaskedPacked>(c, {7, 0, 7, true, 2});
  expect_split_matches<kMasked>(c, {11, 0, 11});
  c.options.is_causal = false;
  c.options.window_left = 100;
  expect_split_matches<kMaskedPacked>(c, {6, 0, 6, true, 1});
}

TEST(DeviceSm90AttentionFwdSplitTest, MaskedGrowingAndSteepScores) {
  Case c = grouped(split_case_of(30, 1, 512, 128), 4);
  c.options.is_causal = true;
  c.edit = make_growing;
  expect_split_matches<kMaskedPacked>(c, {5, 0, 5, true, 2});
  c.edit = make_mixed;
  expect_split_matches<kMaskedPacked>(c, {7, 0, 7, true, 2});
  c.edit = nullptr;
  c.gain = 2500.0;
  expect_split_matches<kMaskedPacked>(c, {5, 0, 5, true, 2});
  c.gain = 1.0;
  c.dtype = DType::kFloat16;
  expect_split_matches<with_packs(split(spec_of(Element::kFloat16, 128, 128, true)))>(c, {5, 0, 5, true, 2});
}

template <int kQk, int kV>
void check_packed_head_dims() {
  Case c = grouped(split_case_of(9, 1, 400, kQk), 4);
  c.head_dim_v = kV;
  c.options.is_causal = true;
  expect_split_matches<with_packs(split(spec_of(Element::kBFloat16, kQk, kV, true)))>(c, {5, 0, 5, true, 2});
}

TEST(DeviceSm90AttentionFwdSplitTest, PacksOfOtherHeadDims) {
  check_packed_head_dims<80, 80>();
  check_packed_head_dims<96, 96>();
  check_packed_head_dims<192, 128>();
}

}  // namespace
}  // namespace heed
