// The host side of Hopper's attention forward: what it asks of the driver, one that is made up: tensor maps, the
// counter of tiles, the launch, and the portable kernel where TMA cannot copy an operand. Kernels are compiled, which
// needs NVRTC, and never run.
#include <gtest/gtest.h>

#include <functional>
#include <iterator>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/jit/jit.h"
#include "cuda/sm90_attention_fwd_spec.h"
#include "device_emulation/tensor_map.h"
#include "fake_driver.h"
#include "heed/heed.h"
#include "sm90_launches.h"

namespace heed {
namespace {

using device_emulation::TensorMapContents;
using test::args_of;
using test::box_of;
using test::Call;
using test::contents_of;
using test::fake_driver;
using test::FakeDriver;
using test::FakeLaunch;
using test::forced;
using test::is_by_sm90;
using test::kAmpere;
using test::kHopper;
using test::kSecondHopper;
using test::launch_of;
using test::memory;
using test::params_of;
using test::Sizes;
using test::sizes_of;
using test::strides_of;
using test::tensor;
using test::with_workspace;

constexpr int64_t kQRows = 128, kKvRows = 128;  // of a tile at head dim 128

// ---------------------------------------------------------------------------------------------------------------------
// Launches.

using Sm90AttentionFwdHostTest = test::Sm90LaunchTest;

TEST_F(Sm90AttentionFwdHostTest, OneBlockPerMultiprocessorAndACounter) {
  const Call call;
  const AttentionForwardArgs args = with_workspace(call, args_of(call));
  const FakeLaunch launch = launch_of(call, args);
  EXPECT_EQ(launch.grid[0], test::kFakeMultiprocessors);
  EXPECT_EQ(launch.grid[1] * launch.grid[2], 1U);
  EXPECT_TRUE(is_by_sm90(launch));
  EXPECT_EQ(launch.cluster, 1U);
  EXPECT_TRUE(launch.overlaps_previous);
  EXPECT_EQ(launch.device, kHopper);
  EXPECT_EQ(launch.stream, args.stream);
  const cuda::Sm90AttentionFwdParams params = params_of(launch);
  EXPECT_EQ(params.next_tile, args.workspace.data);
  EXPECT_EQ(params.num_tiles, 1024 / kQRows);
  EXPECT_EQ(params.num_heads, 3U * 8U);
  EXPECT_EQ(params.num_tiles_in_all, 3U * 8U * 1024U / kQRows);
  EXPECT_EQ(params.out.data, args.out.data);
  EXPECT_EQ(params.lse.data, args.lse.data);
  EXPECT_EQ(params.lse.token, 1);
  EXPECT_EQ(params.lse.head, 1024);
}

// Each launch knows its counter from whatever another one left in memory.
TEST_F(Sm90AttentionFwdHostTest, EveryLaunchHasANonceOfItsOwn) {
  std::set<std::vector<unsigned>> nonces;
  for (int i = 0; i < 5; ++i) {
    const cuda::Sm90AttentionFwdParams params = params_of(launch_of({.device = i % 2}));
    nonces.insert({std::begin(params.nonce), std::end(params.nonce)});
  }
  EXPECT_EQ(nonces.size(), 5U);
}

// Nothing is loaded, allocated, cleared or waited for.
TEST_F(Sm90AttentionFwdHostTest, AsksTheDriverForMapsAndALaunch) {
  launch_of({});
  std::vector<std::string> calls = fake_driver().calls;
  std::erase_if(calls, [](const std::string& name) { return name.starts_with("cuCtx"); });
  EXPECT_EQ(calls, (std::vector<std::string>{"cuTensorMapEncodeTiled", "cuTensorMapEncodeTiled",
                                             "cuTensorMapEncodeTiled", "cuTensorMapEncodeTiled", "cuLaunchKernelEx"}));
}

TEST_F(Sm90AttentionFwdHostTest, FixedSharesWithoutAWorkspace) {
  const FakeLaunch launch = launch_of({}, args_of({}));
  EXPECT_TRUE(is_by_sm90(launch));
  EXPECT_EQ(launch.grid[0], test::kFakeMultiprocessors);
  EXPECT_EQ(params_of(launch).next_tile, nullptr);
}

TEST_F(Sm90AttentionFwdHostTest, NoCounterWhereEveryBlockHasOneTile) {
  const Call exactly{.batch = 2, .q_len = 8 * kQRows, .num_q_heads = 8};
  EXPECT_EQ(launch_of(exactly).grid[0], 128U);
  const Call fewer{.batch = 3, .q_len = 4 * kQRows - 5, .num_q_heads = 8};
  const FakeLaunch launch = launch_of(fewer);
  EXPECT_EQ(launch.grid[0], 3U * 8U * 4U);
  EXPECT_EQ(params_of(launch).next_tile, nullptr);
}

// Behind the counter and within the workspace; of head dim 128.
void expect_room_for_slots(const cuda::Sm90AttentionFwdParams& params, const AttentionForwardArgs& args,
                           int64_t num_bytes) {
  const unsigned tiles = params.num_heads * static_cast<unsigned>(params.num_tiles) - params.num_whole_tiles;
  const unsigned parts = params.num_tiles_in_all - params.num_whole_tiles;
  const auto* workspace = static_cast<const char*>(args.workspace.data);
  EXPECT_GE(params.slots - workspace, 16);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(params.slots) % 128, 0U);
  const int64_t slots = cuda::sm90_attention_fwd_slot_bytes({}) * static_cast<int64_t>(tiles + parts - 1);
  EXPECT_LE(params.slots - workspace + slots, num_bytes);
}

// The steps of the last tiles are cut into parts, which leave what they sum up in the workspace.
void expect_cut(const Call& call, unsigned num_tiles, unsigned num_steps, int heads_of_tile = 1) {
  SCOPED_TRACE(std::to_string(call.q_len) + " rows, " + std::to_string(call.kv_len) + " keys");
  const AttentionForwardArgs args = with_workspace(call, args_of(call));
  const FakeLaunch launch = launch_of(call, args);
  ASSERT_TRUE(is_by_sm90(launch));
  const cuda::Sm90AttentionFwdParams params = params_of(launch);
  EXPECT_EQ(1 << params.head_shift, heads_of_tile);
  EXPECT_EQ(params.num_heads * static_cast<unsigned>(params.num_tiles), num_tiles);
  ASSERT_LT(params.num_whole_tiles, num_tiles);
  const unsigned tiles = num_tiles - params.num_whole_tiles;
  const unsigned parts = params.num_tiles_in_all - params.num_whole_tiles;
  EXPECT_EQ(params.num_whole_tiles % test::kFakeMultiprocessors, 0U);
  EXPECT_LE(parts, test::kFakeMultiprocessors);
  EXPECT_LE(tiles, 2 * parts);
  EXPECT_LE(uint64_t{tiles} * num_steps * parts, uint64_t{0xffffffff});
  EXPECT_LT((parts - 1) / tiles + 1, static_cast<unsigned>(cuda::kSm90MaxPartsOfTile));
  EXPECT_EQ(launch.grid[0], params.num_whole_tiles == 0 ? parts : test::kFakeMultiprocessors);
  EXPECT_EQ(params.next_tile, params.num_whole_tiles == 0 ? nullptr : args.workspace.data);
  EXPECT_NE(params.nonce[0] | params.nonce[1] | params.nonce[2], 0U);
  expect_room_for_slots(params, args, attention_forward_workspace_bytes(args, call.options));
}

TEST_F(Sm90AttentionFwdHostTest, CutsTheLastTiles) {
  expect_cut({.batch = 1, .q_len = 100, .kv_len = 32768}, 8, 256);
  expect_cut({.batch = 1, .q_len = 1024, .kv_len = 16384, .num_q_heads = 4, .num_kv_heads = 4}, 32, 128);
  expect_cut({.batch = 1, .q_len = 4480, .kv_len = 4096, .num_q_heads = 4, .num_kv_heads = 4}, 140, 32);
  expect_cut({.batch = 1, .q_len = 2500, .kv_len = 8192, .num_q_heads = 10, .num_kv_heads = 10}, 200, 64);
}

TEST_F(Sm90AttentionFwdHostTest, CutsTilesOfSeveralHeads) {
  Call call{.batch = 1, .q_len = 16, .kv_len = 8192, .num_q_heads = 32, .num_kv_heads = 8};
  for (const bool is_causal : {false, true}) {
    call.options.is_causal = is_causal;
    expect_cut(call, 8, 64, 4);
  }
  call.options.window_left = 4000;
  expect_cut(call, 8, 32, 4);
}

// Where all tiles touch the same keys: a head has one, or nothing is hidden.
TEST_F(Sm90AttentionFwdHostTest, CutsMaskedTiles) {
  Call call{.batch = 1, .q_len = 100, .kv_len = 32768};
  call.options.is_causal = true;
  expect_cut(call, 8, 256);
  call.q_len = 129;
  EXPECT_EQ(params_of(launch_of(call)).slots, nullptr);
  call.q_len = 100;
  call.options.causal_align = CausalAlign::kTopLeft;  // one step
  EXPECT_EQ(params_of(launch_of(call)).slots, nullptr);
  call.options.is_causal = false;
  call.q_len = 200;
  call.options.window_left = 199;
  call.options.window_right = 32767;
  expect_cut(call, 16, 256);
  call.options.window_right = 32766;
  EXPECT_EQ(params_of(launch_of(call)).slots, nullptr);
}

// The last row sees all keys.
TEST_F(Sm90AttentionFwdHostTest, OneRowUnderACausalMask) {
  Call call{.batch = 1, .q_len = 1, .kv_len = 8192, .num_q_heads = 32, .num_kv_heads = 8};
  call.options.is_causal = true;
  expect_cut(call, 8, 64, 4);
  call.options.causal_align = CausalAlign::kTopLeft;  // it sees one
  EXPECT_EQ(params_of(launch_of(call)).slots, nullptr);
}

TEST_F(Sm90AttentionFwdHostTest, SizesOfWorkspaces) {
  constexpr int64_t kMostBytes = 28'000'000;
  int64_t num_cut = 0;
  for (const int64_t batch : {1, 2, 3, 5, 7, 16, 33}) {
    for (const int64_t q_len : {1, 4, 16, 64, 100, 128, 700}) {
      for (const int64_t kv_len : {500, 8192, 32768}) {
        for (const auto& [num_q_heads, num_kv_heads] : {std::pair{8, 8}, {32, 8}, {64, 8}, {30, 2}, {133, 133}}) {
          Call call{.batch = batch,
                    .q_len = q_len,
                    .kv_len = kv_len,
                    .num_q_heads = num_q_heads,
                    .num_kv_heads = num_kv_heads};
          for (const bool is_causal : {false, true}) {
            call.options.is_causal = is_causal;
            const int64_t num_bytes = attention_forward_workspace_bytes(args_of(call), call.options);
            EXPECT_LE(num_bytes, kMostBytes);
            const AttentionForwardArgs args = with_workspace(call, args_of(call));
            const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call, args));
            if (params.slots == nullptr) continue;
            expect_room_for_slots(params, args, num_bytes);
            ++num_cut;
          }
        }
      }
    }
  }
  EXPECT_GT(num_cut, 100);
}

