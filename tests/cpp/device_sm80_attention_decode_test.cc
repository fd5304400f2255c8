// The device code of attention of one query, run on the CPU (device_emulation/) and compared with the float64 oracle:
// rings, masks, products, rotations, and the merges of warps, of clusters and of pieces. How fast it is and what the
// host passes to it are not tested here.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "attention_oracle.h"
#include "cuda/device/attention_decode_merge.cuh"
#include "cuda/device/sm80_attention_decode.cuh"
#include "guarded.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary
using cuda::Element;
using Operand = cuda::DecodeOperand;
using Params = cuda::Sm80AttentionDecodeRopeParams;
using Spec = cuda::Sm80AttentionDecodeSpec;

// How the keys are divided, and what a case of attention does not say.
struct Division {
  int num_pieces = 1;
  int cluster_log2 = 0;
  double rope_theta = 0.0;        // 0: no rotation
  bool shares_the_cache = false;  // K and V of the first batch row serve all
};

// ---------------------------------------------------------------------------------------------------------------------
// What the host passes to the kernel. The batch is the leading axis.

using Axes = std::vector<long long Operand::*>;

void set_operand(Params& params, cuda::DecodeOperandIndex index, Operand& operand, const Tensor& tensor,
                 const Axes& axes) {
  operand.data = static_cast<char*>(tensor.view.data);
  if (!tensor.view.defined()) return;
  const auto stride = [&](int axis) {
    return tensor.view.shape[axis] == 1 ? 0 : tensor.view.strides[axis] * info(tensor.view.dtype).size_bytes;
  };
  const int num_lead = tensor.view.rank - static_cast<int>(axes.size());
  if (num_lead == 1) params.lead.strides[index][0] = stride(0);
  for (size_t i = 0; i < axes.size(); ++i) operand.*axes[i] = stride(num_lead + static_cast<int>(i));
}

void set_operands(Params& params, const Inputs& in, const Tensor& out, const Tensor& lse) {
  const Axes rows = {&Operand::token_bytes, &Operand::head_bytes, &Operand::dim_bytes};
  set_operand(params, cuda::kDecodeQ, params.q, in.q, rows);
  set_operand(params, cuda::kDecodeK, params.k, in.k, rows);
  set_operand(params, cuda::kDecodeV, params.v, in.v, rows);
  params.k.data += params.first_key * params.k.token_bytes;
  params.v.data += params.first_key * params.v.token_bytes;
  set_operand(params, cuda::kDecodeOut, params.out, out, rows);
  set_operand(params, cuda::kDecodeLse, params.lse, lse, {&Operand::head_bytes, &Operand::token_bytes});
  set_operand(params, cuda::kDecodeSinks, params.sinks, in.sinks, {&Operand::head_bytes});
  set_operand(params, cuda::kDecodeSlopes, params.alibi_slopes, in.slopes, {&Operand::head_bytes});
}

Params make_params(const Case& c, const Spec& spec, const Division& division) {
  Params params{};
  params.has_lead = c.batch > 1 ? 1 : 0;
  params.lead.count = 1;
  params.lead.sizes[0] = cuda::make_divisor(static_cast<unsigned>(c.batch));
  params.num_kv_heads = cuda::make_divisor(static_cast<unsigned>(c.num_kv_heads));
  params.group = static_cast<int>(c.num_q_heads / c.num_kv_heads);
  params.head_dim_qk = static_cast<int>(c.head_dim_qk);
  params.head_dim_v = static_cast<int>(c.head_dim_v);
  params.row_tiles = cuda::make_divisor(static_cast<unsigned>((params.group + spec.query_rows - 1) / spec.query_rows));
  const int64_t left = c.options.window_left;
  params.first_key = left >= 0 && left < c.kv_len ? static_cast<int>(c.kv_len - 1 - left) : 0;
  params.num_keys = static_cast<int>(c.kv_len) - params.first_key;
  // GPUs without clusters have as many pieces instead.
  params.cluster_log2 = cuda::kDeviceArch >= 90 ? division.cluster_log2 : 0;
  const int num_pieces = division.num_pieces << (division.cluster_log2 - params.cluster_log2);
  params.num_pieces = cuda::make_divisor(static_cast<unsigned>(num_pieces));
  const double scale = c.options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(c.head_dim_qk)));
  params.scale = static_cast<float>(scale);
  if (c.options.softcap > 0.0) {
    params.softcap = static_cast<float>(c.options.softcap);
    params.scale_over_cap = static_cast<float>(scale / c.options.softcap);
  }
  for (int64_t pair = 0; spec.has_rope && pair < c.head_dim_qk / 2; ++pair) {
    const double turns = std::pow(division.rope_theta, -2.0 * static_cast<double>(pair) / c.head_dim_qk) / (2 * M_PI);
    params.turns[pair] = static_cast<unsigned long long>(std::ldexp(turns, 64));
  }
  return params;
}

