// The XLA handlers of the small ops: on the CPU with memory, and what they ask of a driver that is made up here. The
// latter needs NVRTC for what compiles.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/jit/jit.h"
#include "cuda/jit/nvrtc.h"
#include "fake_driver.h"
#include "ops/act_and_mul.h"
#include "ops/attention_decode.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "xla_call.h"

using Handler = heed::xla::Error* (*)(heed::xla::CallFrame*);

extern "C" {
heed::xla::Error* heed_xla_act_and_mul(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_act_and_mul_cuda(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_act_and_mul_bwd(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_act_and_mul_bwd_cuda(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_rope(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_rope_cuda(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_rms_norm(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_rms_norm_cuda(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_rms_norm_bwd(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_rms_norm_bwd_cuda(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_attention_decode(heed::xla::CallFrame* frame);
heed::xla::Error* heed_xla_attention_decode_cuda(heed::xla::CallFrame* frame);
}

namespace heed {
namespace {

using test::fake_driver;
using test::FakeDriver;
using test::XlaCall;

template <class Op>
std::unique_ptr<XlaCall> make_call(const std::string& text, const char* target) {
  const ResolvedOp<Op> resolved = Op::resolve_text(text, parse_target(target));
  return std::make_unique<XlaCall>(text, resolved.problem.operands, resolved.results);
}

// An op with a problem of it.
struct OpCase {
  const char* name;
  const char* text;  // without the backend
  std::unique_ptr<XlaCall> (*make)(const std::string& text, const char* target);
  Handler on_cpu, on_cuda;

  std::unique_ptr<XlaCall> call(const char* target, const char* backend = "auto") const {
    return make(std::string(text) + ";backend=" + backend, target);
  }
};

constexpr OpCase kCases[] = {
    {"act_and_mul", "act_and_mul.v1;x=bfloat16[3,4,64];activation=gelu_tanh", make_call<ActAndMulOp>,
     heed_xla_act_and_mul, heed_xla_act_and_mul_cuda},
    {"act_and_mul_bwd", "act_and_mul_bwd.v1;x=float32[1,4,64];dout=float32[3,4,32];activation=silu",
     make_call<ActAndMulBwdOp>, heed_xla_act_and_mul_bwd, heed_xla_act_and_mul_bwd_cuda},
    {"rope",
     "rope.v1;q=float16[9,4,64];k=float16[9,2,64];indptr=int32[3];offsets=int32[2];rotary_dim=64;interleave=0;"
     "scale=0x1p+0;theta=0x1.388p+13;llama31=0;inverse=0",
     make_call<RopeOp>, heed_xla_rope, heed_xla_rope_cuda},
    {"rms_norm", "rms_norm.v1;x=float32[9,64];weight=float32[64];residual=float32[9,64];rows=1;eps=0x1p-20",
     make_call<RmsNormOp>, heed_xla_rms_norm, heed_xla_rms_norm_cuda},
    {"rms_norm_bwd", "rms_norm_bwd.v1;x=float32[9,64];weight=float32[64];dout=float32[9,64];rows=1;eps=0x1p-20",
     make_call<RmsNormBwdOp>, heed_xla_rms_norm_bwd, heed_xla_rms_norm_bwd_cuda},
    {"attention_decode",
     "attention_decode.v1;q=bfloat16[8,64];k=bfloat16[700,2,64];v=bfloat16[700,2,64];layout=NHD;window=-1;"
     "softcap=0x0p+0;scale=default;rope=none;lse=1;batch_invariant=0",
     make_call<AttentionDecodeOp>, heed_xla_attention_decode, heed_xla_attention_decode_cuda},
};

void expect_error(xla::Error* error, xla::ErrorCode code, const std::string& part) {
  const std::unique_ptr<xla::Error> owned(error);
  ASSERT_NE(owned, nullptr) << "no error, expected one with: " << part;
  EXPECT_EQ(owned->code, code) << owned->message;
  EXPECT_NE(owned->message.find(part), std::string::npos) << owned->message;
}

void expect_success(xla::Error* error) {
  const std::unique_ptr<xla::Error> owned(error);
  EXPECT_EQ(owned, nullptr) << owned->message;
}

class XlaSmallOps : public testing::TestWithParam<OpCase> {
 protected:
  void SetUp() override { fake_driver() = FakeDriver(); }

  // Memory that is never touched: its addresses are checked.
  static std::unique_ptr<XlaCall> gpu_call(const char* backend = "auto") {
    auto call = GetParam().call("sm_90a", backend);
    call->stream = reinterpret_cast<void*>(intptr_t{4711});
    intptr_t address = 1 << 20;
    for (auto* tensors : {&call->arguments(), &call->results()}) {
      for (auto& tensor : *tensors) tensor->buffer.data = reinterpret_cast<void*>(address += 1 << 20);
    }
    return call;
  }
};

TEST_P(XlaSmallOps, WritesEveryResultOnTheCpu) {
  const auto call = GetParam().call("cpu");
  std::vector<std::vector<std::max_align_t>> memory;
  const auto give_memory = [&](XlaCall::Tensor& tensor, unsigned char byte) {
    memory.emplace_back(static_cast<size_t>(tensor.bytes) / sizeof(std::max_align_t) + 1);
    auto* const bytes = reinterpret_cast<unsigned char*>(memory.back().data());
    std::fill(bytes, bytes + tensor.bytes, byte);
    tensor.buffer.data = bytes;
    return bytes;
  };
  for (auto& tensor : call->arguments()) give_memory(*tensor, tensor->buffer.dtype == xla::kS32 ? 0 : 0x3c);
  std::vector<unsigned char*> results;
  for (auto& tensor : call->results()) results.push_back(give_memory(*tensor, 0xff));  // NaN in every dtype
  expect_success(GetParam().on_cpu(&call->frame(xla::kExecute)));
  const std::string name = GetParam().name;
  const size_t num_written = results.size() - (name == "rms_norm_bwd" || name == "attention_decode" ? 1 : 0);
  for (size_t i = 0; i < num_written; ++i) {
    const XlaCall::Tensor& tensor = *call->results()[i];
    const int width = tensor.buffer.dtype == xla::kF32 ? 4 : 2;
    for (int64_t at = 0; at < tensor.bytes; at += width) {
      ASSERT_FALSE(
          std::all_of(results[i] + at, results[i] + at + width, [](unsigned char byte) { return byte == 0xff; }))
          << "result " << i << " at byte " << at;
    }
  }
}

TEST_P(XlaSmallOps, RefusesTheProblemOfAnotherOp) {
  const auto call = GetParam().call("cpu");
  for (const OpCase& other : kCases) {
    if (std::string(other.name) == GetParam().name) continue;
    expect_error(other.on_cpu(&call->frame(xla::kExecute)), xla::kInvalidArgument, "problem: got \"");
  }
}

TEST_P(XlaSmallOps, RefusesOperandsThatAreNotThoseOfItsProblem) {
  const auto call = GetParam().call("cpu");
  call->frame(xla::kExecute).rets.size -= 1;
  expect_error(GetParam().on_cpu(&call->frame(xla::kExecute)), xla::kInvalidArgument,
               "operands or results are not those of its problem");
}

TEST_P(XlaSmallOps, RefusesInEitherStageWhatNoGpuKernelServes) {
  const auto call = gpu_call("cpu");
  for (const auto stage : {xla::kInitialize, xla::kExecute}) {
    expect_error(GetParam().on_cuda(&call->frame(stage)), xla::kUnimplemented, "no kernel serves this ");
  }
  EXPECT_TRUE(fake_driver().launches.empty());
}

// Nothing is queried, allocated or waited for, no context changes.
TEST_P(XlaSmallOps, LoadsFirstAndThenOnlyLaunches) {
  std::string searched;
  if (!cuda::find_nvrtc(&searched)) GTEST_SKIP() << "there is no NVRTC:\n" << searched;
  const auto call = gpu_call();
  expect_success(GetParam().on_cuda(&call->frame(xla::kInitialize)));
  EXPECT_TRUE(fake_driver().launches.empty());
  for (int i = 0; i < 3; ++i) {
    fake_driver() = FakeDriver();
    expect_success(GetParam().on_cuda(&call->frame(xla::kExecute)));
    EXPECT_FALSE(fake_driver().launches.empty());
    for (const std::string& name : fake_driver().calls) EXPECT_TRUE(name.starts_with("cuLaunchKernel")) << name;
    for (const auto& launch : fake_driver().launches) EXPECT_EQ(launch.stream, call->stream);
  }
}

INSTANTIATE_TEST_SUITE_P(Ops, XlaSmallOps, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace heed
