// How the host side of attention of one query divides the keys and what it launches, against a driver that is made up.
// Kernels are compiled, which needs NVRTC, and never run.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "cuda/jit/jit.h"
#include "cuda/jit/nvrtc.h"
#include "device_tensor.h"
#include "fake_driver.h"
#include "heed/ops.h"
#include "ops/attention_decode.h"
#include "ops/every_kernel.h"

namespace heed {
namespace {

using test::fake_driver;
using test::FakeDriver;
using test::FakeLaunch;

// 32 query heads over 8 KV heads, head dim 128, unless said.
struct Call {
  int device = 0;
  std::vector<int64_t> lead{};
  int64_t kv_len = 2048, num_q_heads = 32, num_kv_heads = 8, head_dim = 128;
  SingleDecodeOptions options{};
};

TensorView tensor(const Call& call, DType dtype, std::vector<int64_t> shape) {
  shape.insert(shape.begin(), call.lead.begin(), call.lead.end());
  return test::device_tensor(dtype, shape, call.device);
}

SingleDecodeArgs args_of(const Call& call) {
  constexpr DType kType = DType::kBFloat16;
  SingleDecodeArgs args;
  args.q = tensor(call, kType, {call.num_q_heads, call.head_dim});
  args.k = args.v = tensor(call, kType, {call.kv_len, call.num_kv_heads, call.head_dim});
  args.out = tensor(call, kType, {call.num_q_heads, call.head_dim});
  args.lse = tensor(call, DType::kFloat32, {call.num_q_heads});
  return args;
}

int64_t workspace_floats(const Call& call) { return single_decode_workspace_bytes(args_of(call), call.options) / 4; }

std::vector<FakeLaunch> launches_of(const Call& call) {
  SingleDecodeArgs args = args_of(call);
  args.workspace = tensor({.device = call.device}, DType::kFloat32, {workspace_floats(call)});
  fake_driver() = FakeDriver();
  single_decode(args, call.options);
  return fake_driver().launches;
}

class Sm80AttentionDecodeHostTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::string name = (std::filesystem::temp_directory_path() / "heed-decode-test-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    setenv("HEED_CACHE_DIR", name.c_str(), 1);
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(getenv("HEED_CACHE_DIR")); }
  void SetUp() override {
    if (!cuda::find_nvrtc()) GTEST_SKIP() << "there is no NVRTC on this machine";
  }
};

constexpr int kHopper = 0, kAmpere = 2;  // of the made-up devices

TEST_F(Sm80AttentionDecodeHostTest, OneLaunchOfClustersOnHopper) {
  const std::vector<FakeLaunch> launches = launches_of({.device = kHopper});
  ASSERT_EQ(launches.size(), 1U);
  EXPECT_EQ(launches[0].grid[0], 8U * 8U);
  EXPECT_EQ(launches[0].cluster, 8U);
  EXPECT_FALSE(launches[0].overlaps_previous);
}

TEST_F(Sm80AttentionDecodeHostTest, PiecesAndASecondLaunchBefore) {
  const std::vector<FakeLaunch> launches = launches_of({.device = kAmpere});
  ASSERT_EQ(launches.size(), 2U);
  EXPECT_EQ(launches[0].grid[0], 8U * 8U);
  EXPECT_EQ(launches[0].cluster, 1U);
  EXPECT_EQ(launches[1].grid[0], 32U);  // a query head each
  EXPECT_FALSE(launches[1].overlaps_previous);
}

// One KV head and many keys: more blocks than the largest cluster has, so that pieces are merged on Hopper as well.
TEST_F(Sm80AttentionDecodeHostTest, PiecesOfClusters) {
  const std::vector<FakeLaunch> launches =
      launches_of({.device = kHopper, .kv_len = 1 << 20, .num_q_heads = 4, .num_kv_heads = 1});
  ASSERT_EQ(launches.size(), 2U);
  EXPECT_EQ(launches[0].grid[0], 64U);
  EXPECT_EQ(launches[0].cluster, 8U);
  EXPECT_EQ(launches[1].grid[0], 4U);
  EXPECT_TRUE(launches[1].overlaps_previous);
}

TEST_F(Sm80AttentionDecodeHostTest, FewKeysAndManyHeadsNeedNoDivision) {
  std::vector<FakeLaunch> launches = launches_of({.device = kHopper, .kv_len = 100});
  ASSERT_EQ(launches.size(), 1U);
  EXPECT_EQ(launches[0].grid[0], 8U);
  EXPECT_EQ(launches[0].cluster, 1U);
  EXPECT_EQ(workspace_floats({.kv_len = 100}), 0);

  launches = launches_of({.device = kHopper, .lead = {5, 7}});
  ASSERT_EQ(launches.size(), 1U);
  EXPECT_EQ(launches[0].grid[0], 5U * 7U * 8U);
  EXPECT_EQ(launches[0].cluster, 1U);

  EXPECT_EQ(launches_of({.device = kHopper, .options = {.window_left = 30}})[0].grid[0], 8U);
  EXPECT_EQ(launches_of({.device = kHopper, .kv_len = 0})[0].grid[0], 8U);
  EXPECT_TRUE(launches_of({.device = kHopper, .lead = {0}}).empty());
}

// The keys of one problem are divided alike, whatever is beside it.
TEST_F(Sm80AttentionDecodeHostTest, BatchInvariance) {
  const Call alone{.device = kHopper, .options = {.batch_invariant = true}};
  const Call together{.device = kHopper, .lead = {300}, .options = {.batch_invariant = true}};
  EXPECT_EQ(launches_of(together)[0].cluster, launches_of(alone)[0].cluster);
  EXPECT_EQ(launches_of(together)[0].grid[0], 300 * launches_of(alone)[0].grid[0]);
  EXPECT_EQ(workspace_floats(together), 300 * workspace_floats(alone));
}

// Room for the largest number of pieces, wherever the call runs: 8 outputs of 128 columns, maxima and sums.
TEST_F(Sm80AttentionDecodeHostTest, Workspace) {
  EXPECT_EQ(workspace_floats({.device = kHopper}), 32 * 8 * (128 + 2));
  EXPECT_EQ(workspace_floats({.device = kAmpere}), 32 * 8 * (128 + 2));
}

TEST_F(Sm80AttentionDecodeHostTest, LargeGroupsTakeSeveralBlocks) {
  const std::vector<FakeLaunch> launches =
      launches_of({.device = kHopper, .kv_len = 64, .num_q_heads = 40, .num_kv_heads = 1});
  ASSERT_EQ(launches.size(), 1U);
  EXPECT_EQ(launches[0].grid[0], 3U);
}

// What a module of heed.jit loads is all that calls on aligned rows need.
TEST_F(Sm80AttentionDecodeHostTest, EveryKernelIsLoadedBefore) {
  constexpr int64_t kHeadDim = 32;  // of no other test: its kernels are not there yet
  for (const int device : {kHopper, kAmpere}) {
    for (const AttentionDecodeRequest& request :
         decode_requests_of_every_kernel(DType::kBFloat16, kHeadDim, kHeadDim, false)) {
      const Target target = parse_target(device == kHopper ? "sm_90a" : "sm_80");
      AttentionDecodeOp::load(*AttentionDecodeOp::prepare(to_text(request), target), device);
    }
    for (const int64_t kv_len : {0, 1, 700, 40000, 1 << 20}) {
      for (const int64_t group : {1, 3, 8, 9, 16, 40}) {
        for (const int64_t kv_heads : {1, 8}) {
          launches_of({.device = device,
                       .kv_len = kv_len,
                       .num_q_heads = group * kv_heads,
                       .num_kv_heads = kv_heads,
                       .head_dim = kHeadDim});
          EXPECT_EQ(fake_driver().num_libraries, 0) << kv_len << " keys, group " << group;
        }
      }
    }
  }
}

}  // namespace
}  // namespace heed
