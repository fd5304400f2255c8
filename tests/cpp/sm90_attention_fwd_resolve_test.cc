// Which problems go to Hopper's attention forward, and the reasons of those that do not. It needs no driver.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "cuda/ahead_of_time.h"
#include "heed/heed.h"
#include "ops/attention_fwd.h"
#include "ops/views.h"
#include "sm90_calls.h"

namespace heed {
namespace {

using test::args_of;
using test::Call;
using test::forced;

AttentionFwdResolution resolution_of(const Call& call, const std::string& target = "sm_90a",
                                     const std::function<void(AttentionRequest&)>& change = nullptr) {
  AttentionForwardArgs views = args_of(call);
  AttentionRequest request;
  request.options = call.options;
  request.wants_lse = call.has_lse;
  const AttentionInputs inputs = inputs_of(views);
  for (int i = 0; i < kNumAttentionInputs; ++i) {
    request.operands[i] = spec_of(kAttentionOperandNames[i], *inputs[static_cast<size_t>(i)]);
  }
  if (change) change(request);
  return resolve(validate(request), parse_target(target));
}

std::string reason_of(const AttentionFwdResolution& resolution) { return resolution.candidates[0].reason; }

TEST(Sm90AttentionFwdResolve, ComesFirstOnHopper) {
  for (const char* target : {"sm_90a", "cuda"}) {
    const AttentionFwdResolution resolution = resolution_of({}, target);
    ASSERT_NE(resolution.chosen, nullptr);
    EXPECT_EQ(resolution.chosen->name, "sm90_attention_fwd");
    EXPECT_EQ(resolution.candidates[1].reason, "serves the problem too, but sm90_attention_fwd comes first");
  }
  EXPECT_EQ(resolution_of({.dtype = DType::kFloat16}).chosen->name, "sm90_attention_fwd");
  EXPECT_EQ(resolution_of({.is_varlen = true}).chosen->name, "sm90_attention_fwd");
  EXPECT_EQ(resolution_of({.options = forced(Backend::kSm90)}).chosen->name, "sm90_attention_fwd");
  EXPECT_EQ(resolution_of({.options = forced(Backend::kSm80)}).chosen->name, "sm80_attention_fwd");
}

TEST(Sm90AttentionFwdResolve, DeclinesOtherTargets) {
  for (const char* target : {"cpu", "sm_75", "sm_80", "sm_89", "sm_100"}) {
    EXPECT_EQ(reason_of(resolution_of({}, target)),
              "needs an NVIDIA Hopper GPU (sm_90a), and the target is " + std::string(target));
  }
}

TEST(Sm90AttentionFwdResolve, DeclinesWhatItCannotDo) {
  const auto expect = [](const Call& call, const std::string& reason) {
    const AttentionFwdResolution resolution = resolution_of(call);
    EXPECT_EQ(reason_of(resolution), reason);
    ASSERT_NE(resolution.chosen, nullptr);
    EXPECT_EQ(resolution.chosen->name, "sm80_attention_fwd");
  };
  expect({.dtype = DType::kFloat32}, "multiplies bfloat16 and float16, and this call has float32");
  const std::string odd = reason_of(resolution_of({.head_dim = 72, .head_dim_v = 72}));
  EXPECT_NE(odd.find("has tiles for the head dims "), std::string::npos) << odd;
  EXPECT_NE(odd.find(", and this call has 72"), std::string::npos) << odd;
  const std::string pair = reason_of(resolution_of({.head_dim_v = 64}));
  EXPECT_NE(pair.find(", and this call has 128 with 64 for v"), std::string::npos) << pair;
  expect({.lead = {3}, .is_varlen = true},
         "serves one packed batch at a time, and this call has 3 on its leading axes");
  EXPECT_EQ(resolution_of({.lead = {1}, .is_varlen = true}).chosen->name, "sm90_attention_fwd");
}

TEST(Sm90AttentionFwdResolve, DeclinesOperandsThatArePartlyShared) {
  const auto resolution = [](const Call& call, int index) {
    return resolution_of(call, "sm_90a", [&](AttentionRequest& request) { request.operands[index].shape[0] = 1; });
  };
  EXPECT_EQ(reason_of(resolution_of({.lead = {4}})), "");
  for (const int index : {kQ, kK, kV}) {
    const std::string reason =
        "needs each of q, k and v to be either whole or shared along all leading axes and the "
        "batch, and " +
        std::string(kAttentionOperandNames[index]) + " is shared along some of them";
    EXPECT_EQ(reason_of(resolution({.lead = {4}}, index)), reason);
    EXPECT_EQ(reason_of(resolution({.lead = {4, 2}, .batch = 1}, index)), reason);
    EXPECT_EQ(resolution({.lead = {4}}, index).chosen->name, "sm80_attention_fwd");
    EXPECT_EQ(reason_of(resolution({.lead = {4}, .batch = 1}, index)), "");
    EXPECT_EQ(reason_of(resolution({.lead = {4, 1}, .batch = 1}, index)), "");
    EXPECT_EQ(reason_of(resolution({.lead = {1}}, index)), "");
  }
}

TEST(Sm90AttentionFwdResolve, DeclinesMoreTilesThanItCounts) {
  EXPECT_EQ(reason_of(resolution_of({.batch = 1 << 20, .q_len = 1, .num_q_heads = 2047, .num_kv_heads = 2047})), "");
  EXPECT_EQ(reason_of(resolution_of({.batch = 1 << 20, .q_len = 1, .num_q_heads = 2048, .num_kv_heads = 2048})),
            "counts up to 2^31 - 1 tiles of query rows, and this call has more");
}

TEST(Sm90AttentionFwdResolve, AWorkspaceForMoreTilesThanAFew) {
  EXPECT_EQ(resolution_of({}).workspace_bytes, 16 * 3 * 8);
  EXPECT_EQ(resolution_of({.lead = {5}}).workspace_bytes, 5 * 16 * 3 * 8);
  EXPECT_EQ(resolution_of({.is_varlen = true}).workspace_bytes, 16 * 8);
  EXPECT_EQ(resolution_of({.q_len = 256}).workspace_bytes, 0);
  EXPECT_EQ(resolution_of({}, "sm_80").workspace_bytes, 0);
  EXPECT_EQ(resolution_of({.options = forced(Backend::kSm80)}).workspace_bytes, 0);
  EXPECT_EQ(resolution_of({.head_dim = 72, .head_dim_v = 72}).workspace_bytes, 0);
}

// Where the last tiles are cut: 8 of 256 steps in 132 parts, each with a slot at least for each tile that it is of.
TEST(Sm90AttentionFwdResolve, AWorkspaceForPartsOfTiles) {
  const test::Call call{.batch = 1, .q_len = 100, .kv_len = 32768};
  constexpr int64_t kSlotBytes = 128 * 128 * 4 + 256 * 16 + 128;
  const int64_t bytes = resolution_of(call).workspace_bytes;
  EXPECT_GE(bytes, 128 + (132 + 8 - 1) * kSlotBytes);
  EXPECT_LT(bytes, 128 + (132 + 8) * kSlotBytes);
  test::Call causal = call;
  causal.options.is_causal = true;
  EXPECT_EQ(resolution_of(causal).workspace_bytes, bytes);
  causal.q_len = 129;  // two tiles, which see different keys
  EXPECT_EQ(resolution_of(causal).workspace_bytes, 0);
  test::Call packed = call;
  packed.is_varlen = true;
  EXPECT_EQ(resolution_of(packed).workspace_bytes, 0);
  test::Call large = call;
  large.head_dim = large.head_dim_v = 256;
  EXPECT_EQ(resolution_of(large).workspace_bytes, 0);
}

TEST(Sm90AttentionFwdResolve, IsListedAheadOfTimeForHopperAlone) {
  const auto count = [](const char* arch, const std::string& family) {
    const std::vector<cuda::KernelSpec> list = cuda::ahead_of_time_list(arch);
    return std::count_if(list.begin(), list.end(), [&](const auto& spec) { return spec.family == family; });
  };
  EXPECT_GE(count("sm_90a", "sm90_attention_fwd"), 8);
  EXPECT_GE(count("sm_90a", "sm80_attention_fwd"), 8);  // what it declines
  for (const char* arch : {"sm_80", "sm_89", "sm_90", "sm_100"}) EXPECT_EQ(count(arch, "sm90_attention_fwd"), 0);
}

}  // namespace
}  // namespace heed