TEST_F(Sm90AttentionFwdHostTest, CutsNothingWithoutAWorkspace) {
  const Call call{.batch = 1, .q_len = 100, .kv_len = 32768};
  const FakeLaunch launch = launch_of(call, args_of(call));
  EXPECT_EQ(launch.grid[0], 8U);
  EXPECT_EQ(params_of(launch).num_whole_tiles, 8U);
  EXPECT_EQ(params_of(launch).num_tiles_in_all, 8U);
  EXPECT_EQ(params_of(launch).slots, nullptr);
}

TEST_F(Sm90AttentionFwdHostTest, EveryDeviceLaunchesForItself) {
  for (const int device : {kSecondHopper, kHopper}) {
    const FakeLaunch launch = launch_of({.device = device});
    EXPECT_TRUE(is_by_sm90(launch));
    EXPECT_EQ(launch.device, device);
  }
  EXPECT_FALSE(is_by_sm90(launch_of({.device = kAmpere})));
  EXPECT_TRUE(test::fake_contexts().empty());
}

TEST_F(Sm90AttentionFwdHostTest, RefusesAWorkspaceThatIsTooSmallOrAstray) {
  const Call call;
  AttentionForwardArgs args = with_workspace(call, args_of(call));
  const auto refused = [&] {
    fake_driver() = FakeDriver();
    EXPECT_THROW(attention_forward(args), ValueError);
    EXPECT_TRUE(fake_driver().launches.empty());
  };
  args.workspace.shape[0] -= 1;
  refused();
  args.workspace.shape[0] += 1;
  args.workspace.data = memory() + 4;
  refused();
  args.workspace.data = memory();
  args.workspace.device.index = kSecondHopper;
  refused();
}

