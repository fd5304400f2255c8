// The XLA handler on CUDA: what each stage asks of the driver, on a driver made up here. Needs NVRTC for what compiles.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/jit/jit.h"
#include "cuda/jit/nvrtc.h"
#include "cuda/sm90_attention_fwd_spec.h"
#include "fake_driver.h"
#include "xla_call.h"

namespace {

using heed::test::fake_driver;
using heed::test::FakeDriver;
using heed::test::XlaCall;

std::string problem_text(const std::string& shape, const std::string& backend = "auto", const std::string& more = "") {
  return "attention_fwd.v1;q=bfloat16[" + shape + "];k=bfloat16[" + shape + "];v=bfloat16[" + shape + "]" + more +
         ";scale=default;causal=1;align=bottom_right;window=-1,-1;softcap=0x0p+0;lse=1;deterministic=0;backend=" +
         backend;
}

// The gradient of the call above, without its mask: q, k, v, out and dout are of one shape.
std::string backward_text(int64_t batch, int64_t tokens, int64_t heads, int64_t dim,
                          const std::string& backend = "auto", const std::string& dtype = "bfloat16") {
  const auto list = [](std::initializer_list<int64_t> sizes) {
    std::string text;
    for (int64_t size : sizes) text += (text.empty() ? "[" : ",") + std::to_string(size);
    return text + "]";
  };
  const std::string rows = dtype + list({batch, tokens, heads, dim});
  return "attention_bwd.v1;q=" + rows + ";k=" + rows + ";v=" + rows + ";sinks=float32" + list({heads}) +
         ";out=" + rows + ";lse=float32" + list({batch, heads, tokens}) + ";dout=" + rows +
         ";scale=default;causal=0;align=bottom_right;window=-1,-1;softcap=0x0p+0;deterministic=0;backend=" + backend;
}

int64_t count(const std::string& call) {
  const std::vector<std::string>& calls = fake_driver().calls;
  return std::count(calls.begin(), calls.end(), call);
}

void* fake_stream(intptr_t number) { return reinterpret_cast<void*>(number); }

class XlaHandler : public testing::Test {
 protected:
  void SetUp() override { fake_driver() = FakeDriver(); }

  // Memory is never touched by a driver that is made up, but its addresses are checked.
  static std::unique_ptr<XlaCall> make_call(const std::string& text, int device = 0, intptr_t stream = 77) {
    auto call = std::make_unique<XlaCall>(text);
    call->device = device;
    call->stream = fake_stream(stream);
    intptr_t address = 1 << 20;
    for (auto* tensors : {&call->arguments(), &call->results()}) {
      for (auto& tensor : *tensors) tensor->buffer.data = reinterpret_cast<void*>(address += 1 << 20);
    }
    return call;
  }

  static void expect_success(heed::xla::Error* error) {
    const std::unique_ptr<heed::xla::Error> owned(error);
    EXPECT_EQ(owned, nullptr) << owned->message;
  }

