// The device code of the portable GPU backward kernels, run on the CPU (device_emulation/) and compared with the
// float64 oracle: as device_sm80_attention_fwd_test.cc does for the forward kernel.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "attention_bwd_oracle.h"
#include "cuda/attention_host.h"
#include "cuda/device/attention_bwd_passes.cuh"
#include "cuda/device/sm80_attention_bwd.cuh"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary
using cuda::Element;
using cuda::Sm80AttentionBwdParams;
using cuda::Sm80AttentionBwdSpec;

AttentionProblem problem_of(const Case& c) {
  AttentionProblem problem;
  problem.dtype = c.dtype;
  problem.batch = c.batch;
  problem.q_len = c.q_len;
  problem.kv_len = c.kv_len;
  problem.num_q_heads = c.num_q_heads;
  problem.num_kv_heads = c.num_kv_heads;
  problem.head_dim_qk = c.head_dim_qk;
  problem.head_dim_v = c.head_dim_v;
  problem.softmax_scale = c.options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(c.head_dim_qk)));
  problem.is_causal = c.options.is_causal;
  problem.causal_align = c.options.causal_align;
  problem.window_left = c.options.window_left;
  problem.window_right = c.options.is_causal ? 0 : c.options.window_right;
  problem.softcap = c.options.softcap;
  return problem;
}

Sm80AttentionBwdParams make_params(const Case& c, const Sm80AttentionBwdSpec& spec, const AttentionBackwardArgs& args,
                                   std::vector<float>& workspace) {
  Sm80AttentionBwdParams params{};
  const AttentionProblem problem = problem_of(c);
  cuda::set_problem(params, problem, c.num_kv_heads, int64_t{1} << 23);
  cuda::set_inputs(params, args, false);
  const auto rows = cuda::row_axes(false), statistics = cuda::statistic_axes(false), sums = cuda::head_sum_axes(false);
  cuda::set_operand(params.out, args.out, rows);
  cuda::set_operand(params.dout, args.dout, rows);
  cuda::set_operand(params.lse, args.lse, statistics);
  cuda::set_operand(params.dlse, args.dlse, statistics);
  cuda::set_operand(params.dq, args.dq, rows);
  cuda::set_operand(params.dk, args.dk, rows);
  cuda::set_operand(params.dv, args.dv, rows);
  cuda::set_operand(params.dsinks, args.dsinks, sums);
  cuda::set_operand(params.dalibi_slopes, args.dalibi_slopes, sums);
  params.layout = cuda::attention_bwd_workspace(c.q_len, c.kv_len, 0, static_cast<int>(c.head_dim_qk),
                                                spec.is_deterministic, spec.has_alibi);
  params.lse_factor = spec.is_natural() ? 1.0f : 1.4426950408889634f;
  workspace.assign(static_cast<size_t>(params.layout.floats * c.batch * c.num_q_heads) + 4,
                   std::numeric_limits<float>::quiet_NaN());
  params.workspace = workspace.data() + (reinterpret_cast<uintptr_t>(workspace.data()) % 16 == 0 ? 0 : 2);
  return params;
}

template <class Kernel>
void run_kernel(const Sm80AttentionBwdParams& params, int64_t num_blocks) {
  for (int64_t index = 0; index < num_blocks; ++index) {
    device_emulation::run_block(static_cast<unsigned>(index), Kernel::kNumThreads, Kernel::kSharedBytes,
                                [&] { Kernel::run(params); });
  }
}

template <Sm80AttentionBwdSpec kSpec>
void run_kernels(Sm80AttentionBwdParams params, int64_t num_q_heads_in_all, int64_t num_key_tiles) {
  constexpr cuda::AttentionBwdPassSpec kPass = {kSpec.element, kSpec.is_aligned};
  const int64_t pass_blocks = (params.q_len + cuda::kBwdPassRows - 1) / cuda::kBwdPassRows * num_q_heads_in_all;
  params.num_tiles = static_cast<int>(num_key_tiles);
  run_kernel<cuda::AttentionBwdPrepare<kPass>>(params, pass_blocks);
  run_kernel<cuda::Sm80AttentionBwd<kSpec>>(params, num_key_tiles * params.num_heads);
  run_kernel<cuda::AttentionBwdFinish<kPass>>(params, pass_blocks);
}

