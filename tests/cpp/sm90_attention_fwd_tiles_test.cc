// Which tiles Hopper's attention forward is launched with: packs of heads, and the order. Values as they were measured
// (docs/kernel-notes.md).
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "heed/heed.h"
#include "sm90_launches.h"

namespace heed {
namespace {

using device_emulation::TensorMapContents;
using test::args_of;
using test::box_of;
using test::Call;
using test::contents_of;
using test::FakeLaunch;
using test::is_by_sm90;
using test::kTallBlock;
using test::launch_of;
using test::params_of;
using test::Sizes;
using test::sizes_of;
using test::strides_of;
using test::tensor;
using test::with_workspace;

using Sm90AttentionFwdTilesTest = test::Sm90LaunchTest;

// ---------------------------------------------------------------------------------------------------------------------
// Several heads of a group in a tile, where rows are few and tiles are many.

Call few_rows(int64_t batch, int64_t q_len, int64_t num_q_heads, int64_t num_kv_heads) {
  return {.batch = batch, .q_len = q_len, .kv_len = 500, .num_q_heads = num_q_heads, .num_kv_heads = num_kv_heads};
}

TEST_F(Sm90AttentionFwdTilesTest, HeadsOfAGroupShareTiles) {
  const struct {
    int64_t batch, q_len, num_q_heads, num_kv_heads;
    int heads_of_tile, num_tiles;
  } expected[] = {
      {8, 16, 32, 8, 4, 1},    // 256 tiles of a head would be two waves
      {32, 16, 64, 8, 8, 1},   // a whole group
      {32, 1, 64, 4, 16, 1},   // the most
      {32, 16, 48, 8, 2, 1},   // groups of 6
      {32, 33, 64, 8, 8, 3},   // 264 rows: fewer tiles than of 2 or 4 heads
      {32, 64, 64, 8, 2, 1},   // full already
      {32, 16, 56, 8, 1, 1},   // groups of 7
      {32, 16, 32, 32, 1, 1},  // as many KV heads
      {32, 65, 64, 8, 1, 1},   // more than half of a tile's rows
      {4, 16, 32, 8, 1, 1},    // one wave in any case
  };
  for (const auto& [batch, q_len, num_q_heads, num_kv_heads, heads_of_tile, num_tiles] : expected) {
    const Call call = few_rows(batch, q_len, num_q_heads, num_kv_heads);
    const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call));
    SCOPED_TRACE(std::to_string(q_len) + " rows, " + std::to_string(num_q_heads) + " heads");
    EXPECT_EQ(1 << params.head_shift, heads_of_tile);
    EXPECT_EQ(params.num_tiles, num_tiles);
    EXPECT_EQ(params.num_heads, static_cast<unsigned>(batch * num_q_heads / heads_of_tile));
    EXPECT_EQ(params.num_tiles_in_all, params.num_heads * static_cast<unsigned>(num_tiles));
    EXPECT_EQ(params.num_q_heads, num_q_heads);
    EXPECT_EQ(params.section_heads, 1);
  }
}

// Those of tests/sm90_cases.py, which are compared with the oracle.
TEST_F(Sm90AttentionFwdTilesTest, HeadsOfFewRowsShareTiles) {
  for (const int64_t q_len : {1, 3, 16, 33}) {
    for (const int64_t group : {2, 3, 4, 6, 8, 16}) {
      const Call call = few_rows(160 / group + 1, q_len, 2 * group, 2);
      EXPECT_EQ(params_of(launch_of(call)).head_shift > 0, group % 2 == 0) << q_len << " rows, groups of " << group;
    }
  }
}

