// Batches of variable lengths on the CPU: every instruction set against the oracle, sequence by sequence, with memory
// that belongs to no sequence full of NaN, and with index arrays that hold anything at all.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention_oracle.h"
#include "cpu/simd.h"
#include "heed/heed.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary
using Ints = std::vector<int32_t>;

// `of` holds what all sequences share; q_len and kv_len of it are all rows of q and of k.
struct Varlen {
  Case of;
  Ints cu_seqlens_q, cu_seqlens_k{}, seqused_k{};  // the last two, if empty: absent
  bool is_poisoned = true;
};

struct Sequence {
  int64_t q_begin, q_len, kv_begin, kv_len, first_query;  // queries before the first are an earlier sequence's
};

// What SEMANTICS the header promises: entries clamped one by one, overlapping rows to the first sequence that has them.
std::vector<Sequence> sequences_of(const Varlen& c) {
  const auto clamp = [](int64_t x, int64_t low, int64_t high) { return std::min(std::max(x, low), high); };
  const Ints& cu_k = c.cu_seqlens_k.empty() ? c.cu_seqlens_q : c.cu_seqlens_k;
  std::vector<Sequence> sequences;
  int64_t next = 0;
  for (size_t b = 0; b + 1 < c.cu_seqlens_q.size(); ++b) {
    Sequence s{};
    s.q_begin = clamp(c.cu_seqlens_q[b], 0, c.of.q_len);
    s.q_len = clamp(c.cu_seqlens_q[b + 1], s.q_begin, c.of.q_len) - s.q_begin;
    s.kv_begin = clamp(cu_k[b], 0, c.of.kv_len);
    s.kv_len = clamp(cu_k[b + 1], s.kv_begin, c.of.kv_len) - s.kv_begin;
    if (!c.seqused_k.empty()) s.kv_len = clamp(c.seqused_k[b], 0, s.kv_len);
    s.first_query = clamp(next - s.q_begin, 0, s.q_len);
    next = std::max(next, s.q_begin + s.q_len);
    sequences.push_back(s);
  }
  return sequences;
}

struct VarlenInputs {
  Tensor q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k;
  Inputs shared;  // sinks and slopes
};

Tensor int_tensor(const Ints& values) {
  if (values.empty()) return {};
  Tensor tensor(DType::kInt32, {static_cast<int64_t>(values.size())});
  for (size_t i = 0; i < values.size(); ++i) tensor.set(static_cast<int64_t>(i), values[i]);
  return tensor;
}

VarlenInputs make_varlen_inputs(const Varlen& c) {
  VarlenInputs in;
  in.shared = make_inputs(c.of);
  const auto drop_batch = [](Tensor& tensor, std::vector<bool> used) {
    Tensor packed = std::move(tensor);
    std::copy(packed.view.shape.begin() + 1, packed.view.shape.end(), packed.view.shape.begin());
    std::copy(packed.view.strides.begin() + 1, packed.view.strides.end(), packed.view.strides.begin());
    packed.view.rank -= 1;
    const int64_t row = packed.view.shape[1] * packed.view.shape[2];
    for (int64_t i = 0; i < packed.count(); ++i) {
      if (!used[static_cast<size_t>(i / row)]) packed.set(i, kNaN);
    }
    return packed;
  };
  std::vector<bool> used_q(static_cast<size_t>(c.of.q_len), !c.is_poisoned);
  std::vector<bool> used_k(static_cast<size_t>(c.of.kv_len), !c.is_poisoned);
  for (const Sequence& s : sequences_of(c)) {
    std::fill_n(used_q.begin() + s.q_begin, s.q_len, true);
    std::fill_n(used_k.begin() + s.kv_begin, s.kv_len, true);
  }
  in.q = drop_batch(in.shared.q, used_q);
  in.k = drop_batch(in.shared.k, used_k);
  in.v = drop_batch(in.shared.v, used_k);
  in.cu_seqlens_q = int_tensor(c.cu_seqlens_q);
  in.cu_seqlens_k = int_tensor(c.cu_seqlens_k);
  in.seqused_k = int_tensor(c.seqused_k);
  return in;
}

