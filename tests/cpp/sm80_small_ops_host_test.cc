// How the host side of the GPU kernels of activations, rotary embeddings and norms chooses kernels and launches them,
// against a driver that is made up. Some kernels are compiled, which needs NVRTC; none runs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cuda/jit/nvrtc.h"
#include "cuda/sm80_act_and_mul.h"
#include "cuda/sm80_rope.h"
#include "device_tensor.h"
#include "fake_driver.h"
#include "heed/ops.h"
#include "ops/every_kernel.h"

namespace heed {
namespace {

using test::device_tensor;
using test::fake_driver;
using test::FakeDriver;

constexpr int64_t kInts = 1 << 20;

TensorView tensor(const TensorSpec& spec) {
  return spec.present ? device_tensor(find_dtype(spec.dtype)->dtype, spec.shape) : TensorView{};
}

cuda::Sm80RopeSpec kernel_of(const RopeRequest& request) {
  const RopeProblem problem = validate(request);
  RopeArgs args;
  args.q = tensor(request.operands[RopeProblem::kQ]), args.k = tensor(request.operands[RopeProblem::kK]);
  args.q_rope = args.q, args.k_rope = args.k;
  args.indptr = tensor(request.operands[RopeProblem::kIndptr]);
  args.offsets = tensor(request.operands[RopeProblem::kOffsets]);
  args.pos_ids = tensor(request.operands[RopeProblem::kPosIds]);
  args.cos_sin_cache = tensor(request.operands[RopeProblem::kCosSinCache]);
  return cuda::plan_sm80_rope(problem, args, cuda::sm80_rope_params(problem)).spec;
}

cuda::Sm80ActAndMulPlan plan_of(const ActAndMulRequest& request) {
  const ActAndMulProblem problem = validate(request);
  const TensorView x = tensor(request.operands[ActAndMulProblem::kX]);
  return cuda::plan_sm80_act_and_mul(problem, {.x = x, .out = device_tensor(problem.dtype, problem.out_shape())});
}

ActAndMulRequest act_request(std::string_view dtype, int64_t rows, int64_t hidden) {
  ActAndMulRequest request;
  request.operands[ActAndMulProblem::kX] = {std::string(dtype), {rows, 2 * hidden}, true};
  return request;
}

// Whatever its size, a call on aligned rows needs no kernel but those that a module of heed.jit loads.
TEST(EveryKernelTest, Rope) {
  std::vector<cuda::Sm80RopeSpec> loaded;
  for (const RopeRequest& request : rope_requests_of_every_kernel()) loaded.push_back(kernel_of(request));
  for (const RopeRequest& request : rope_requests_of_every_kernel()) {
    for (int64_t tokens = 1; tokens <= kInts; tokens *= 4) {
      for (const int64_t heads : {1, 5, 64}) {
        for (const int64_t head_dim : {64, 128, 256}) {
          RopeRequest other = request;
          other.operands[RopeProblem::kQ].shape = {tokens, heads, head_dim};
          other.operands[RopeProblem::kK].shape = {tokens, heads, head_dim};
          if (other.operands[RopeProblem::kPosIds].present) other.operands[RopeProblem::kPosIds].shape = {tokens};
          if (other.operands[RopeProblem::kCosSinCache].present) {
            other.operands[RopeProblem::kCosSinCache].shape = {9, head_dim};
          }
          const cuda::Sm80RopeSpec needed = kernel_of(other);
          ASSERT_TRUE(needed.is_aligned);
          EXPECT_EQ(std::count(loaded.begin(), loaded.end(), needed), 1)
              << to_text(other) << " needs " << needed.heads << " heads at once";
        }
      }
    }
  }
}

TEST(EveryKernelTest, ActAndMul) {
  std::vector<cuda::Sm80ActAndMulSpec> loaded;
  for (const ActAndMulRequest& request : requests_of_every_kernel(Activation::kSilu)) {
    loaded.push_back(plan_of(request).spec);
  }
  for (const DTypeInfo& dtype : kDTypes) {
    if (!dtype.is_float) continue;
    for (int64_t rows = 1; rows <= int64_t{1} << 26; rows *= 4) {
      for (const int64_t hidden : {1, 8, 100, 14336}) {
        const ActAndMulRequest request = act_request(dtype.name, rows, hidden);
        EXPECT_EQ(std::count(loaded.begin(), loaded.end(), plan_of(request).spec), 1) << to_text(request);
      }
    }
  }
}

// The kernel for aligned rows numbers chunks of 16 bytes in 31 bits: more of them take the other one.
TEST(Sm80ActAndMulPlanTest, MoreChunksThan31BitsCount) {
  constexpr int64_t kHidden = 8192, kMost = int64_t{1} << 31;
  const cuda::Sm80ActAndMulPlan small = plan_of(act_request("bfloat16", kMost / (kHidden / 8) - 1, kHidden));
  EXPECT_TRUE(small.spec.is_aligned);
  EXPECT_LT(small.params.num_chunks, static_cast<uint64_t>(kMost));
  const cuda::Sm80ActAndMulPlan large = plan_of(act_request("bfloat16", kMost / (kHidden / 8), kHidden));
  EXPECT_FALSE(large.spec.is_aligned);
  EXPECT_EQ(large.params.num_chunks, static_cast<uint64_t>(8 * kMost));
  EXPECT_EQ(large.params.chunks_per_row.divisor, static_cast<unsigned>(kHidden));
  ActAndMulRequest backward = act_request("bfloat16", kMost / (kHidden / 8), kHidden);
  backward.is_backward = true;
  backward.operands[ActAndMulProblem::kDout] = {"bfloat16", {kMost / (kHidden / 8), kHidden}, true};
  const TensorView x = tensor(backward.operands[ActAndMulProblem::kX]);
  const TensorView dout = tensor(backward.operands[ActAndMulProblem::kDout]);
  EXPECT_FALSE(cuda::plan_sm80_act_and_mul_bwd(validate(backward), {.x = x, .dout = dout, .dx = x}).spec.is_aligned);
}

class Launching : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::string name = (std::filesystem::temp_directory_path() / "heed-small-ops-test-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    setenv("HEED_CACHE_DIR", name.c_str(), 1);
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(getenv("HEED_CACHE_DIR")); }
  void SetUp() override {
    if (!cuda::find_nvrtc()) GTEST_SKIP() << "there is no NVRTC on this machine";
    fake_driver() = FakeDriver();
  }
};

// The sums of the weight's gradient are those of the kernel before, all of which has to be there.
TEST_F(Launching, TheWeightSumOfANormDoesNotOverlapWhatItSums) {
  RmsNormBackwardArgs args;
  args.x = args.dout = args.dx = device_tensor(DType::kBFloat16, {64, 256});
  args.weight = device_tensor(DType::kBFloat16, {256});
  args.dweight = device_tensor(DType::kFloat32, {256});
  args.workspace = device_tensor(DType::kFloat32, {rms_norm_backward_workspace_bytes(args) / 4});
  rms_norm_backward(args);
  ASSERT_EQ(fake_driver().launches.size(), 2U);
  EXPECT_TRUE(fake_driver().launches[0].overlaps_previous);
  EXPECT_FALSE(fake_driver().launches[1].overlaps_previous);
}

}  // namespace
}  // namespace heed
