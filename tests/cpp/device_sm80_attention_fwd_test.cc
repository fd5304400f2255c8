// The device code of the portable GPU kernel, run on the CPU (device_emulation/) and compared with the float64 oracle:
// its tiles, masks, barriers, copies and arithmetic, on machines without a GPU. How fast it is, what a compiler makes
// of it and what the host passes to it are not tested here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "attention_oracle.h"
#include "cuda/device/sm80_attention_fwd.cuh"
#include "guarded.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary
using cuda::Element;
using cuda::Sm80AttentionFwdParams;
using cuda::Sm80AttentionFwdSpec;
using Ints = std::vector<int32_t>;

// The bounds of packed sequences, whose rows are those of a batch of 1; empty: a dense batch.
struct Bounds {
  Ints q, k;
};

// ---------------------------------------------------------------------------------------------------------------------
// What the host passes to the kernel.

using Axes = std::vector<long long cuda::DeviceOperand::*>;

cuda::DeviceOperand operand_of(const Tensor& tensor, const Axes& axes) {
  cuda::DeviceOperand operand{};
  operand.data = tensor.view.data;
  for (int axis = 0; axis < tensor.view.rank; ++axis) {
    operand.*axes[axis] = tensor.view.shape[axis] == 1 ? 0 : tensor.view.strides[axis];
  }
  return operand;
}

void set_operands(Sm80AttentionFwdParams& params, const Inputs& in, const Tensor& out, const Tensor& lse) {
  using Operand = cuda::DeviceOperand;
  const Axes rows = {&Operand::batch, &Operand::token, &Operand::head, &Operand::dim};
  params.q = operand_of(in.q, rows);
  params.k = operand_of(in.k, rows);
  params.v = operand_of(in.v, rows);
  params.out = operand_of(out, rows);
  params.lse = operand_of(lse, {&Operand::batch, &Operand::head, &Operand::token});
  params.sinks = operand_of(in.sinks, {&Operand::head});
  params.alibi_slopes = operand_of(in.slopes, {&Operand::head});
  params.q_segment_ids = operand_of(in.q_ids, {&Operand::batch, &Operand::token});
  params.kv_segment_ids = operand_of(in.kv_ids, {&Operand::batch, &Operand::token});
}

Sm80AttentionFwdParams make_params(const Case& c) {
  Sm80AttentionFwdParams params{};
  params.batch = static_cast<int>(c.batch);
  params.q_len = static_cast<int>(c.q_len);
  params.kv_len = static_cast<int>(c.kv_len);
  params.num_q_heads = static_cast<int>(c.num_q_heads);
  params.group = static_cast<int>(c.num_q_heads / c.num_kv_heads);
  params.head_dim_qk = static_cast<int>(c.head_dim_qk);
  params.head_dim_v = static_cast<int>(c.head_dim_v);
  params.window_left = c.options.window_left;
  params.window_right = c.options.is_causal ? 0 : c.options.window_right;
  params.is_bottom_right = c.options.causal_align == CausalAlign::kBottomRight;
  const double scale = c.options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(c.head_dim_qk)));
  params.scale = static_cast<float>(scale);
  params.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  if (c.options.softcap > 0.0) {
    params.softcap = static_cast<float>(c.options.softcap);
    params.scale_over_cap = static_cast<float>(scale / c.options.softcap);
  }
  params.num_heads = static_cast<unsigned>(c.batch * c.num_q_heads);
  params.section_heads = c.options.is_causal ? 2 : 1;
  return params;
}

void set_bounds(Sm80AttentionFwdParams& params, Bounds& bounds) {
  params.batch = static_cast<int>(bounds.q.size()) - 1;
  params.cu_seqlens_q.data = bounds.q.data();
  params.cu_seqlens_q.token = 1;
  params.cu_seqlens_k.data = bounds.k.data();
  params.cu_seqlens_k.token = 1;
}

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

Tensor rows_of(const Tensor& packed, int64_t begin, int64_t len) {
  const auto& shape = packed.view.shape;
  Tensor part(packed.view.dtype, {1, len, shape[2], shape[3]});
  for (int64_t i = 0; i < part.count(); ++i) part.set(i, packed.get(begin * shape[2] * shape[3] + i));
  return part;
}

// Each sequence by itself, put together; rows outside get 0 and -inf.
template <class Real>
Expected packed_attention(const Case& c, const Inputs& in, const Bounds& bounds) {
  if (bounds.q.empty()) return attention<Real>(c, in);
  Expected all;
  all.out.assign(static_cast<size_t>(c.q_len * c.num_q_heads * c.head_dim_v), 0.0);
  all.lse.assign(static_cast<size_t>(c.q_len * c.num_q_heads), -kInfinity);
  for (size_t b = 0; b + 1 < bounds.q.size(); ++b) {
    const int64_t begin = bounds.q[b];
    Case one = c;
    one.q_len = bounds.q[b + 1] - begin;
    one.kv_len = bounds.k[b + 1] - bounds.k[b];
    Inputs part;
    part.q = rows_of(in.q, begin, one.q_len);
    part.k = rows_of(in.k, bounds.k[b], one.kv_len);
    part.v = rows_of(in.v, bounds.k[b], one.kv_len);
    const Expected expected = attention<Real>(one, part);
    std::copy(expected.out.begin(), expected.out.end(), all.out.begin() + begin * c.num_q_heads * c.head_dim_v);
    for (int64_t h = 0; h < c.num_q_heads; ++h) {
      std::copy_n(expected.lse.begin() + h * one.q_len, one.q_len, all.lse.begin() + h * c.q_len + begin);
    }
  }
  return all;
}

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
    Sm80AttentionFwdParams params = make_params(c);
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

// Values of V that are not finite from a key on that only some rows see: the kernel notices, and starts again
// carefully.
void spoil_values(Tensor& /*q*/, Tensor& /*k*/, Tensor& v) {
  constexpr int64_t kFirstKey = 40;
  const int64_t row = v.view.shape[2] * v.view.shape[3];
  for (int64_t i = kFirstKey * row; i < v.count(); ++i) v.set(i, i % 3 == 0 ? kInfinity : kNaN);
}

// Rows whose scores reach thousands beside rows of moderate ones: the two round their references differently.
void make_mixed(Tensor& q, Tensor& k, Tensor& /*v*/) {
  const int64_t dim = q.view.shape[3];
  const int64_t num_heads = q.view.shape[2];
  for (int64_t i = 0; i < q.count(); ++i) q.set(i, std::round(2 * q.get(i)));
  for (int64_t i = 0; i < k.count(); ++i) k.set(i, std::round(2 * k.get(i)));
  for (int64_t row = 0; row < q.count() / dim; ++row) {
    const int64_t token = row / num_heads;
    const bool is_steep = token % 2 == 1;
    q.set(row * dim, is_steep ? 4801.0 + 13.0 * static_cast<double>(token) : 0.0);
    q.set(row * dim + 1, is_steep ? 0.0 : 200.0);
  }
  for (int64_t key = 0; key < k.count() / dim; ++key) {
    k.set(key * dim, 1.0);
    k.set(key * dim + 1, static_cast<double>(key / 3));
  }
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
  Sm80AttentionFwdParams params = make_params(c);
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