TEST_F(Sm90AttentionFwdHostTest, NothingToDo) {
  for (const Call& call :
       {Call{.batch = 0}, Call{.q_len = 0}, Call{.lead = {0}}, Call{.is_varlen = true, .q_len = 0}}) {
    fake_driver() = FakeDriver();
    attention_forward(with_workspace(call, args_of(call)));
    EXPECT_TRUE(fake_driver().launches.empty());
  }
}

// The kernel runs all the same: out is 0.
TEST_F(Sm90AttentionFwdHostTest, NoKeys) {
  for (const bool is_varlen : {false, true}) {
    const Call call{.is_varlen = is_varlen, .kv_len = 0};
    AttentionForwardArgs args = with_workspace(call, args_of(call));
    if (is_varlen) args.cu_seqlens_k = args.cu_seqlens_q;
    args.k.data = args.v.data = nullptr;
    EXPECT_TRUE(is_by_sm90(launch_of(call, args)));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor maps.

TEST_F(Sm90AttentionFwdHostTest, MapsOfPackedOperands) {
  const Call call{.batch = 3, .q_len = 700, .kv_len = 900, .num_q_heads = 8, .num_kv_heads = 2};
  const AttentionForwardArgs args = args_of(call);
  const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call, args));
  const struct {
    const cuda::TensorMap& map;
    const TensorView& view;
    int64_t rows, heads, box_rows;
  } expected[] = {{params.q_map, args.q, 700, 8, 64},
                  {params.k_map, args.k, 900, 2, kKvRows},
                  {params.v_map, args.v, 900, 2, kKvRows},
                  {params.out_map, args.out, 700, 8, 16}};
  for (const auto& [map, view, rows, heads, box_rows] : expected) {
    const TensorMapContents contents = contents_of(map);
    EXPECT_EQ(contents.address, reinterpret_cast<uintptr_t>(view.data));
    EXPECT_EQ(sizes_of(contents), (Sizes{128, rows, heads, 3}));
    EXPECT_EQ(strides_of(contents), (Sizes{heads * 256, 256, rows * heads * 256}));
    EXPECT_EQ(box_of(contents), (Sizes{64, box_rows, 1, 1}));
    EXPECT_EQ(contents.swizzle, device_emulation::kTensorMapSwizzle128);
  }
}