AttentionForwardArgs make_varlen_args(VarlenInputs& in, Tensor& out, Tensor& lse) {
  AttentionForwardArgs args;
  args.q = in.q.view, args.k = in.k.view, args.v = in.v.view, args.out = out.view, args.lse = lse.view;
  args.sinks = in.shared.sinks.view, args.alibi_slopes = in.shared.slopes.view;
  args.cu_seqlens_q = in.cu_seqlens_q.view;
  args.cu_seqlens_k = in.cu_seqlens_k.view;
  args.seqused_k = in.seqused_k.view;
  return args;
}

// Each sequence by itself, put together.
template <class Real>
Expected varlen_attention(const Varlen& c, const VarlenInputs& in) {
  Expected result;
  const int64_t heads = c.of.num_q_heads;
  result.out.assign(static_cast<size_t>(c.of.q_len * heads * c.of.head_dim_v), 0.0);
  result.lse.assign(static_cast<size_t>(c.of.q_len * heads), -kInfinity);
  const auto rows_of = [](const Tensor& packed, int64_t begin, int64_t len) {
    const int64_t row = packed.view.shape[1] * packed.view.shape[2];
    Tensor part(packed.view.dtype, {1, len, packed.view.shape[1], packed.view.shape[2]});
    for (int64_t i = 0; i < len * row; ++i) part.set(i, packed.get(begin * row + i));
    return part;
  };
  for (const Sequence& s : sequences_of(c)) {
    Case one = c.of;
    one.q_len = s.q_len;
    one.kv_len = s.kv_len;
    Inputs part;
    part.sinks = in.shared.sinks;
    part.slopes = in.shared.slopes;
    part.q = rows_of(in.q, s.q_begin, s.q_len);
    part.k = rows_of(in.k, s.kv_begin, s.kv_len);
    part.v = rows_of(in.v, s.kv_begin, s.kv_len);
    const Expected expected = attention<Real>(one, part);
    const int64_t row = heads * c.of.head_dim_v;
    for (int64_t i = s.first_query; i < s.q_len; ++i) {
      std::copy_n(expected.out.begin() + i * row, row, result.out.begin() + (s.q_begin + i) * row);
      for (int64_t h = 0; h < heads; ++h) {
        result.lse[h * c.of.q_len + s.q_begin + i] = expected.lse[h * s.q_len + i];
      }
    }
  }
  return result;
}

struct Prepared {
  VarlenInputs in;
  Expected oracle, naive;
};

void check(const Varlen& c) {
  SCOPED_TRACE(c.of.name);
  const Prepared& made = once_for_all_targets(c.of.name, [&] {
    Prepared fresh{make_varlen_inputs(c), {}, {}};
    fresh.oracle = varlen_attention<double>(c, fresh.in);
    fresh.naive = varlen_attention<float>(c, fresh.in);
    return fresh;
  });
  VarlenInputs in = made.in;
  Tensor out(c.of.dtype, {c.of.q_len, c.of.num_q_heads, c.of.head_dim_v});
  Tensor lse(DType::kFloat32, {c.of.num_q_heads, c.of.q_len});
  attention_forward(make_varlen_args(in, out, lse), c.of.options);
  const int64_t row_size = c.of.head_dim_v < 8 ? std::max<int64_t>(out.count(), 1) : c.of.head_dim_v;
  expect_close(out, made.naive.out, made.oracle.out, c.of.dtype, row_size, "out");
  expect_close(lse, made.naive.lse, made.oracle.lse, DType::kFloat32, std::max<int64_t>(c.of.q_len, 1), "lse");
}

class EveryTarget : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { cpu::force_target(GetParam()); }
  void TearDown() override { cpu::force_target(""); }
};

INSTANTIATE_TEST_SUITE_P(, EveryTarget, testing::ValuesIn(cpu_targets()),
                         [](const testing::TestParamInfo<std::string>& info) { return info.param; });

// Sequences of 0 to 100 queries, with rows before the first and after the last.
constexpr int64_t kRows = 260;
constexpr int64_t kKeys = 420;
constexpr int64_t kHeads = 4;
constexpr int64_t kDimV = 72;
Varlen mixed(const std::string& name) {
  Varlen c;
  c.of = {.name = name,
          .q_len = kRows,
          .kv_len = kKeys,
          .num_q_heads = kHeads,
          .num_kv_heads = 2,
          .head_dim_qk = 24,
          .head_dim_v = kDimV};
  c.cu_seqlens_q = {7, 7, 57, 58, 158, 158, 201, 250, 250};
  c.cu_seqlens_k = {3, 20, 73, 73, 230, 231, 290, 400, 400};
  c.seqused_k = {17, 50, 0, 140, 1, 1000, 90, 0};
  return c;
}