// Asynchronous copies arrive as early as they may, then as late: each hides mistakes that the other shows.
template <Sm80AttentionBwdSpec kSpec>
void expect_matches(const Case& c, bool has_dlse = false, void (*edit)(Inputs&, Cotangents&) = nullptr) {
  Inputs in = make_inputs(c);
  Cotangents more = make_cotangents(c, in, has_dlse);
  if (edit != nullptr) edit(in, more);
  const Gradients oracle = backward<double>(c, in, more), naive = backward<float>(c, in, more);
  constexpr int64_t kTileKeys = cuda::Sm80AttentionBwd<kSpec>::kKvRows;
  for (const bool copies_late : {false, true}) {
    GradientTensors got(c, c.layout);
    const AttentionBackwardArgs args = make_backward_args(in, more, got);
    std::vector<float> workspace;
    device_emulation::block.copies_late = copies_late;
    run_kernels<kSpec>(make_params(c, kSpec, args, workspace), c.batch * c.num_q_heads,
                       (c.kv_len + kTileKeys - 1) / kTileKeys);
    expect_gradients(got, naive, oracle, c.dtype, copies_late ? "copies arrive late:" : "copies arrive early:");
  }
}

constexpr Sm80AttentionBwdSpec spec_of(Element element, int head_dim_qk, int head_dim_v) {
  return {.element = element, .head_dim_qk = head_dim_qk, .head_dim_v = head_dim_v};
}
constexpr Sm80AttentionBwdSpec kBf16Dim64 = spec_of(Element::kBFloat16, 64, 64);
constexpr Sm80AttentionBwdSpec kBf16Dim128 = spec_of(Element::kBFloat16, 128, 128);
constexpr Sm80AttentionBwdSpec kF32Dim64 = spec_of(Element::kFloat32, 64, 64);

// Lengths that fill no tile, and two query heads that share one of K and V.
Case case_of(DType dtype, int64_t head_dim, bool is_causal = false) {
  Case c;
  c.dtype = dtype;
  c.q_len = 90;
  c.kv_len = 150;
  c.num_q_heads = 2;
  c.head_dim_qk = head_dim;
  c.head_dim_v = head_dim;
  c.options.is_causal = is_causal;
  return c;
}