// Heads before tokens, a slice of a larger projection, leading axes that count as a batch.
TEST_F(Sm90AttentionFwdHostTest, MapsOfStridedOperands) {
  const Call call{.lead = {5, 2}, .batch = 3, .q_len = 300, .kv_len = 200};
  AttentionForwardArgs args = args_of(call);
  args.q.strides = {2 * 3 * 8 * 300 * 128, 3 * 8 * 300 * 128, 8 * 300 * 128, 128, 300 * 128, 1};
  args.k.strides = {2 * 3 * 200 * 4096, 3 * 200 * 4096, 200 * 4096, 4096, 136, 1};
  const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call, args));
  const TensorMapContents q = contents_of(params.q_map), k = contents_of(params.k_map);
  EXPECT_EQ(sizes_of(q), (Sizes{128, 300, 8, 30}));
  EXPECT_EQ(strides_of(q), (Sizes{256, 300 * 256, 8 * 300 * 256}));
  EXPECT_EQ(sizes_of(k), (Sizes{128, 200, 8, 30}));
  EXPECT_EQ(strides_of(k), (Sizes{8192, 272, 200 * 8192}));
}

// What the stride of an axis of size 1 is does not matter, for it is not used.
TEST_F(Sm90AttentionFwdHostTest, MapsOfAxesOfSizeOne) {
  const Call call{.lead = {1}, .batch = 1, .q_len = 1, .kv_len = 1, .num_q_heads = 1, .num_kv_heads = 1};
  AttentionForwardArgs args = args_of(call);
  args.q.strides = {-7, 0, 3, int64_t{1} << 62, 1};
  const FakeLaunch launch = launch_of(call, args);
  EXPECT_TRUE(is_by_sm90(launch));
  const TensorMapContents q = contents_of(params_of(launch).q_map);
  EXPECT_EQ(sizes_of(q), (Sizes{128, 1, 1, 1}));
  EXPECT_EQ(strides_of(q), (Sizes{256, 256, 256}));
}