TEST_P(EveryTarget, EveryVariant) {
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int bits = 0; bits < 32; bits += dtype == DType::kFloat32 ? 1 : 3) {  // storage changes nothing in the masks
      Varlen c = mixed("variants " + std::to_string(bits));
      c.of.dtype = dtype;
      c.of.has_sinks = (bits & 1) != 0;
      c.of.has_alibi = (bits & 2) != 0;
      if ((bits & 4) != 0) c.of.options.softcap = 5.0;
      c.of.options.is_causal = (bits & 8) != 0;
      if ((bits & 16) != 0) c.of.options.causal_align = CausalAlign::kTopLeft;
      if (bits % 3 != 0) c.seqused_k = {};
      check(c);
    }
  }
}

TEST_P(EveryTarget, Windows) {
  for (auto [left, right] : {std::pair<int64_t, int64_t>{0, 0}, {30, 0}, {-1, 7}, {30, -1}, {140, 3}, {INT64_MAX, 5}}) {
    for (CausalAlign align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
      Varlen c = mixed("window " + std::to_string(left) + "," + std::to_string(right));
      c.of.options.causal_align = align;
      c.of.options.window_left = left;
      c.of.options.window_right = right;
      c.of.has_sinks = left == 30;
      check(c);
    }
  }
}

TEST_P(EveryTarget, ZeroLengthsAnywhere) {
  for (bool has_sinks : {false, true}) {
    for (const auto& [q, k] : std::vector<std::pair<Ints, Ints>>{{{0, 76, 110, 256}, {0, 1, 2, 3}},
                                                                 {{0, 0, 0, 0}, {0, 0, 0, 0}},
                                                                 {{256, 256}, {3, 3}},
                                                                 {{0, 256}, {1, 1}},
                                                                 {{0, 0, 256, 256}, {0, 2, 2, 3}},
                                                                 {{10, 10, 20, 20, 20, 256, 256}, {}},
                                                                 {{0}, {}},
                                                                 {{0}, {0}}}) {
      Varlen c;
      c.of = {.name = "zero lengths",
              .q_len = 256,
              .kv_len = k.empty() ? 256 : 3,
              .num_q_heads = 2,
              .num_kv_heads = 1,
              .head_dim_qk = 16,
              .head_dim_v = 8,
              .has_sinks = has_sinks};
      c.cu_seqlens_q = q;
      c.cu_seqlens_k = k;
      c.of.options.is_causal = true;
      check(c);
      c.of.options.is_causal = false;
      check(c);
    }
  }
  for (auto [q_len, kv_len] : {std::pair{0, 5}, {5, 0}, {0, 0}}) {
    Varlen c;
    c.of = {.name = "no rows", .q_len = q_len, .kv_len = kv_len};
    c.cu_seqlens_q = {0, q_len, q_len};
    check(c);
  }
}

TEST_P(EveryTarget, HeadDimsGroupsAndLayouts) {
  for (auto [d, dv] : {std::pair{1, 1}, {59, 17}, {64, 256}, {256, 64}, {192, 128}}) {
    for (int64_t group : {1, 3, 8}) {
      for (Layout layout : {Layout::kContiguous, Layout::kHeadsFirst, Layout::kReversedTokens, Layout::kSpacedDims}) {
        Varlen c = mixed("d " + std::to_string(d) + " group " + std::to_string(group));
        c.of.q_len = 60;
        c.of.kv_len = 240;
        c.cu_seqlens_q = {0, 20, 21, 60};
        c.cu_seqlens_k = {0, 21, 90, 240};
        c.seqused_k = {};
        c.of.head_dim_qk = d, c.of.head_dim_v = dv;
        c.of.num_q_heads = 2 * group;
        c.of.layout = layout;
        c.of.options.is_causal = true;
        check(c);
      }
    }
  }
}

// NaN and infinities beyond a sequence's keys stay out; those inside follow IEEE.
TEST_P(EveryTarget, NaNInsideStaysInItsSequence) {
  for (double special : {kNaN, kInfinity, -kInfinity}) {
    Varlen c = mixed("special value in V");
    c.seqused_k = {};
    c.of.options.is_causal = true;
    c.of.edit = [&](Tensor&, Tensor&, Tensor& v) {
      for (int64_t j : {60, 200, 390}) v.set(j * 2 * kDimV + 5, special);
    };
    check(c);
  }
}