  static void expect_error(heed::xla::Error* error, heed::xla::ErrorCode code, const std::string& part) {
    const std::unique_ptr<heed::xla::Error> owned(error);
    ASSERT_NE(owned, nullptr) << "no error, expected one with: " << part;
    EXPECT_EQ(owned->code, code) << owned->message;
    EXPECT_NE(owned->message.find(part), std::string::npos) << owned->message;
  }
};

TEST_F(XlaHandler, AnswersWhatItWasBuiltForWithoutADriver) {
  for (auto* handler :
       {heed_xla_attention_fwd, heed_xla_attention_fwd_cuda, heed_xla_attention_bwd, heed_xla_attention_bwd_cuda}) {
    heed::xla::Metadata metadata{};
    heed::xla::MetadataExtension extension{
        {sizeof(heed::xla::MetadataExtension), heed::xla::kMetadataExtension, nullptr}, &metadata};
    heed::xla::CallFrame frame{};
    frame.extensions = &extension.base;
    EXPECT_EQ(handler(&frame), nullptr);
    EXPECT_EQ(metadata.api_version.major_version, heed::xla::kApiMajor);
    EXPECT_EQ(metadata.api_version.minor_version, heed::xla::kApiMinor);
    EXPECT_EQ(metadata.traits, heed::xla::kCommandBufferCompatible);
  }
  EXPECT_TRUE(fake_driver().calls.empty());
}

TEST_F(XlaHandler, RefusesInEitherStageWhatNoGpuKernelServes) {
  const auto call = make_call(problem_text("1,8,2,64", "cpu"));
  for (const auto stage : {heed::xla::kInitialize, heed::xla::kExecute}) {
    expect_error(heed_xla_attention_fwd_cuda(&call->frame(stage)), heed::xla::kUnimplemented,
                 "no kernel serves this attention forward on target sm_90a");
  }
  const auto backward = make_call(backward_text(1, 8, 2, 64, "cpu"));
  for (const auto stage : {heed::xla::kInitialize, heed::xla::kExecute}) {
    expect_error(heed_xla_attention_bwd_cuda(&backward->frame(stage)), heed::xla::kUnimplemented,
                 "no kernel serves this attention backward on target sm_90a");
  }
  EXPECT_EQ(count("cuLaunchKernel"), 0);
}

TEST_F(XlaHandler, RefusesACallWithoutItsProblem) {
  const auto call = make_call(problem_text("1,8,2,64"));
  heed::xla::CallFrame& frame = call->frame(heed::xla::kInitialize);
  frame.attrs.size = 0;
  for (auto* handler : {heed_xla_attention_fwd_cuda, heed_xla_attention_bwd_cuda}) {
    expect_error(handler(&frame), heed::xla::kInvalidArgument, "no string attribute problem");
  }
}

TEST_F(XlaHandler, RefusesTheProblemOfAnotherOp) {
  const auto forward = make_call(problem_text("1,8,2,64"));
  expect_error(heed_xla_attention_bwd(&forward->frame(heed::xla::kExecute)), heed::xla::kInvalidArgument,
               "expected \"attention_bwd.v1\"");
  const auto backward = make_call(backward_text(1, 8, 2, 64));
  expect_error(heed_xla_attention_fwd(&backward->frame(heed::xla::kExecute)), heed::xla::kInvalidArgument,
               "expected \"attention_fwd.v1\"");
}

TEST_F(XlaHandler, HandsXlasOwnErrorsBack) {
  const auto call = make_call(problem_text("1,8,2,64"));
  call->api().get_device_ordinal = [](heed::xla::DeviceOrdinalGetArgs*) -> heed::xla::Error* {
    return new heed::xla::Error{heed::xla::kInternal, "XLA knows no device"};
  };
  expect_error(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kExecute)), heed::xla::kInternal,
               "XLA knows no device");
}

// Kernels come from NVRTC here (or from a cache that it has filled).
class XlaHandlerWithKernel : public XlaHandler {
 protected:
  void SetUp() override {
    XlaHandler::SetUp();
    std::string searched;
    if (!heed::cuda::find_nvrtc(&searched)) GTEST_SKIP() << "there is no NVRTC:\n" << searched;
  }

  static void expect_whole_tiles_without_a_counter(heed::xla::CallFrame& frame) {
    fake_driver() = FakeDriver();
    fake_driver().num_copied_bytes = sizeof(heed::cuda::Sm90AttentionFwdParams);
    fake_driver().copied_block = 384;
    expect_success(heed_xla_attention_fwd_cuda(&frame));
    ASSERT_EQ(fake_driver().launches.size(), 1U);
    heed::cuda::Sm90AttentionFwdParams params{};
    ASSERT_EQ(fake_driver().launches[0].copy_of_params.size(), sizeof params);
    std::memcpy(&params, fake_driver().launches[0].copy_of_params.data(), sizeof params);
    EXPECT_EQ(params.next_tile, nullptr);
    EXPECT_EQ(params.slots, nullptr);
    EXPECT_EQ(params.num_whole_tiles, params.num_tiles_in_all);
  }
};

TEST_F(XlaHandlerWithKernel, InitializeLoadsOnceAndLaunchesNothing) {
  const auto call = make_call(problem_text("1,8,2,32"));  // no other test's kernel
  expect_success(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kInitialize)));
  EXPECT_EQ(count("cuFuncLoad"), 1);
  EXPECT_EQ(fake_driver().device_calls.back(), "load 0");
  EXPECT_EQ(count("cuCtxPushCurrent"), count("cuCtxPopCurrent"));
  EXPECT_EQ(count("cuLaunchKernel"), 0);
  fake_driver() = FakeDriver();
  expect_success(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kInitialize)));
  EXPECT_EQ(fake_driver().calls, std::vector<std::string>{});
}

