// The CPU attention forward kernel as a library function: huge strides, leading axes, callers at once, choice of
// target.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "attention_oracle.h"
#include "cpu/simd.h"
#include "heed/heed.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

TEST(CpuAttention, OffsetsBeyond32Bits) {
  // Batches 3e9 elements apart, in memory that is reserved and never filled.
  constexpr int64_t kStride = 3'000'000'000;
  constexpr int64_t kTokens = 29;
  constexpr int64_t kHeads = 16;
  constexpr int64_t kDim = 72;
  constexpr size_t kBytes = (kStride + kTokens * kHeads * kDim) * sizeof(float);
  const auto reserve = [] {
    return static_cast<float*>(
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  };
  float* memory[4] = {reserve(), reserve(), reserve(), reserve()};
  for (float* at : memory) {
    if (at == MAP_FAILED) GTEST_SKIP() << "no address space";
  }
  Case c{.name = "far apart",
         .batch = 2,
         .q_len = kTokens,
         .kv_len = kTokens,
         .num_q_heads = kHeads,
         .num_kv_heads = kHeads,
         .head_dim_qk = kDim,
         .head_dim_v = kDim};
  Inputs in = make_inputs(c);
  TensorView* views[] = {&in.q.view, &in.k.view, &in.v.view};
  for (int t = 0; t < 3; ++t) {
    for (int64_t b = 0; b < 2; ++b) {
      std::memcpy(memory[t] + b * kStride, static_cast<float*>(views[t]->data) + b * kTokens * kHeads * kDim,
                  kTokens * kHeads * kDim * sizeof(float));
    }
    views[t]->data = memory[t];
    views[t]->strides[0] = kStride;
  }
  Tensor out(c.dtype, {2, kTokens, kHeads, kDim});
  out.view.data = memory[3];
  out.view.strides[0] = kStride;
  Tensor lse(DType::kFloat32, {2, kHeads, kTokens});
  attention_forward(make_args(in, out, lse), c.options);
  expect_close(out, attention<float>(c, in).out, attention<double>(c, in).out, c.dtype, kDim, "out");
  for (float* at : memory) munmap(at, kBytes);
}

TEST(CpuAttention, LeadingAxesBroadcast) {
  Case c{.name = "leading",
         .batch = 2,
         .q_len = 33,
         .kv_len = 50,
         .num_q_heads = 4,
         .num_kv_heads = 2,
         .head_dim_qk = 16,
         .head_dim_v = 16};
  std::vector<Inputs> parts;
  Tensor q(c.dtype, {3, 1, 2, 33, 4, 16});
  Tensor k(c.dtype, {1, 2, 2, 50, 2, 16});
  Tensor v(c.dtype, {3, 2, 2, 50, 2, 16});
  Tensor out(c.dtype, {3, 2, 2, 33, 4, 16});
  Tensor lse(DType::kFloat32, {3, 2, 2, 4, 33});
  int64_t seed = 1;
  for (Tensor* tensor : {&q, &k, &v}) {
    for (int64_t i = 0; i < tensor->count(); ++i)
      tensor->set(i, std::sin(static_cast<double>(seed = seed * 48271 % 2147483647)));
  }
  AttentionForwardArgs args;
  args.q = q.view, args.k = k.view, args.v = v.view, args.out = out.view, args.lse = lse.view;
  attention_forward(args);
  for (int64_t a = 0; a < 3; ++a) {
    for (int64_t b = 0; b < 2; ++b) {
      Inputs in = make_inputs(c);
      for (int64_t i = 0; i < in.q.count(); ++i) in.q.set(i, q.get(a * in.q.count() + i));
      for (int64_t i = 0; i < in.k.count(); ++i) in.k.set(i, k.get(b * in.k.count() + i));
      for (int64_t i = 0; i < in.v.count(); ++i) in.v.set(i, v.get((a * 2 + b) * in.v.count() + i));
      Tensor part(c.dtype, {2, 33, 4, 16});
      for (int64_t i = 0; i < part.count(); ++i) part.set(i, out.get((a * 2 + b) * part.count() + i));
      expect_close(part, attention<float>(c, in).out, attention<double>(c, in).out, c.dtype, 16, "out");
    }
  }
}

TEST(CpuAttention, CallersAtTheSameTime) {
  Case c{.name = "together",
         .batch = 2,
         .q_len = 200,
         .kv_len = 200,
         .num_q_heads = 4,
         .num_kv_heads = 2,
         .head_dim_qk = 64,
         .head_dim_v = 64};
  Inputs in = make_inputs(c);
  Tensor first(c.dtype, {2, 200, 4, 64});
  Tensor lse(DType::kFloat32, {2, 4, 200});
  attention_forward(make_args(in, first, lse), c.options);
  std::vector<std::thread> callers;
  std::vector<Tensor> outs(6);
  for (Tensor& out : outs) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        out = Tensor(c.dtype, {2, 200, 4, 64});
        Tensor own_lse(DType::kFloat32, {2, 4, 200});
        attention_forward(make_args(in, out, own_lse), c.options);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (Tensor& out : outs) EXPECT_EQ(out.memory, first.memory);
}

TEST(CpuTarget, UnknownNamesAreRefused) {
  EXPECT_THROW(cpu::force_target("AVX9"), ValueError);
  EXPECT_THROW(cpu_target(), ValueError);
  cpu::force_target("");
  EXPECT_EQ(cpu_target(), cpu_targets().front());
  cpu::force_target(cpu_targets().back() == "SCALAR" ? "emu128" : "scalar");
  EXPECT_EQ(cpu_target(), cpu_targets().back());
  cpu::force_target("");
}

}  // namespace
}  // namespace heed