// One sequence of a batch is bitwise what the dense call gives for it alone.
TEST_P(EveryTarget, ASequenceIsWhatItIsAlone) {
  for (bool is_causal : {false, true}) {
    Varlen c = mixed("alone");
    c.of.options.is_causal = is_causal;
    c.of.has_sinks = true;
    VarlenInputs in = make_varlen_inputs(c);
    Tensor out(c.of.dtype, {kRows, kHeads, kDimV});
    Tensor lse(DType::kFloat32, {kHeads, kRows});
    attention_forward(make_varlen_args(in, out, lse), c.of.options);
    for (const Sequence& s : sequences_of(c)) {
      const auto part_of = [](TensorView view, int64_t begin, int64_t len) {
        view.data = static_cast<float*>(view.data) + begin * view.strides[0];
        view.shape = {1, len, view.shape[1], view.shape[2]};
        view.strides = {0, view.strides[0], view.strides[1], view.strides[2]};
        view.rank = 4;
        return view;
      };
      Tensor part(c.of.dtype, {1, s.q_len, kHeads, kDimV});
      AttentionForwardArgs args;
      args.q = part_of(in.q.view, s.q_begin, s.q_len);
      args.k = part_of(in.k.view, s.kv_begin, s.kv_len);
      args.v = part_of(in.v.view, s.kv_begin, s.kv_len);
      args.sinks = in.shared.sinks.view;
      args.out = part.view;
      attention_forward(args, c.of.options);
      for (int64_t i = 0; i < part.count(); ++i) {
        ASSERT_EQ(part.get(i), out.get(s.q_begin * kHeads * kDimV + i)) << "row " << s.q_begin + i / kHeads / kDimV;
      }
    }
  }
}

// Whatever the index arrays hold: each row gets what the clamped entries say, and nothing outside the memory is
// touched. (Every tensor is as large as its elements, so that an address sanitizer sees the first byte too far.)
TEST(CpuVarlen, GarbageIndices) {
  std::mt19937 random(2024);
  const auto pick = [&](int64_t total) -> int32_t {
    constexpr int32_t kWild[] = {INT32_MIN, INT32_MIN + 1, -1, INT32_MAX, INT32_MAX - 1, 1 << 30, -(1 << 30)};
    if (random() % 4 == 0) return kWild[random() % std::size(kWild)];
    return static_cast<int32_t>(random() % static_cast<uint32_t>(total + 8)) - 4;
  };
  for (int round = 0; round < 300; ++round) {
    Varlen c;
    c.is_poisoned = false;
    c.of = {.name = "round " + std::to_string(round),
            .q_len = static_cast<int64_t>(random() % 120),
            .kv_len = static_cast<int64_t>(random() % 200),
            .num_q_heads = 2,
            .num_kv_heads = random() % 2 == 0 ? 1 : 2,
            .head_dim_qk = 9,
            .head_dim_v = kDimV,
            .has_sinks = random() % 2 == 0,
            .has_alibi = random() % 2 == 0};
    c.of.options.is_causal = random() % 2 == 0;
    if (random() % 2 == 0) c.of.options.window_left = static_cast<int64_t>(random() % 40);
    const size_t batch = random() % 7;
    for (size_t b = 0; b <= batch; ++b) c.cu_seqlens_q.push_back(pick(c.of.q_len));
    if (random() % 3 != 0) {
      for (size_t b = 0; b <= batch; ++b) c.cu_seqlens_k.push_back(pick(c.of.kv_len));
    }
    if (batch > 0 && random() % 2 == 0) {
      for (size_t b = 0; b < batch; ++b) c.seqused_k.push_back(pick(c.of.kv_len));
    }
    SCOPED_TRACE(c.of.name);
    VarlenInputs in = make_varlen_inputs(c);
    Tensor out(c.of.dtype, {c.of.q_len, 2, kDimV});
    Tensor lse(DType::kFloat32, {2, c.of.q_len});
    AttentionForwardArgs args = make_varlen_args(in, out, lse);
    std::vector<std::unique_ptr<char[]>> exact;
    const auto shrink = [&](TensorView& view, const Tensor& tensor) {
      if (!view.defined()) return;
      const auto bytes = static_cast<size_t>(tensor.count() * info(view.dtype).size_bytes);
      exact.push_back(std::make_unique<char[]>(bytes));
      if (bytes > 0) std::memcpy(exact.back().get(), view.data, bytes);
      view.data = exact.back().get();
    };
    shrink(args.q, in.q), shrink(args.k, in.k), shrink(args.v, in.v), shrink(args.out, out), shrink(args.lse, lse);
    shrink(args.cu_seqlens_q, in.cu_seqlens_q), shrink(args.cu_seqlens_k, in.cu_seqlens_k);
    shrink(args.seqused_k, in.seqused_k);
    attention_forward(args, c.of.options);
    out.view.data = args.out.data, lse.view.data = args.lse.data;
    const Expected oracle = varlen_attention<double>(c, in);
    const Expected naive = varlen_attention<float>(c, in);
    expect_close(out, naive.out, oracle.out, c.of.dtype, kDimV, "out");
    expect_close(lse, naive.lse, oracle.lse, DType::kFloat32, std::max<int64_t>(c.of.q_len, 1), "lse");
  }
}

