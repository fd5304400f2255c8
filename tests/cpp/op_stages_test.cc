// What the stages of all ops share: how a candidate is chosen and its workspace counted, which views are refused, and
// the tables of prepared problems.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "core/registry.h"
#include "core/target.h"
#include "ops/stages.h"
#include "ops/views.h"

namespace heed {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Choosing.

struct Problem {
  Backend backend = Backend::kAuto;
  int64_t heads = 6;
  int64_t floats = 10;

  int64_t num_heads_in_all() const { return heads; }
  Backend asked_backend() const { return backend; }
};
struct Args {};
using TestKernel = Kernel<Problem, Args>;

std::string accepts(const Problem& /*problem*/, const Target& /*target*/) { return ""; }
std::string refuses(const Problem& /*problem*/, const Target& target) { return "not on " + target.name; }
int64_t floats_of(const Problem& problem) { return problem.floats; }
void run(const Problem& /*problem*/, const Args& /*args*/, void* /*prepared*/) {}

constexpr TestKernel kKernels[] = {
    {"first", Backend::kSm90, "sm90", refuses, nullptr},
    {"second", Backend::kSm80, "sm80", accepts, run, nullptr, nullptr, floats_of},
    {"third", Backend::kCpu, "cpu", accepts, run},
};

TEST(ResolveIn, TakesTheFirstThatDoesNotDecline) {
  const Resolution<TestKernel> resolution = resolve_in(kKernels, Problem{}, parse_target("cpu"));
  ASSERT_NE(resolution.chosen, nullptr);
  EXPECT_EQ(resolution.chosen->name, "second");
  EXPECT_EQ(resolution.candidates[0].reason, "not on cpu");
  EXPECT_EQ(resolution.candidates[1].reason, "");
  EXPECT_EQ(resolution.candidates[2].reason, "serves the problem too, but second comes first");
}

TEST(ResolveIn, CountsTheWorkspaceOfTheChosenOneAlone) {
  const Target target = parse_target("cpu");
  Resolution<TestKernel> resolution = resolve_in(kKernels, Problem{}, target);
  EXPECT_EQ(resolution.workspace_per_head, 10);
  EXPECT_EQ(resolution.workspace_bytes, 4 * 6 * 10);
  resolution = resolve_in(kKernels, Problem{.backend = Backend::kCpu}, target);
  EXPECT_EQ(resolution.chosen->name, "third");
  EXPECT_EQ(resolution.workspace_per_head, 0);
  EXPECT_EQ(resolution.workspace_bytes, 0);
  resolution = resolve_in(kKernels, Problem{.heads = 0}, target);
  EXPECT_EQ(resolution.workspace_per_head, 10);
  EXPECT_EQ(resolution.workspace_bytes, 0);
}

TEST(ResolveIn, AWorkspaceThatNobodyCanCountIsAReason) {
  const Target target = parse_target("cpu");
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max() / 4;
  Resolution<TestKernel> resolution = resolve_in(kKernels, Problem{.heads = 1, .floats = kLargest}, target);
  EXPECT_EQ(resolution.chosen->name, "second");
  EXPECT_EQ(resolution.workspace_bytes, 4 * kLargest);
  for (const Problem& problem :
       {Problem{.heads = 1, .floats = kLargest + 1}, Problem{.heads = 2, .floats = kLargest}}) {
    resolution = resolve_in(kKernels, problem, target);
    EXPECT_EQ(resolution.chosen->name, "third");
    EXPECT_EQ(resolution.workspace_bytes, 0);
    EXPECT_EQ(resolution.candidates[1].reason, "needs more workspace than 64 bits can count");
  }
}

TEST(RequireKernel, ListsEveryReason) {
  const Target target = parse_target("sm_80");
  const auto resolution = resolve_in(kKernels, Problem{.backend = Backend::kSm90}, target);
  try {
    require_kernel(resolution, "test", "the problem's text", target);
    FAIL() << "expected UnsupportedError";
  } catch (const UnsupportedError& error) {
    EXPECT_STREQ(error.what(),
                 "no kernel serves this test on target sm_80:\n  first: not on sm_80\n"
                 "  second: not the backend that was asked for\n  third: not the backend that was asked for\n"
                 "  problem: the problem's text");
    EXPECT_EQ(error.candidates().size(), 3U);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Views.

template <class Error, class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(CheckWorkspace, AsksForWhatTheKernelNeeds) {
  alignas(16) float memory[64];
  const auto refused = [](const TensorView& view, int64_t bytes) {
    return message_of<ValueError>([&] { check_workspace(view, bytes, {}); });
  };
  const TensorView whole = TensorView::contiguous(memory, DType::kFloat32, {2, 4, 8});
  EXPECT_EQ(refused(whole, 256), "");
  EXPECT_EQ(refused(whole, 100), "");
  EXPECT_EQ(refused(TensorView::contiguous(memory, DType::kFloat32, {64}), 256), "");
  EXPECT_EQ(refused(TensorView{}, 0), "");
  EXPECT_EQ(refused(TensorView::contiguous(nullptr, DType::kFloat32, {2, 4, 0}), 0), "");
  EXPECT_EQ(refused(whole, 260),
            "workspace: got float32 [2, 4, 8] of 256 bytes, expected at least 260 bytes of float32");
  EXPECT_EQ(refused(TensorView{}, 4), "workspace: got nothing, expected at least 4 bytes of float32");
  EXPECT_EQ(refused(TensorView::contiguous(nullptr, DType::kFloat32, {64}), 256),
            "workspace: got a null pointer, expected memory");
  EXPECT_EQ(refused(TensorView::contiguous(memory + 1, DType::kFloat32, {63}), 240),
            "workspace: got a misaligned pointer, expected one aligned to 16 bytes");
  TensorView spaced = whole;
  spaced.strides[2] = 2;
  EXPECT_EQ(refused(spaced, 256), "workspace: got strides [32, 8, 2], expected contiguous memory");
  TensorView on_gpu = whole;
  on_gpu.device = {DeviceType::kCuda, 1};
  EXPECT_EQ(refused(on_gpu, 256), "workspace: got another device than q, expected the device of q");
  EXPECT_EQ(message_of<TypeError>(
                [&] { check_workspace(TensorView::contiguous(memory, DType::kInt32, {64}), 256, Device{}); }),
            "workspace: got int32 [64], expected at least 256 bytes of float32");
  // Sizes whose product wraps are no room, whatever they wrap to.
  const int64_t half = int64_t{1} << 32;
  EXPECT_NE(refused(TensorView::contiguous(memory, DType::kFloat32, {half, half}), 4), "");
  EXPECT_NE(refused(TensorView::contiguous(memory, DType::kFloat32, {half, half, 64}), 4), "");
  TensorView negative = whole;
  negative.shape[0] = negative.shape[1] = -4;
  EXPECT_NE(refused(negative, 4), "");
}

// Where the kernel can do without, one that is too small is no error; one that is wrong otherwise is, whatever its
// size.
TEST(SufficesAsWorkspace, SaysWhetherThereIsRoom) {
  alignas(16) float memory[64];
  const auto suffices = [](const TensorView& view, int64_t bytes) { return suffices_as_workspace(view, bytes, {}); };
  const TensorView whole = TensorView::contiguous(memory, DType::kFloat32, {2, 4, 8});
  EXPECT_TRUE(suffices(whole, 256));
  EXPECT_TRUE(suffices(TensorView{}, 0));
  EXPECT_FALSE(suffices(whole, 257));
  EXPECT_FALSE(suffices(TensorView{}, 4));
  EXPECT_FALSE(suffices(TensorView::contiguous(nullptr, DType::kFloat32, {2, 4, 0}), 4));
  EXPECT_THROW(suffices(TensorView::contiguous(nullptr, DType::kFloat32, {64}), 260), ValueError);
  EXPECT_THROW(suffices(TensorView::contiguous(memory + 1, DType::kFloat32, {63}), 260), ValueError);
  EXPECT_THROW(suffices(TensorView::contiguous(memory, DType::kInt32, {64}), 260), TypeError);
  EXPECT_THROW(suffices(TensorView::contiguous(memory, DType::kFloat32, {-1}), 260), ValueError);
  TensorView wrong = whole;
  wrong.strides[2] = 2;
  EXPECT_THROW(suffices(wrong, 260), ValueError);
  wrong = whole;
  wrong.rank = kMaxRank + 1;
  EXPECT_THROW(suffices(wrong, 260), ValueError);
  wrong = whole;
  wrong.device = {DeviceType::kCuda, 1};
  EXPECT_THROW(suffices(wrong, 260), ValueError);
}

TEST(SpecOf, ChecksWhatTheTypeSystemLetsThrough) {
  EXPECT_FALSE(spec_of("x", TensorView{}).present);
  const TensorSpec spec = spec_of("x", TensorView::contiguous(nullptr, DType::kFloat16, {3, 0}));
  EXPECT_TRUE(spec.present);
  EXPECT_EQ(spec.dtype, "float16");
  EXPECT_EQ(spec.shape, (std::vector<int64_t>{3, 0}));
  TensorView view;
  view.rank = 13;
  EXPECT_EQ(message_of<ValueError>([&] { spec_of("x", view); }), "x: got rank 13, expected at most 12");
  view.rank = 1;
  view.dtype = static_cast<DType>(9);
  EXPECT_EQ(message_of<TypeError>([&] { spec_of("x", view); }), "x: got DType 9, expected one of heed::DType");
}

// ---------------------------------------------------------------------------------------------------------------------
// Prepared problems.

TEST(PreparedTables, MakeOncePerTextAndKindOfTarget) {
  PreparedTables<std::string> tables;
  int made = 0;
  const auto find = [&](const char* text, const char* target) {
    return *tables.find_or_make(text, parse_target(target), [&] { return std::string(text) + std::to_string(++made); });
  };
  EXPECT_EQ(find("a", "cpu"), "a1");
  EXPECT_EQ(find("a", "cpu"), "a1");
  EXPECT_EQ(find("b", "cpu"), "b2");
  EXPECT_EQ(find("a", "sm_80"), "a3");
  EXPECT_EQ(find("a", "sm_90a"), "a4");
  EXPECT_EQ(find("a", "sm_80"), "a3");
  EXPECT_THROW(tables.find_or_make("c", parse_target("cpu"), []() -> std::string { throw ValueError("no"); }),
               ValueError);
  EXPECT_EQ(find("c", "cpu"), "c5");  // a failure leaves nothing behind
}

}  // namespace
}  // namespace heed
