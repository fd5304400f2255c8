// The device code of the portable GPU kernel, run on the CPU (device_emulation/) and compared with the float64 oracle:
// its tiles, masks, barriers, copies and arithmetic, on machines without a GPU. How fast it is, what a compiler makes
// of it and what the host passes to it are not tested here.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/device/sm80_attention_fwd.cuh"
#include "emulated_attention_fwd.h"
#include "guarded.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary
using cuda::Element;
using cuda::Sm80AttentionFwdParams;
using cuda::Sm80AttentionFwdSpec;

template <Sm80AttentionFwdSpec kSpec>
void run_kernel(Sm80AttentionFwdParams params) {
  using Kernel = cuda::Sm80AttentionFwd<kSpec>;
  params.num_tiles = kSpec.is_varlen ? params.q_len / Kernel::kQRows + params.batch + 2
                                     : (params.q_len + Kernel::kQRows - 1) / Kernel::kQRows;
  const unsigned num_blocks = static_cast<unsigned>(params.num_tiles) * params.num_heads;
  for (unsigned index = 0; index < num_blocks; ++index) {
    device_emulation::run_block(index, Kernel::kNumThreads, Kernel::kSharedBytes, [&] { Kernel::run(params); });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Comparison.

// Asynchronous copies arrive as early as they may, then as late: each hides mistakes that the other shows.
template <Sm80AttentionFwdSpec kSpec>
void expect_matches(const Case& c, Bounds bounds = {}) {
  Inputs in = make_inputs(c);
  const Guarded guarded_q(in.q);
  const Guarded guarded_k(in.k);
  const Guarded guarded_v(in.v);
  const Expected oracle = packed_attention<double>(c, in, bounds);
  const Expected naive = packed_attention<float>(c, in, bounds);
  for (const bool copies_late : {false, true}) {
    Tensor out(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_v});
    Tensor lse(DType::kFloat32, {c.batch, c.num_q_heads, c.q_len});
    const Guarded guarded_out(out);
    const Guarded guarded_lse(lse);
    Sm80AttentionFwdParams params = make_params<Sm80AttentionFwdParams>(c);
    set_operands(params, in, out, lse);
    if (kSpec.is_varlen) set_bounds(params, bounds);
    device_emulation::block.copies_late = copies_late;
    run_kernel<kSpec>(params);
    const std::string what = copies_late ? "copies arrive late: " : "copies arrive early: ";
    expect_close(out, naive.out, oracle.out, c.dtype, c.head_dim_v, what + "out");
    expect_close(lse, naive.lse, oracle.lse, DType::kFloat32, c.q_len, what + "lse");
  }
}

constexpr Sm80AttentionFwdSpec spec_of(Element element, int head_dim_qk, int head_dim_v) {
  return {.element = element, .head_dim_qk = head_dim_qk, .head_dim_v = head_dim_v};
}
constexpr Sm80AttentionFwdSpec kBf16Dim64 = spec_of(Element::kBFloat16, 64, 64);
constexpr Sm80AttentionFwdSpec kBf16Dim128 = spec_of(Element::kBFloat16, 128, 128);
constexpr Sm80AttentionFwdSpec kF32Dim64 = spec_of(Element::kFloat32, 64, 64);
constexpr Sm80AttentionFwdSpec kF32Dim128 = spec_of(Element::kFloat32, 128, 128);

// Lengths that fill no tile, and two query heads that share one of K and V.
Case case_of(DType dtype, int64_t head_dim, bool is_causal = false) {
  Case c;
  c.dtype = dtype;
  c.q_len = 50;
  c.kv_len = 75;
  c.num_q_heads = 2;
  c.head_dim_qk = head_dim;
  c.head_dim_v = head_dim;
  c.options.is_causal = is_causal;
  return c;
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(DeviceSm80AttentionFwdTest, Bf16) {
  Case c = case_of(DType::kBFloat16, 64);
  c.kv_len = 300;  // several steps
  expect_matches<kBf16Dim64>(c);
}

TEST(DeviceSm80AttentionFwdTest, Bf16Dim128Causal) {
  Case c = case_of(DType::kBFloat16, 128, true);
  c.q_len = 150;
  c.kv_len = 220;
  expect_matches<kBf16Dim128>(c);
}

TEST(DeviceSm80AttentionFwdTest, F16) {
  Case c = case_of(DType::kFloat16, 64);
  c.kv_len = 300;
  expect_matches<spec_of(Element::kFloat16, 64, 64)>(c);
}

TEST(DeviceSm80AttentionFwdTest, F32) { expect_matches<kF32Dim64>(case_of(DType::kFloat32, 64)); }

TEST(DeviceSm80AttentionFwdTest, F32Causal) {
  Case c = case_of(DType::kFloat32, 64, true);
  c.batch = 2;
  expect_matches<kF32Dim64>(c);
}

TEST(DeviceSm80AttentionFwdTest, F32WindowAndSinks) {
  Case c = case_of(DType::kFloat32, 64);
  c.q_len = 150;
  c.kv_len = 140;
  c.options.window_left = 20;
  c.options.window_right = 3;
  c.has_sinks = true;
  expect_matches<kF32Dim64>(c);
}

TEST(DeviceSm80AttentionFwdTest, F32Dim128Causal) { expect_matches<kF32Dim128>(case_of(DType::kFloat32, 128, true)); }

TEST(DeviceSm80AttentionFwdTest, F32DifferentHeadDims) {
  Case c = case_of(DType::kFloat32, 72);
  c.head_dim_v = 40;
  expect_matches<spec_of(Element::kFloat32, 72, 40)>(c);
}

TEST(DeviceSm80AttentionFwdTest, F32Dim256CausalHasOneStage) {
  expect_matches<spec_of(Element::kFloat32, 256, 256)>(case_of(DType::kFloat32, 256, true));
}

TEST(DeviceSm80AttentionFwdTest, PackedSequencesAndRowsOutside) {
  constexpr Sm80AttentionFwdSpec kSpec = {
      .element = Element::kFloat32, .head_dim_qk = 64, .head_dim_v = 64, .is_varlen = true};
  Case c = case_of(DType::kFloat32, 64, true);
  c.q_len = 90;
  c.kv_len = 88;
  expect_matches<kSpec>(c, {.q = {3, 3, 8, 48, 48, 81}, .k = {1, 1, 6, 40, 45, 86}});
}

TEST(DeviceSm80AttentionFwdTest, UnalignedRows) {
  constexpr Sm80AttentionFwdSpec kSpec = {
      .element = Element::kFloat32, .head_dim_qk = 64, .head_dim_v = 64, .is_aligned = false};
  expect_matches<kSpec>(case_of(DType::kFloat32, 59));
}

TEST(DeviceSm80AttentionFwdTest, SoftcapAlibiAndSegments) {
  constexpr Sm80AttentionFwdSpec kSpec = {.element = Element::kFloat32,
                                          .head_dim_qk = 64,
                                          .head_dim_v = 64,
                                          .has_segment_ids = true,
                                          .has_softcap = true,
                                          .has_alibi = true};
  Case c = case_of(DType::kFloat32, 64, true);
  c.q_len = 120;
  c.kv_len = 120;
  c.options.softcap = 2.0;
  c.has_alibi = true;
  c.has_segments = true;
  expect_matches<kSpec>(c);
}

TEST(DeviceSm80AttentionFwdTest, HiddenValuesThatAreNotFinite) {
  Case c = case_of(DType::kFloat32, 64, true);
  c.edit = spoil_values;
  expect_matches<kF32Dim64>(c);
  c.dtype = DType::kBFloat16;
  expect_matches<kBf16Dim64>(c);
}

TEST(DeviceSm80AttentionFwdTest, ScoresOfTenThousand) {
  Case c = case_of(DType::kFloat32, 64);
  c.gain = 2500.0;
  expect_matches<kF32Dim64>(c);
}

TEST(DeviceSm80AttentionFwdTest, SteepRowsBesideFlatOnes) {
  Case c = case_of(DType::kFloat32, 64);
  c.q_len = 70;
  c.kv_len = 300;
  c.edit = make_mixed;
  expect_matches<kF32Dim64>(c);
}

// All weight on one key: its values, bit by bit.
TEST(DeviceSm80AttentionFwdTest, OneKeyIsCopied) {
  Case c = case_of(DType::kFloat32, 64);
  c.kv_len = 1;
  expect_matches<kF32Dim64>(c);
  const Inputs in = make_inputs(c);
  const Tensor out(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_v});
  const Tensor lse(DType::kFloat32, {c.batch, c.num_q_heads, c.q_len});
  Sm80AttentionFwdParams params = make_params<Sm80AttentionFwdParams>(c);
  set_operands(params, in, out, lse);
  run_kernel<kF32Dim64>(params);
  for (int64_t i = 0; i < out.count(); ++i) ASSERT_EQ(out.get(i), in.v.get(i % c.head_dim_v));
}

TEST(DeviceSm80AttentionFwdTest, NoKeys) {
  Case c = case_of(DType::kFloat32, 64);
  c.kv_len = 0;
  expect_matches<kF32Dim64>(c);
}

}  // namespace
}  // namespace heed