// Rows of a box are those of the sequence: the map's coordinates wrap around to them, and end with it.
TEST_F(Sm90AttentionFwdHostTest, MapsOfPackedSequencesEndWithEachOfThem) {
  const Call call{.is_varlen = true, .batch = 4, .q_len = 1500, .kv_len = 1500, .num_q_heads = 6, .num_kv_heads = 3};
  AttentionForwardArgs args = args_of(call);
  args.k.strides = {1024, 160, 1};
  const cuda::Sm90AttentionFwdParams params = params_of(launch_of(call, args));
  EXPECT_EQ(params.num_tiles, 1500 / kQRows + 4 + 2);
  EXPECT_EQ(params.num_tiles_in_all, 6U * static_cast<unsigned>(params.num_tiles));
  const struct {
    const cuda::TensorMap& map;
    const TensorView& view;
  } operands[] = {{params.q_map, args.q}, {params.k_map, args.k}, {params.out_map, args.out}};
  for (const auto& [map, view] : operands) {
    const TensorMapContents contents = contents_of(map);
    for (const auto& [start, length] : {std::pair{0, 1500}, {0, 1}, {700, 33}, {1499, 1}, {3, 64}}) {
      for (const int head : {0, 2}) {
        for (const int first_row : {0, 16, length - 1, length, length + 5}) {
          const int coordinates[] = {64, cuda::kRaggedRows - length + first_row, head, start + length,
                                     cuda::kRaggedRows};
          int num_rows = 0;
          device_emulation::for_box_rows(contents, coordinates, [&](int row, int begin, int bytes, const char* at) {
            ++num_rows;
            const int64_t token = first_row + row;
            if (token >= length) {
              EXPECT_EQ(bytes, 0) << token << " of " << length;
              return;
            }
            EXPECT_EQ(begin, 0);
            EXPECT_EQ(bytes, 128);
            EXPECT_EQ(at, static_cast<char*>(view.data) +
                              2 * ((start + token) * view.strides[0] + head * view.strides[1] + 64));
          });
          EXPECT_EQ(num_rows, contents.box[1]);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Operands that TMA cannot copy.

struct Misplaced {
  const char* name;
  std::function<void(AttentionForwardArgs&)> change;
  std::string got;
};

const Misplaced kMisplaced[] = {
    {"q", [](auto& args) { args.q.data = memory() + 2; }, "q: got rows that do not start at multiples of 16 bytes"},
    {"k", [](auto& args) { args.k.strides[1] += 4; }, "k: got rows that do not start at multiples of 16 bytes"},
    {"v", [](auto& args) { args.v.strides[2] += 1; }, "v: got rows that do not start at multiples of 16 bytes"},
    {"out", [](auto& args) { args.out.data = memory() + 200; }, "out: got rows that do not start at"},
    {"q", [](auto& args) { args.q.strides[3] = 1024 * 8 * 2; }, "q: got elements of a row that are not adjacent"},
    {"k", [](auto& args) { args.k.strides[1] *= -1; }, "k: got strides that are negative or of 2^40 bytes and more"},
    {"v", [](auto& args) { args.v.strides[1] = int64_t{1} << 40; }, "v: got strides that are negative or of 2^40"},
};

TEST_F(Sm90AttentionFwdHostTest, OperandsThatTmaCannotCopyGoToThePortableKernel) {
  for (const auto& [name, change, got] : kMisplaced) {
    Call call;
    AttentionForwardArgs args = with_workspace(call, args_of(call));
    change(args);
    const FakeLaunch launch = launch_of(call, args);
    EXPECT_FALSE(is_by_sm90(launch)) << got;
    EXPECT_EQ(launch.grid[0], 3U * 8U * 8U) << got;
    EXPECT_EQ(launch.stream, args.stream);
  }
}

TEST_F(Sm90AttentionFwdHostTest, OperandsThatTmaCannotCopyAreRefusedIfItWasAskedFor) {
  for (const auto& [name, change, got] : kMisplaced) {
    const Call call{.options = forced(Backend::kSm90)};
    AttentionForwardArgs args = with_workspace(call, args_of(call));
    change(args);
    fake_driver() = FakeDriver();
    try {
      attention_forward(args, call.options);
      ADD_FAILURE() << "expected a ValueError: " << got;
    } catch (const ValueError& error) {
      EXPECT_TRUE(std::string(error.what()).starts_with(got)) << error.what();
      EXPECT_NE(std::string(error.what()).find(", expected "), std::string::npos) << error.what();
    }
    EXPECT_TRUE(fake_driver().launches.empty());
  }
}

TEST_F(Sm90AttentionFwdHostTest, LeadingAxesThatDoNotMergeWithTheBatch) {
  const Call call{.lead = {3}};
  AttentionForwardArgs args = args_of(call);
  args.k.strides[0] *= 2;
  EXPECT_FALSE(is_by_sm90(launch_of(call, args)));
  AttentionForwardArgs one_batch_row = args_of({.lead = {3}, .batch = 1});
  one_batch_row.k.strides[0] *= 2;
  EXPECT_TRUE(is_by_sm90(launch_of({.lead = {3}, .batch = 1}, one_batch_row)));
}

// As expanded views have them: heads that share a head, problems that share their keys.
TEST_F(Sm90AttentionFwdHostTest, StridesOfZero) {
  for (const bool is_varlen : {false, true}) {
    const Call call{.is_varlen = is_varlen};
    AttentionForwardArgs args = args_of(call);
    args.k.strides[args.k.rank - 2] = 0;
    const FakeLaunch launch = launch_of(call, args);
    EXPECT_TRUE(is_by_sm90(launch));
    EXPECT_EQ(strides_of(contents_of(params_of(launch).k_map))[1], 0);
  }
  const Call mapped{.lead = {3}, .batch = 1};
  AttentionForwardArgs args = args_of(mapped);
  for (TensorView* view : {&args.k, &args.v}) view->shape[0] = 1;
  const FakeLaunch launch = launch_of(mapped, args);
  EXPECT_TRUE(is_by_sm90(launch));
  const TensorMapContents k = contents_of(params_of(launch).k_map);
  EXPECT_EQ(sizes_of(k), (Sizes{128, 1024, 8, 3}));
  EXPECT_EQ(strides_of(k)[2], 0);
}

TEST_F(Sm90AttentionFwdHostTest, PackedRowsFarApart) {
  const Call call{.is_varlen = true};
  AttentionForwardArgs args = args_of(call);
  args.q.strides[0] = int64_t{1} << 33;
  EXPECT_FALSE(is_by_sm90(launch_of(call, args)));
  args.q.strides[0] -= 8;
  EXPECT_TRUE(is_by_sm90(launch_of(call, args)));
}

TEST_F(Sm90AttentionFwdHostTest, WhatCudaRefusesIsAnError) {
  const Call call;
  const AttentionForwardArgs args = with_workspace(call, args_of(call));
  launch_of(call, args);
  for (const char* name : {"cuTensorMapEncodeTiled", "cuLaunchKernelEx"}) {
    fake_driver() = FakeDriver();
    fake_driver().failing_call = name;
    try {
      attention_forward(args);
      ADD_FAILURE() << "expected an error of " << name;
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(error.what(), std::string(name) + " failed: invalid argument (CUDA_ERROR_INVALID_VALUE)");
    }
    EXPECT_TRUE(fake_driver().launches.empty());
  }
  EXPECT_TRUE(test::fake_contexts().empty());
}

}  // namespace
}  // namespace heed