// No module is loaded, nothing is queried, allocated or waited for, no context changes.
TEST_F(XlaHandlerWithKernel, ExecuteAsksTheDriverForOneLaunchAndNothingElse) {
  const auto call = make_call(problem_text("2,40,4,64", "sm80"), 0, 4711);
  expect_success(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kInitialize)));
  for (int i = 0; i < 3; ++i) {
    fake_driver() = FakeDriver();
    expect_success(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kExecute)));
    EXPECT_EQ(fake_driver().calls, std::vector<std::string>{"cuLaunchKernel"});
    ASSERT_EQ(fake_driver().launches.size(), 1U);
    EXPECT_EQ(fake_driver().launches[0].stream, fake_stream(4711));
  }
}

// The kernel for Hopper needs its tensor maps too, which are made on the host.
TEST_F(XlaHandlerWithKernel, ExecuteOnHopperMakesMapsAndLaunches) {
  const auto call = make_call(problem_text("3,1024,8,128"), 0, 4711);
  ASSERT_EQ(call->results().size(), 3U);
  const heed::test::XlaCall::Tensor& workspace = *call->results().back();
  EXPECT_EQ(workspace.dims, (std::vector<int64_t>{3, 8, 4}));
  expect_success(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kInitialize)));
  for (int i = 0; i < 3; ++i) {
    fake_driver() = FakeDriver();
    expect_success(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kExecute)));
    EXPECT_EQ(fake_driver().calls,
              (std::vector<std::string>{"cuCtxGetCurrent", "cuCtxPushCurrent", "cuTensorMapEncodeTiled",
                                        "cuTensorMapEncodeTiled", "cuTensorMapEncodeTiled", "cuTensorMapEncodeTiled",
                                        "cuLaunchKernelEx", "cuCtxPopCurrent"}));
    ASSERT_EQ(fake_driver().launches.size(), 1U);
    EXPECT_EQ(fake_driver().launches[0].stream, fake_stream(4711));
  }
}

// Room for the counter, but not for the parts that this version would make.
TEST_F(XlaHandlerWithKernel, ForwardLeavesAWorkspaceAloneThatIsTooSmall) {
  std::string text = problem_text("1,4480,4,128");
  text.replace(text.find("causal=1"), 8, "causal=0");
  const auto call = make_call(text);
  std::vector<int64_t>& dims = call->results().back()->dims;
  EXPECT_GT(dims.back(), 1 << 16);
  dims.back() = 64;
  expect_whole_tiles_without_a_counter(call->frame(heed::xla::kExecute));
}

// An executable may come from a version of heed that had less use for one, or none, or be made for other GPUs.
TEST_F(XlaHandlerWithKernel, ForwardRunsWithoutItsWorkspaceAndRefusesAWrongOne) {
  const auto call = make_call(problem_text("3,1024,8,128"));
  heed::xla::CallFrame& frame = call->frame(heed::xla::kExecute);
  heed::test::XlaCall::Tensor& workspace = *call->results().back();
  for (const int64_t floats : {3, 0}) {
    workspace.dims.back() = floats;
    expect_whole_tiles_without_a_counter(frame);
  }
  workspace.dims.back() = 4;
  workspace.buffer.dtype = heed::xla::kS32;
  expect_error(heed_xla_attention_fwd_cuda(&frame), heed::xla::kInvalidArgument,
               "workspace: got int32 [3, 8, 4], expected at least 384 bytes of float32");
  frame.rets.size -= 1;
  fake_driver() = FakeDriver();
  expect_success(heed_xla_attention_fwd_cuda(&frame));
  EXPECT_EQ(fake_driver().launches.size(), 1U);
  frame.rets.size -= 1;  // no lse
  expect_error(heed_xla_attention_fwd_cuda(&frame), heed::xla::kInvalidArgument, "not those of its problem");
}