TEST(DeviceSm80AttentionBwdTest, Bfloat16Dim64) { expect_matches<kBf16Dim64>(case_of(DType::kBFloat16, 64)); }
TEST(DeviceSm80AttentionBwdTest, Bfloat16Dim64Causal) {
  expect_matches<kBf16Dim64>(case_of(DType::kBFloat16, 64, true), true);
}
TEST(DeviceSm80AttentionBwdTest, Bfloat16Dim128) { expect_matches<kBf16Dim128>(case_of(DType::kBFloat16, 128)); }
TEST(DeviceSm80AttentionBwdTest, Bfloat16Dim128CausalDeterministic) {
  constexpr Sm80AttentionBwdSpec kSpec = {.element = Element::kBFloat16, .is_deterministic = true};
  expect_matches<kSpec>(case_of(DType::kBFloat16, 128, true));
}
TEST(DeviceSm80AttentionBwdTest, Bfloat16Dim128Deterministic) {
  constexpr Sm80AttentionBwdSpec kSpec = {.element = Element::kBFloat16, .is_deterministic = true};
  expect_matches<kSpec>(case_of(DType::kBFloat16, 128));
}
TEST(DeviceSm80AttentionBwdTest, Bfloat16Dim256) {
  expect_matches<spec_of(Element::kBFloat16, 256, 256)>(case_of(DType::kBFloat16, 256, true));
}
TEST(DeviceSm80AttentionBwdTest, Float16HeadDimsDiffer) {
  Case c = case_of(DType::kFloat16, 192);
  c.head_dim_v = 128;
  expect_matches<spec_of(Element::kFloat16, 192, 128)>(c);
}
TEST(DeviceSm80AttentionBwdTest, Float32Dim64) { expect_matches<kF32Dim64>(case_of(DType::kFloat32, 64, true)); }
TEST(DeviceSm80AttentionBwdTest, Float32Dim192) {
  Case c = case_of(DType::kFloat32, 192);
  c.q_len = 40;
  c.kv_len = 50;
  expect_matches<spec_of(Element::kFloat32, 192, 192)>(c);
}
TEST(DeviceSm80AttentionBwdTest, Float32Dim256) {
  Case c = case_of(DType::kFloat32, 256);
  c.q_len = 20;
  c.kv_len = 40;
  expect_matches<spec_of(Element::kFloat32, 256, 256)>(c);
}
TEST(DeviceSm80AttentionBwdTest, Window) {
  Case c = case_of(DType::kBFloat16, 64);
  c.options.window_left = 30;
  c.options.window_right = 5;
  c.options.causal_align = CausalAlign::kTopLeft;
  expect_matches<kBf16Dim64>(c);
}
TEST(DeviceSm80AttentionBwdTest, RowsWithoutKeys) {
  Case c = case_of(DType::kBFloat16, 64, true);
  c.q_len = 200;
  c.kv_len = 70;
  expect_matches<kBf16Dim64>(c, true);
}
TEST(DeviceSm80AttentionBwdTest, SoftcapAlibiSinks) {
  constexpr Sm80AttentionBwdSpec kSpec = {
      .element = Element::kBFloat16, .head_dim_qk = 64, .head_dim_v = 64, .has_softcap = true, .has_alibi = true};
  Case c = case_of(DType::kBFloat16, 64, true);
  c.num_q_heads = 4;
  c.num_kv_heads = 2;
  c.batch = 2;
  c.options.softcap = 1.5;
  c.has_alibi = c.has_sinks = true;
  expect_matches<kSpec>(c, true);
}
TEST(DeviceSm80AttentionBwdTest, Float32SoftcapAlibiSinks) {
  constexpr Sm80AttentionBwdSpec kSpec = {
      .element = Element::kFloat32, .head_dim_qk = 64, .head_dim_v = 64, .has_softcap = true, .has_alibi = true};
  Case c = case_of(DType::kFloat32, 64, true);
  c.q_len = 40;
  c.options.softcap = 1.5;
  c.has_alibi = c.has_sinks = true;
  expect_matches<kSpec>(c, true);
}
TEST(DeviceSm80AttentionBwdTest, SegmentIds) {
  constexpr Sm80AttentionBwdSpec kSpec = {
      .element = Element::kBFloat16, .head_dim_qk = 64, .head_dim_v = 64, .has_segment_ids = true};
  Case c = case_of(DType::kBFloat16, 64);
  c.q_len = 170;
  c.has_segments = true;
  expect_matches<kSpec>(c);
}
TEST(DeviceSm80AttentionBwdTest, UnalignedRows) {
  constexpr Sm80AttentionBwdSpec kSpec = {
      .element = Element::kBFloat16, .head_dim_qk = 64, .head_dim_v = 48, .is_aligned = false};
  Case c = case_of(DType::kBFloat16, 59);
  c.head_dim_v = 37;
  c.layout = Layout::kSpacedDims;
  expect_matches<kSpec>(c);
}

// Rows that nobody sees hold NaN: keys past the last diagonal, and queries that see no key with their cotangents.
TEST(DeviceSm80AttentionBwdTest, HiddenRowsThatAreNotFinite) {
  Case c = case_of(DType::kBFloat16, 64, true);
  c.options.is_causal = false;
  c.options.causal_align = CausalAlign::kTopLeft;
  c.options.window_right = 20;
  c.edit = [](Tensor& /*q*/, Tensor& k, Tensor& v) {
    for (int64_t i = 110 * 64; i < k.count(); ++i) k.set(i, kNaN);
    for (int64_t i = 110 * 64; i < v.count(); ++i) v.set(i, kInfinity);
  };
  expect_matches<kBf16Dim64>(c);
  Case blind = case_of(DType::kBFloat16, 128, true);
  blind.q_len = 100;
  blind.kv_len = 70;
  const auto spoil = [](Inputs& in, Cotangents& more) {
    for (int64_t i = 0; i < 30 * 2 * 128; ++i) {
      in.q.set(i, kNaN);
      more.dout.set(i, kNaN);
    }
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t row = 0; row < 30; ++row) more.dlse.set(h * 100 + row, kNaN);
    }
  };
  expect_matches<kBf16Dim128>(blind, true, spoil);
  blind.has_sinks = true;  // then their lse is finite
  expect_matches<kBf16Dim128>(blind, false, [](Inputs& in, Cotangents& /*more*/) {
    for (int64_t i = 0; i < 30 * 2 * 128; ++i) in.q.set(i, i % 2 == 0 ? kNaN : kInfinity);
  });
}

}  // namespace
}  // namespace heed