TEST(CpuVarlen, LeadingAxesBroadcast) {
  // q [3, 1, ..], k [1, 2, ..], v [1, 1, ..], cu_seqlens_q [3, 1, ..], cu_seqlens_k [1, 2, ..], seqused_k [1, 1, ..]
  const Case base{.name = "leading", .q_len = 90, .kv_len = 100, .num_q_heads = 2, .head_dim_qk = 16, .head_dim_v = 8};
  const Ints cu_q[3] = {{0, 30, 90}, {5, 5, 70}, {0, 90, 90}};
  const Ints cu_k[2] = {{0, 60, 100}, {20, 30, 90}};
  const Ints used = {40, 1000};
  Tensor q(base.dtype, {3, 1, 90, 2, 16});
  Tensor k(base.dtype, {1, 2, 100, 1, 16});
  Tensor v(base.dtype, {1, 1, 100, 1, 8});
  Tensor cu_q_all(DType::kInt32, {3, 1, 3});
  Tensor cu_k_all(DType::kInt32, {1, 2, 3});
  Tensor used_all(DType::kInt32, {1, 1, 2});
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  for (Tensor* tensor : {&q, &k, &v}) {
    for (int64_t i = 0; i < tensor->count(); ++i) tensor->set(i, normal(random));
  }
  for (int64_t i = 0; i < 9; ++i) cu_q_all.set(i, cu_q[i / 3][i % 3]);
  for (int64_t i = 0; i < 6; ++i) cu_k_all.set(i, cu_k[i / 3][i % 3]);
  for (int64_t i = 0; i < 2; ++i) used_all.set(i, used[i]);
  Tensor out(base.dtype, {3, 2, 90, 2, 8});
  Tensor lse(DType::kFloat32, {3, 2, 2, 90});
  AttentionForwardArgs args;
  args.q = q.view, args.k = k.view, args.v = v.view, args.out = out.view, args.lse = lse.view;
  args.cu_seqlens_q = cu_q_all.view, args.cu_seqlens_k = cu_k_all.view, args.seqused_k = used_all.view;
  attention_forward(args);
  for (int64_t a = 0; a < 3; ++a) {
    for (int64_t b = 0; b < 2; ++b) {
      Varlen c{.of = base, .cu_seqlens_q = cu_q[a], .cu_seqlens_k = cu_k[b], .seqused_k = used, .is_poisoned = false};
      VarlenInputs in = make_varlen_inputs(c);
      for (int64_t i = 0; i < in.q.count(); ++i) in.q.set(i, q.get(a * in.q.count() + i));
      for (int64_t i = 0; i < in.k.count(); ++i) in.k.set(i, k.get(b * in.k.count() + i));
      for (int64_t i = 0; i < in.v.count(); ++i) in.v.set(i, v.get(i));
      Tensor part(base.dtype, {90, 2, 8});
      Tensor part_lse(DType::kFloat32, {2, 90});
      for (int64_t i = 0; i < part.count(); ++i) part.set(i, out.get((a * 2 + b) * part.count() + i));
      for (int64_t i = 0; i < part_lse.count(); ++i) part_lse.set(i, lse.get((a * 2 + b) * part_lse.count() + i));
      const Expected oracle = varlen_attention<double>(c, in);
      const Expected naive = varlen_attention<float>(c, in);
      expect_close(part, naive.out, oracle.out, base.dtype, 8, "out");
      expect_close(part_lse, naive.lse, oracle.lse, DType::kFloat32, 90, "lse");
    }
  }
}