// As many as take the least time with the tiles cut into parts.
TEST_F(Sm90AttentionFwdTilesTest, HeadsOfAGroupShareTilesThatAreCut) {
  const struct {
    int64_t batch, q_len, num_q_heads, num_kv_heads;
    bool is_causal;
    int heads_of_tile, num_tiles;
  } expected[] = {
      {1, 1, 32, 8, false, 4, 1},                               // 8 tiles, of 11 parts each
      {1, 16, 32, 8, true, 4, 1}, {1, 64, 32, 8, false, 2, 1},  // more heads: as many tiles
      {1, 64, 32, 8, true, 2, 1}, {1, 48, 64, 8, false, 8, 3},
      {1, 48, 64, 8, true, 2, 1},  // of 4 or 8, a head would have several tiles, which are not cut under a mask
      {4, 16, 32, 8, true, 4, 1}, {16, 1, 32, 8, true, 4, 1},  // one wave, and nothing to cut
  };
  for (const auto& [batch, q_len, num_q_heads, num_kv_heads, is_causal, heads_of_tile, num_tiles] : expected) {
    Call call = few_rows(batch, q_len, num_q_heads, num_kv_heads);
    call.kv_len = 8192;
    call.options.is_causal = is_causal;
    const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call));
    SCOPED_TRACE(std::to_string(batch) + " sequences, " + std::to_string(q_len) + " rows, " +
                 std::to_string(num_q_heads) + " heads" + (is_causal ? ", causal" : ""));
    EXPECT_EQ(1 << params.head_shift, heads_of_tile);
    EXPECT_EQ(params.num_tiles, num_tiles);
  }
}

// Tiles that read the same keys do so at once if they are whole. In parts, each would read them from memory again.
TEST_F(Sm90AttentionFwdTilesTest, TilesThatShareKeysInMemoryAreNotCut) {
  const struct {
    int64_t batch, kv_len, num_q_heads;
    bool is_cut;
  } expected[] = {
      {8, 32768, 64, false},
      {16, 32768, 32, false},  // 256 tiles, of 4 and 2 that share keys
      {1, 32768, 64, true},    // 32 tiles would leave multiprocessors idle
      {1, 4096, 64, true},     // keys that stay in L2
  };
  for (const auto& [batch, kv_len, num_q_heads, is_cut] : expected) {
    Call call = few_rows(batch, 64, num_q_heads, 8);
    call.kv_len = kv_len;
    const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call, with_workspace(call, args_of(call))));
    SCOPED_TRACE(std::to_string(batch) + " sequences, " + std::to_string(kv_len) + " keys");
    EXPECT_EQ(1 << params.head_shift, 2);
    EXPECT_EQ(params.slots != nullptr, is_cut);
  }
}

TEST_F(Sm90AttentionFwdTilesTest, HeadsShareNoTilesWhereRowsDifferInMore) {
  const Call call = few_rows(32, 16, 32, 8);
  AttentionForwardArgs args = args_of(call);
  args.alibi_slopes = tensor(call, DType::kFloat32, {32}, 7);
  EXPECT_EQ(params_of(launch_of(call, args)).head_shift, 0);
  args = args_of(call);
  args.q_segment_ids = tensor(call, DType::kInt32, {32, 16}, 7);
  args.kv_segment_ids = tensor(call, DType::kInt32, {32, 500}, 8);
  EXPECT_EQ(params_of(launch_of(call, args)).head_shift, 0);
  Call packed = few_rows(32, 16, 32, 8);
  packed.is_varlen = true;
  EXPECT_EQ(params_of(launch_of(packed)).head_shift, 0);
}

TEST_F(Sm90AttentionFwdTilesTest, MapsOfHeadsThatShareTiles) {
  const Call call = few_rows(32, 20, 24, 6);
  AttentionForwardArgs args = args_of(call);
  args.q.strides = {24 * 20 * 128, 128, 20 * 128, 1};  // heads before tokens
  const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call, args));
  ASSERT_EQ(params.head_shift, 2);
  const TensorMapContents q = contents_of(params.q_map), out = contents_of(params.out_map);
  EXPECT_EQ(sizes_of(q), (Sizes{128, 4, 20, 6, 32}));
  EXPECT_EQ(strides_of(q), (Sizes{20 * 256, 256, 4 * 20 * 256, 24 * 20 * 256}));
  EXPECT_EQ(box_of(q), (Sizes{64, 4, 16, 1, 1}));
  EXPECT_EQ(sizes_of(out), (Sizes{128, 4, 20, 6, 32}));
  EXPECT_EQ(strides_of(out), (Sizes{256, 24 * 256, 4 * 256, 20 * 24 * 256}));
  EXPECT_EQ(box_of(out), (Sizes{64, 4, 4, 1, 1}));
  EXPECT_EQ(sizes_of(contents_of(params.k_map)), (Sizes{128, 500, 6, 32}));
}

