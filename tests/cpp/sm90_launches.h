// Launches of Hopper's attention forward on a made-up driver. Kernels are compiled, which needs NVRTC, and never run.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "cuda/jit/nvrtc.h"
#include "cuda/sm90_attention_fwd_spec.h"
#include "device_emulation/tensor_map.h"
#include "fake_driver.h"
#include "heed/heed.h"
#include "sm90_calls.h"

namespace heed::test {

inline AttentionForwardArgs with_workspace(const Call& call, AttentionForwardArgs args) {
  const int64_t floats = attention_forward_workspace_bytes(args, call.options) / 4;
  if (floats > 0) args.workspace = tensor(call, DType::kFloat32, {floats}, 6, false);
  return args;
}

inline constexpr unsigned kBlock = 384, kTallBlock = 512;  // threads; no portable kernel has as many

inline FakeLaunch launch_of(const Call& call, const AttentionForwardArgs& args, unsigned block = kBlock) {
  attention_forward(args, call.options);  // loads
  fake_driver() = FakeDriver();
  fake_driver().num_copied_bytes = sizeof(cuda::Sm90AttentionFwdParams);
  fake_driver().copied_block = block;
  attention_forward(args, call.options);
  EXPECT_EQ(fake_driver().launches.size(), 1U);
  return fake_driver().launches.empty() ? FakeLaunch{} : fake_driver().launches[0];
}

inline FakeLaunch launch_of(const Call& call) { return launch_of(call, with_workspace(call, args_of(call))); }

inline cuda::Sm90AttentionFwdParams params_of(const FakeLaunch& launch) {
  cuda::Sm90AttentionFwdParams params{};
  if (launch.copy_of_params.size() == sizeof params) std::memcpy(&params, launch.copy_of_params.data(), sizeof params);
  return params;
}

inline bool is_by_sm90(const FakeLaunch& launch) { return launch.block == kBlock; }

inline device_emulation::TensorMapContents contents_of(const cuda::TensorMap& map) {
  device_emulation::TensorMapContents contents{};
  EXPECT_TRUE(device_emulation::decode_tensor_map(&map, contents));
  return contents;
}

using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const device_emulation::TensorMapContents& map) {
  Sizes sizes;
  for (int i = 0; i < map.rank; ++i) sizes.push_back(int64_t{map.last_index[i]} + 1);
  return sizes;
}
inline Sizes strides_of(const device_emulation::TensorMapContents& map) {
  return {map.strides + 1, map.strides + map.rank};
}
inline Sizes box_of(const device_emulation::TensorMapContents& map) { return {map.box, map.box + map.rank}; }

// With a cache of its own.
class Sm90LaunchTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::string name = (std::filesystem::temp_directory_path() / "heed-sm90-test-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    setenv("HEED_CACHE_DIR", name.c_str(), 1);
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(getenv("HEED_CACHE_DIR")); }
  void SetUp() override {
    if (!cuda::find_nvrtc()) GTEST_SKIP() << "there is no NVRTC on this machine";
  }
};

}  // namespace heed::test