TEST(CpuVarlen, ViewsAreChecked) {
  Varlen c = mixed("checked");
  VarlenInputs in = make_varlen_inputs(c);
  Tensor out(c.of.dtype, {kRows, kHeads, kDimV});
  Tensor lse(DType::kFloat32, {kHeads, kRows});
  const AttentionForwardArgs good = make_varlen_args(in, out, lse);
  AttentionForwardArgs args = good;
  args.cu_seqlens_k.shape[0] = 8;
  EXPECT_THROW(attention_forward(args), ValueError);
  args = good;
  args.seqused_k.dtype = DType::kFloat32;
  EXPECT_THROW(attention_forward(args), TypeError);
  args = good;
  args.cu_seqlens_q.data = nullptr;
  EXPECT_THROW(attention_forward(args), ValueError);
  args = good;
  args.cu_seqlens_q.device = {DeviceType::kCuda, 0};
  EXPECT_THROW(attention_forward(args), ValueError);
  args = good;
  args.lse.shape = {kRows, kHeads};
  EXPECT_THROW(attention_forward(args), ValueError);
}

// ---------------------------------------------------------------------------------------------------------------------
// The same bits for any number of threads. The number is fixed when a process starts, so each has its own.

// Where V holds an infinity, masked panels that see it take another path; which panels share an item with them depends
// on the number of threads. Seen from the second block of keys on: in a first one both paths round alike.
Varlen for_threads(bool is_causal) {
  Varlen c = mixed("threads");
  c.cu_seqlens_q = {0, 20, kRows};
  c.cu_seqlens_k = {0, 20, kKeys};
  c.seqused_k = {};
  c.of.num_q_heads = 6;
  c.of.options.is_causal = is_causal;
  c.of.edit = [](Tensor&, Tensor&, Tensor& v) { v.set(270 * 2 * kDimV + 7, kInfinity); };
  return c;
}

TEST(CpuVarlenChild, DISABLED_PrintsItsResult) {
  uint64_t hash = 14695981039346656037U;  // FNV-1a
  for (bool is_causal : {false, true}) {
    const Varlen c = for_threads(is_causal);
    VarlenInputs in = make_varlen_inputs(c);
    Tensor out(c.of.dtype, {kRows, c.of.num_q_heads, kDimV});
    Tensor lse(DType::kFloat32, {c.of.num_q_heads, kRows});
    attention_forward(make_varlen_args(in, out, lse), c.of.options);
    for (const Tensor* tensor : {&out, &lse}) {
      for (char byte : tensor->memory) hash = (hash ^ static_cast<uint8_t>(byte)) * 1099511628211U;
    }
  }
  std::printf("threads %d hash %016llx\n", num_threads(), static_cast<unsigned long long>(hash));
}

TEST(CpuVarlen, TheSameBitsForAnyNumberOfThreads) {
  std::vector<std::string> hashes;
  char self[4096];
  const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
  ASSERT_GT(length, 0);
  for (int threads : {1, 2, 3, 7, 16, 64}) {
    const std::string command = "HEED_NUM_THREADS=" + std::to_string(threads) + " '" +
                                std::string(self, static_cast<size_t>(length)) +
                                "' --gtest_also_run_disabled_tests --gtest_filter=CpuVarlenChild.*";
    FILE* child = popen(command.c_str(), "r");
    ASSERT_NE(child, nullptr);
    std::string text;
    for (char buffer[512]; fgets(buffer, sizeof buffer, child) != nullptr;) text += buffer;
    ASSERT_EQ(pclose(child), 0) << text;
    const std::string start = "threads " + std::to_string(threads) + " hash ";
    const size_t at = text.find(start);
    ASSERT_NE(at, std::string::npos) << text;
    hashes.push_back(text.substr(at + start.size(), 16));
  }
  for (const std::string& hash : hashes) EXPECT_EQ(hash, hashes.front());
}

}  // namespace
}  // namespace heed