TEST_F(XlaHandlerWithKernel, EveryDeviceGetsItsOwn) {
  const std::string text = problem_text("3,8,2,64");
  const auto first = make_call(text, 0, 1);
  const auto second = make_call(text, 1, 2);
  expect_success(heed_xla_attention_fwd_cuda(&first->frame(heed::xla::kInitialize)));
  fake_driver() = FakeDriver();
  expect_success(heed_xla_attention_fwd_cuda(&second->frame(heed::xla::kInitialize)));
  EXPECT_LE(count("cuLibraryLoadData"), 1);
  fake_driver() = FakeDriver();
  expect_success(heed_xla_attention_fwd_cuda(&second->frame(heed::xla::kExecute)));
  expect_success(heed_xla_attention_fwd_cuda(&first->frame(heed::xla::kExecute)));
  ASSERT_EQ(fake_driver().launches.size(), 2U);
  EXPECT_EQ(fake_driver().launches[0].stream, fake_stream(2));
  EXPECT_EQ(fake_driver().launches[1].stream, fake_stream(1));
}

TEST_F(XlaHandlerWithKernel, AFailedLaunchIsAnError) {
  const auto call = make_call(problem_text("4,8,2,64"));
  expect_success(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kInitialize)));
  fake_driver().failing_call = "cuLaunchKernelEx";
  expect_error(heed_xla_attention_fwd_cuda(&call->frame(heed::xla::kExecute)), heed::xla::kInternal,
               "cuLaunchKernelEx failed: invalid argument (CUDA_ERROR_INVALID_VALUE)");
}

// Only launches here too, as many as the pass has kernels; the context is pushed for none of them.
TEST_F(XlaHandlerWithKernel, BackwardLoadsFirstAndThenOnlyLaunches) {
  const auto call = make_call(backward_text(2, 40, 4, 64), 0, 4711);
  expect_success(heed_xla_attention_bwd_cuda(&call->frame(heed::xla::kInitialize)));
  EXPECT_GE(count("cuFuncLoad"), 1);
  EXPECT_EQ(count("cuLaunchKernel"), 0);
  fake_driver() = FakeDriver();
  expect_success(heed_xla_attention_bwd_cuda(&call->frame(heed::xla::kInitialize)));
  EXPECT_EQ(fake_driver().calls, std::vector<std::string>{});
  for (int i = 0; i < 3; ++i) {
    fake_driver() = FakeDriver();
    expect_success(heed_xla_attention_bwd_cuda(&call->frame(heed::xla::kExecute)));
    ASSERT_FALSE(fake_driver().launches.empty());
    EXPECT_EQ(fake_driver().calls, std::vector<std::string>(fake_driver().launches.size(), "cuLaunchKernel"));
    for (const auto& launch : fake_driver().launches) EXPECT_EQ(launch.stream, fake_stream(4711));
  }
}

// An executable may come from a version of heed whose kernel needed less.
TEST_F(XlaHandlerWithKernel, BackwardRefusesAWorkspaceThatIsTooSmall) {
  const auto call = make_call(backward_text(3, 40, 4, 64));
  heed::test::XlaCall::Tensor& workspace = *call->results().back();
  ASSERT_GT(workspace.bytes, 0);
  workspace.dims.back() -= 1;
  expect_error(heed_xla_attention_bwd_cuda(&call->frame(heed::xla::kExecute)), heed::xla::kInvalidArgument,
               "workspace: got float32 [3, 4, " + std::to_string(workspace.dims.back()) + "]");
  EXPECT_EQ(count("cuLaunchKernel"), 0);
}

TEST_F(XlaHandlerWithKernel, BackwardRefusesOperandsThatAreNotItsProblems) {
  const auto call = make_call(backward_text(5, 8, 2, 64));
  heed::xla::CallFrame& frame = call->frame(heed::xla::kExecute);
  call->arguments()[4]->dims[3] = 32;
  expect_error(heed_xla_attention_bwd_cuda(&frame), heed::xla::kInvalidArgument,
               "out: got bfloat16 [5, 8, 2, 32], expected bfloat16 [5, 8, 2, 64]");
  frame.rets.size -= 1;  // no workspace
  expect_error(heed_xla_attention_bwd_cuda(&frame), heed::xla::kInvalidArgument, "not those of its problem");
  EXPECT_EQ(count("cuLaunchKernel"), 0);
}

TEST_F(XlaHandlerWithKernel, RefusesOperandsThatAreNotItsProblems) {
  const auto call = make_call(problem_text("5,8,2,64"));
  heed::xla::CallFrame& frame = call->frame(heed::xla::kExecute);
  frame.args.size -= 1;
  expect_error(heed_xla_attention_fwd_cuda(&frame), heed::xla::kInvalidArgument, "not those of its problem");
  EXPECT_EQ(count("cuLaunchKernel"), 0);
}

}  // namespace