template <Spec kSpec>
void run_kernels(Params params, const Case& c) {
  using Kernel = cuda::Sm80AttentionDecode<kSpec>;
  using Merge = cuda::AttentionDecodeMerge<cuda::AttentionDecodeMergeSpec{.element = kSpec.element}>;
  const int64_t num_heads = c.batch * c.num_q_heads;
  const int num_pieces = static_cast<int>(params.num_pieces.divisor);
  const int floats = cuda::decode_workspace(num_pieces, params.head_dim_v).floats;
  Tensor workspace(DType::kFloat32, {num_heads * floats + 4});
  for (int64_t i = 0; i < workspace.count(); ++i) workspace.set(i, kNaN);
  auto* const memory = static_cast<char*>(workspace.view.data);
  params.workspace = reinterpret_cast<float*>(memory + 15 - (reinterpret_cast<uintptr_t>(memory) + 15) % 16);
  const int64_t num_clusters = c.batch * params.row_tiles.divisor * c.num_kv_heads * num_pieces;
  for (int64_t cluster = 0; cluster < num_clusters; ++cluster) {
    device_emulation::run_cluster(static_cast<unsigned>(cluster), 1 << params.cluster_log2, Kernel::kNumThreads,
                                  Kernel::kSharedBytes, [&] { Kernel::run(params); });
  }
  for (int64_t head = 0; num_pieces > 1 && head < num_heads; ++head) {
    device_emulation::run_block(static_cast<unsigned>(head), Merge::kNumThreads, Merge::kSharedBytes,
                                [&] { Merge::run(params); });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Comparison.

// Pairs (j, j + D / 2) of each head turn by position * theta^(-2j / D).
Tensor rotated(const Tensor& x, DType dtype, double theta, int64_t first_position) {
  const auto& shape = x.view.shape;  // [B, tokens, H, D]
  Tensor result(dtype, {shape[0], shape[1], shape[2], shape[3]});
  const int64_t half = shape[3] / 2;
  for (int64_t row = 0; row < shape[0] * shape[1] * shape[2]; ++row) {
    const auto position = static_cast<double>(first_position + row / shape[2] % shape[1]);
    for (int64_t j = 0; j < half; ++j) {
      const double angle = position * std::pow(theta, -2.0 * static_cast<double>(j) / static_cast<double>(shape[3]));
      const double left = x.get(row * shape[3] + j), right = x.get(row * shape[3] + half + j);
      result.set(row * shape[3] + j, left * std::cos(angle) - right * std::sin(angle));
      result.set(row * shape[3] + half + j, left * std::sin(angle) + right * std::cos(angle));
    }
  }
  return result;
}

template <class Real>
Expected expected_of(const Case& c, const Inputs& in, const Division& division) {
  if (division.rope_theta == 0.0) return attention<Real>(c, in);
  // A plain implementation rounds what it rotates.
  const DType dtype = sizeof(Real) == sizeof(float) ? c.dtype : DType::kFloat32;
  Inputs turned = in;
  turned.q = rotated(in.q, dtype, division.rope_theta, c.kv_len - 1);
  turned.k = rotated(in.k, dtype, division.rope_theta, 0);
  return attention<Real>(c, turned);
}

// Asynchronous copies arrive as early as they may, then as late: each hides mistakes that the other shows.
template <Spec kSpec>
void expect_matches(const Case& c, const Division& division = {}) {
  Inputs in = make_inputs(c);
  if (division.shares_the_cache) {
    for (Tensor* tensor : {&in.k, &in.v}) {
      const int64_t count = tensor->count() / c.batch;
      for (int64_t i = count; i < tensor->count(); ++i) tensor->set(i, tensor->get(i % count));
    }
  }
  std::vector<std::unique_ptr<Guarded>> guarded;
  for (Tensor* tensor : {&in.q, &in.k, &in.v}) {
    if (c.layout == Layout::kContiguous) guarded.push_back(std::make_unique<Guarded>(*tensor));
  }
  const Expected oracle = expected_of<double>(c, in, division);
  const Expected naive = expected_of<float>(c, in, division);
  for (const bool copies_late : {false, true}) {
    Tensor out(c.dtype, {c.batch, 1, c.num_q_heads, c.head_dim_v});
    Tensor lse(DType::kFloat32, {c.batch, c.num_q_heads, 1});
    const Guarded guarded_out(out);
    const Guarded guarded_lse(lse);
    Params params = make_params(c, kSpec, division);
    set_operands(params, in, out, lse);
    if (division.shares_the_cache) params.lead.strides[cuda::kDecodeK][0] = params.lead.strides[cuda::kDecodeV][0] = 0;
    device_emulation::block.copies_late = copies_late;
    run_kernels<kSpec>(params, c);
    const std::string what = copies_late ? "copies arrive late: " : "copies arrive early: ";
    expect_close(out, naive.out, oracle.out, c.dtype, c.head_dim_v, what + "out");
    expect_close(lse, naive.lse, oracle.lse, DType::kFloat32, c.num_q_heads, what + "lse");
  }
}

constexpr Spec spec_of(Element element, int head_dim, int query_rows = 8) {
  return {.element = element, .head_dim_qk = head_dim, .head_dim_v = head_dim, .query_rows = query_rows};
}
constexpr Spec kBf16Dim64 = spec_of(Element::kBFloat16, 64);
constexpr Spec kBf16Dim128 = spec_of(Element::kBFloat16, 128);
constexpr Spec kF32Dim64 = spec_of(Element::kFloat32, 64);

// Groups of three heads, and keys that fill no tile.
Case case_of(DType dtype, int64_t head_dim, int64_t kv_len = 300) {
  Case c;
  c.dtype = dtype;
  c.kv_len = kv_len;
  c.num_q_heads = 6;
  c.num_kv_heads = 2;
  c.head_dim_qk = head_dim;
  c.head_dim_v = head_dim;
  return c;
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(DeviceSm80AttentionDecodeTest, Bf16) { expect_matches<kBf16Dim128>(case_of(DType::kBFloat16, 128)); }

// Several tiles for each warp: the rings turn.
TEST(DeviceSm80AttentionDecodeTest, ManyKeys) {
  expect_matches<kBf16Dim128>(case_of(DType::kBFloat16, 128, 1111));
  expect_matches<kBf16Dim64>(case_of(DType::kBFloat16, 64, 1500));
}

TEST(DeviceSm80AttentionDecodeTest, F16) {
  expect_matches<spec_of(Element::kFloat16, 128)>(case_of(DType::kFloat16, 128), {.cluster_log2 = 1});
}

TEST(DeviceSm80AttentionDecodeTest, F32) {
  expect_matches<kF32Dim64>(case_of(DType::kFloat32, 64));
  expect_matches<spec_of(Element::kFloat32, 128)>(case_of(DType::kFloat32, 128, 500), {.cluster_log2 = 1});
}

TEST(DeviceSm80AttentionDecodeTest, Clusters) {
  for (const int log2 : {2, 3}) {
    expect_matches<kBf16Dim64>(case_of(DType::kBFloat16, 64, 1000), {.cluster_log2 = log2});
  }
  // More blocks than chunks of the output, and more than tiles of keys.
  Case c = case_of(DType::kFloat32, 16, 20);
  c.num_q_heads = 2;
  expect_matches<spec_of(Element::kFloat32, 16)>(c, {.cluster_log2 = 3});
}

TEST(DeviceSm80AttentionDecodeTest, Pieces) {
  for (const int num_pieces : {2, 3, 8}) {
    expect_matches<kBf16Dim64>(case_of(DType::kBFloat16, 64, 700), {.num_pieces = num_pieces});
  }
  Case c = case_of(DType::kFloat32, 60, 333);
  c.has_sinks = true;
  expect_matches<kF32Dim64>(c, {.num_pieces = 2, .cluster_log2 = 1});
}

TEST(DeviceSm80AttentionDecodeTest, GroupsOfManyHeads) {
  Case c = case_of(DType::kBFloat16, 64, 150);
  c.num_q_heads = 24;
  c.has_alibi = true;
  expect_matches<spec_of(Element::kBFloat16, 64, 16)>(c, {.cluster_log2 = 1});
  c.num_q_heads = 42;  // two blocks for each group, the second of five heads
  expect_matches<spec_of(Element::kBFloat16, 64, 16)>(c, {.num_pieces = 2});
  c.dtype = DType::kFloat32;
  expect_matches<spec_of(Element::kFloat32, 64, 16)>(c);
}

TEST(DeviceSm80AttentionDecodeTest, GroupsOfOneHead) {
  Case c = case_of(DType::kBFloat16, 64, 150);
  c.num_kv_heads = 6;
  expect_matches<kBf16Dim64>(c);
}

TEST(DeviceSm80AttentionDecodeTest, LargeHeadDims) {
  expect_matches<spec_of(Element::kBFloat16, 256)>(case_of(DType::kBFloat16, 256), {.cluster_log2 = 1});
  expect_matches<spec_of(Element::kFloat32, 256)>(case_of(DType::kFloat32, 256));
  expect_matches<spec_of(Element::kBFloat16, 192, 16)>(case_of(DType::kBFloat16, 192), {.num_pieces = 2});
}

TEST(DeviceSm80AttentionDecodeTest, DifferentHeadDims) {
  constexpr Spec kWideValues = {.element = Element::kBFloat16, .head_dim_qk = 16, .head_dim_v = 256};
  Case c = case_of(DType::kBFloat16, 16);
  c.head_dim_v = 248;
  expect_matches<kWideValues>(c, {.cluster_log2 = 2});
  constexpr Spec kWideKeys = {.element = Element::kFloat32, .head_dim_qk = 80, .head_dim_v = 48};
  c = case_of(DType::kFloat32, 72);
  c.head_dim_v = 40;
  expect_matches<kWideKeys>(c);
}

TEST(DeviceSm80AttentionDecodeTest, UnalignedRows) {
  constexpr Spec kSpec = {.element = Element::kFloat32, .head_dim_qk = 64, .head_dim_v = 64, .is_aligned = false};
  expect_matches<kSpec>(case_of(DType::kFloat32, 59), {.cluster_log2 = 1});
  Case c = case_of(DType::kFloat32, 61);
  c.layout = Layout::kSpacedDims;
  c.head_dim_v = 50;
  expect_matches<kSpec>(c, {.num_pieces = 2});
  constexpr Spec kTiny = {.element = Element::kBFloat16, .head_dim_qk = 16, .head_dim_v = 16, .is_aligned = false};
  expect_matches<kTiny>(case_of(DType::kBFloat16, 1));
}

TEST(DeviceSm80AttentionDecodeTest, Layouts) {
  Case c = case_of(DType::kBFloat16, 64);
  for (const Layout layout : {Layout::kHeadsFirst, Layout::kReversedTokens, Layout::kZeroTokenStride}) {
    c.layout = layout;
    expect_matches<kBf16Dim64>(c);
  }
}

TEST(DeviceSm80AttentionDecodeTest, LeadingAxes) {
  Case c = case_of(DType::kBFloat16, 64, 100);
  c.batch = 3;
  c.has_sinks = true;
  expect_matches<kBf16Dim64>(c, {.cluster_log2 = 1});
  expect_matches<kBf16Dim64>(c, {.num_pieces = 2, .shares_the_cache = true});
}

// Keys before the window hold no numbers, and are not read.
void spoil_first_keys(Tensor& /*q*/, Tensor& k, Tensor& v) {
  constexpr int64_t kFirstSeen = 300 - 1 - 77;
  for (Tensor* tensor : {&k, &v}) {
    const int64_t row = tensor->view.shape[2] * tensor->view.shape[3];
    for (int64_t i = 0; i < kFirstSeen * row; ++i) tensor->set(i, kNaN);
  }
}

TEST(DeviceSm80AttentionDecodeTest, Windows) {
  Case c = case_of(DType::kFloat32, 64);
  c.options.window_left = 77;
  c.edit = spoil_first_keys;
  expect_matches<kF32Dim64>(c, {.cluster_log2 = 1});
  c.edit = nullptr;
  c.options.window_left = 0;
  expect_matches<kF32Dim64>(c);
  c.options.window_left = 1000;
  expect_matches<kF32Dim64>(c);
}

TEST(DeviceSm80AttentionDecodeTest, SoftcapAlibiAndSinks) {
  Case c = case_of(DType::kFloat32, 64);
  c.options.softcap = 2.0;
  c.has_alibi = true;
  c.has_sinks = true;
  expect_matches<kF32Dim64>(c, {.cluster_log2 = 2});
  c.dtype = DType::kBFloat16;
  c.options.window_left = 200;
  expect_matches<kBf16Dim64>(c, {.num_pieces = 2});
}

TEST(DeviceSm80AttentionDecodeTest, RotaryEmbeddings) {
  constexpr Spec kBf16 = {.element = Element::kBFloat16, .head_dim_qk = 64, .head_dim_v = 64, .has_rope = true};
  Case c = case_of(DType::kBFloat16, 64);
  expect_matches<kBf16>(c, {.cluster_log2 = 1, .rope_theta = 1e4});
  c.options.window_left = 100;
  expect_matches<kBf16>(c, {.num_pieces = 2, .rope_theta = 300.0});
  constexpr Spec kUnaligned = {
      .element = Element::kFloat16, .head_dim_qk = 48, .head_dim_v = 64, .is_aligned = false, .has_rope = true};
  c = case_of(DType::kFloat16, 38);
  c.head_dim_v = 64;
  expect_matches<kUnaligned>(c, {.rope_theta = 1e4});
}

// Thousands, of either sign, and scales that are 0 or negative.
TEST(DeviceSm80AttentionDecodeTest, ExtremeScores) {
  Case c = case_of(DType::kFloat32, 64);
  c.gain = 2500.0;
  expect_matches<kF32Dim64>(c, {.cluster_log2 = 1});
  c.gain = 1.0;
  c.options.softmax_scale = -3.0;
  expect_matches<kF32Dim64>(c, {.num_pieces = 2});
  c.options.softmax_scale = 0.0;
  expect_matches<kF32Dim64>(c);
}

// Values that are not finite reach the output as they do by the definition.
void spoil_one_value(Tensor& /*q*/, Tensor& /*k*/, Tensor& v) {
  v.set(v.count() / 2, kInfinity);
  v.set(v.count() / 2 + 1, kNaN);
}

TEST(DeviceSm80AttentionDecodeTest, ValuesThatAreNotFinite) {
  Case c = case_of(DType::kBFloat16, 64);
  c.edit = spoil_one_value;
  expect_matches<kBf16Dim64>(c, {.cluster_log2 = 1});
}

// All weight on one key: its values, bit by bit.
TEST(DeviceSm80AttentionDecodeTest, OneKeyIsCopied) {
  const Case c = case_of(DType::kFloat32, 64, 1);
  const Inputs in = make_inputs(c);
  const Tensor out(c.dtype, {c.batch, 1, c.num_q_heads, c.head_dim_v});
  const Tensor lse(DType::kFloat32, {c.batch, c.num_q_heads, 1});
  Params params = make_params(c, kF32Dim64, {.cluster_log2 = 1});
  set_operands(params, in, out, lse);
  run_kernels<kF32Dim64>(params, c);
  const int64_t group = c.num_q_heads / c.num_kv_heads;
  for (int64_t i = 0; i < out.count(); ++i) {
    ASSERT_EQ(out.get(i), in.v.get(i / c.head_dim_v / group * c.head_dim_v + i % c.head_dim_v));
  }
}

TEST(DeviceSm80AttentionDecodeTest, NoKeys) {
  Case c = case_of(DType::kFloat32, 64, 0);
  expect_matches<kF32Dim64>(c);
  c.has_sinks = true;
  expect_matches<kF32Dim64>(c);
}

}  // namespace
}  // namespace heed