TEST_F(Sm90AttentionFwdTilesTest, PacksOfHeadsTooFarApart) {
  const Call call = few_rows(32, 16, 32, 8);
  AttentionForwardArgs args = args_of(call);
  args.q.strides[2] = int64_t{1} << 36;
  EXPECT_TRUE(is_by_sm90(launch_of(call, args)));
  args.q.strides[2] = int64_t{1} << 38;  // of four: 2^41 bytes
  EXPECT_FALSE(is_by_sm90(launch_of(call, args)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Tall tiles. What is faster, as it was measured (docs/kernel-notes.md): 16384 tokens and 32 heads of 64 in all.

Call call_of_length(int64_t length, bool is_causal, int64_t num_heads = 32) {
  Call call{.batch = 16384 / length,
            .q_len = length,
            .kv_len = length,
            .num_q_heads = num_heads,
            .num_kv_heads = num_heads,
            .head_dim = 64,
            .head_dim_v = 64};
  call.options.is_causal = is_causal;
  return call;
}

bool is_tall(const Call& call) {
  const FakeLaunch launch = launch_of(call, with_workspace(call, args_of(call)), kTallBlock);
  EXPECT_TRUE(launch.block == kTallBlock || is_by_sm90(launch));
  return launch.block == kTallBlock;
}

TEST_F(Sm90AttentionFwdTilesTest, TallTilesWhereSequencesAreLong) {
  for (const int64_t length : {128, 512, 1024, 2048, 4096, 8192, 16384}) {
    EXPECT_EQ(is_tall(call_of_length(length, false)), length >= 2048) << length;
    EXPECT_EQ(is_tall(call_of_length(length, true)), length >= 8192) << length;
  }
}

TEST_F(Sm90AttentionFwdTilesTest, TilesThatFillMultiprocessorsOnlyOnceAreNotTall) {
  EXPECT_TRUE(is_tall(call_of_length(4096, false, 16)));
  EXPECT_FALSE(is_tall(call_of_length(4096, false, 2)));  // 256 tiles, two waves; 176 would be two as well
}

// 400 plain tiles are a little more than three waves, and the rest is cut; 272 tall ones take three.
TEST_F(Sm90AttentionFwdTilesTest, TilesThatAreCutAreNotTall) {
  Call call = call_of_length(3200, false, 16);
  call.batch = 1;
  call.kv_len = 32768;
  EXPECT_FALSE(is_tall(call));
  EXPECT_GT(attention_forward_workspace_bytes(args_of(call), call.options), 1 << 20);
  // A tile a head, so that they are equal under a mask too.
  call = call_of_length(100, true, 160);
  call.batch = 1;
  for (const int64_t kv_len : {4096, 32768}) {
    call.kv_len = kv_len;
    EXPECT_FALSE(is_tall(call));
    EXPECT_GT(attention_forward_workspace_bytes(args_of(call), call.options), 1 << 20);
  }
}

// By their mean length, which is all that the host knows.
TEST_F(Sm90AttentionFwdTilesTest, TallTilesOfPackedSequences) {
  for (const bool is_causal : {false, true}) {
    for (const int64_t batch : {1, 2, 8, 16, 64}) {
      Call call = call_of_length(16384, is_causal);
      call.is_varlen = true;
      call.batch = batch;
      EXPECT_EQ(is_tall(call), batch <= (is_causal ? 2 : 8)) << batch << (is_causal ? " causal" : " full");
    }
  }
}

// Those of tests/sm90_cases.py, which are compared with the oracle.
TEST_F(Sm90AttentionFwdTilesTest, TallTilesOfShortSequences) {
  Call call = call_of_length(16384, false);
  call.batch = 2;
  call.q_len = 190;
  call.kv_len = 450;
  call.num_q_heads = 66;
  call.num_kv_heads = 33;
  EXPECT_TRUE(is_tall(call));
  call.options.is_causal = true;
  EXPECT_TRUE(is_tall(call));
  call.kv_len = 340;
  EXPECT_TRUE(is_tall(call));
  call.kv_len = 450;
  call.options.is_causal = false;
  call.options.causal_align = CausalAlign::kTopLeft;
  call.options.window_left = 150;
  call.options.window_right = 300;
  EXPECT_TRUE(is_tall(call));
  call = call_of_length(16384, false);
  call.is_varlen = true;
  call.batch = 3;
  call.q_len = call.kv_len = 1333 + 1790 + 1500;
  call.num_q_heads = 6;
  call.num_kv_heads = 3;
  EXPECT_TRUE(is_tall(call));
  call.options.window_left = call.options.window_right = 1300;
  EXPECT_TRUE(is_tall(call));
}

TEST_F(Sm90AttentionFwdTilesTest, NothingThatChangesScoresHasTallTiles) {
  Call call = call_of_length(16384, false);
  call.options.softcap = 30.0;
  EXPECT_FALSE(is_tall(call));
  call = call_of_length(16384, false);
  call.options.softmax_scale = -1.0;
  EXPECT_FALSE(is_tall(call));
  call = call_of_length(16384, false);
  call.head_dim = call.head_dim_v = 128;
  EXPECT_FALSE(is_tall(call));
}

TEST_F(Sm90AttentionFwdTilesTest, LaunchesOfTallTiles) {
  const Call call = call_of_length(8192, true);
  const FakeLaunch launch = launch_of(call, with_workspace(call, args_of(call)), kTallBlock);
  EXPECT_EQ(launch.grid[0], test::kFakeMultiprocessors);
  const cuda::Sm90AttentionFwdParams params = params_of(launch);
  EXPECT_EQ(params.num_tiles, 43);  // of 192 rows
  EXPECT_EQ(params.num_tiles_in_all, 2U * 32U * 43U);
  EXPECT_NE(params.next_tile, nullptr);
  EXPECT_EQ(contents_of(params.q_map).box[1], 64);
  EXPECT_EQ(contents_of(params.k_map).box[1], 128);
  EXPECT_EQ(contents_of(params.out_map).box[1], 16);
}

// ---------------------------------------------------------------------------------------------------------------------
// The order of tiles. Values as they were measured (docs/kernel-notes.md), 16384 tokens and 16 heads in all.

TEST_F(Sm90AttentionFwdTilesTest, OrderOfTilesUnderACausalMask) {
  const struct {
    int64_t length;
    int section_heads;
    unsigned tail_heads;
  } expected[] = {{512, 1, 64}, {1024, 4, 64}, {2048, 8, 32}, {4096, 16, 0}, {8192, 8, 0}, {16384, 4, 0}};
  for (const auto& [length, section_heads, tail_heads] : expected) {
    Call call{.batch = 16384 / length, .q_len = length, .kv_len = length, .num_q_heads = 16, .num_kv_heads = 16};
    call.options.is_causal = true;
    const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call));
    EXPECT_EQ(params.section_heads, section_heads) << length;
    EXPECT_EQ(params.num_tail_heads, tail_heads) << length;
    call.options.is_causal = false;
    const cuda::Sm90AttentionFwdParams full = params_of(launch_of(call));
    EXPECT_EQ(full.section_heads, 1) << length;
    EXPECT_EQ(full.num_tail_heads, 0U) << length;
  }
}

TEST_F(Sm90AttentionFwdTilesTest, TilesOfAllHeadsStandSideBySideInAWindow) {
  Call call{.batch = 2, .q_len = 4096, .kv_len = 4096, .num_q_heads = 32, .num_kv_heads = 8};
  call.options.is_causal = true;
  call.options.window_left = 1023;
  EXPECT_EQ(params_of(launch_of(call)).section_heads, 32);
  call.num_q_heads = call.num_kv_heads = 256;
  EXPECT_EQ(params_of(launch_of(call)).section_heads, 56);  // whose windows fit L2
  call.options.window_left = std::numeric_limits<int64_t>::max() / 2;
  EXPECT_GE(params_of(launch_of(call)).section_heads, 1);
}

}  // namespace
}  // namespace heed
