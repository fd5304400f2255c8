// The CPU kernel of attention of one query: every instruction set of this build against float64.
#include "cpu_small_ops.h"
#include "guarded.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

struct Case {
  std::string name{};
  DType dtype = DType::kFloat32;
  std::vector<int64_t> lead{}, q_lead{}, kv_lead{}, slope_lead{};  // the first: full sizes
  int64_t kv_len = 1, num_q_heads = 1, num_kv_heads = 1, head_dim_qk = 8, head_dim_v = 8;
  SingleDecodeOptions options{};
  bool has_sinks = false, has_alibi = false;
  Layout layout = Layout::kContiguous;
  double gain = 1.0;
};

struct Operands {
  Tensor q, k, v, sinks, slopes;
};

std::vector<int64_t> kv_shape(const Case& c, int64_t head_dim) {
  if (c.options.kv_layout == KvLayout::kNHD) return shape_of(c.kv_lead, {c.kv_len, c.num_kv_heads, head_dim});
  return shape_of(c.kv_lead, {c.num_kv_heads, c.kv_len, head_dim});
}

Operands make_operands(const Case& c) {
  Operands in;
  in.q = random_tensor(c.dtype, shape_of(c.q_lead, {c.num_q_heads, c.head_dim_qk}), 1, c.gain,
                       c.layout == Layout::kSpacedDims ? c.layout : Layout::kContiguous);
  in.k = random_tensor(c.dtype, kv_shape(c, c.head_dim_qk), 2, 1.0, c.layout);
  in.v = random_tensor(c.dtype, kv_shape(c, c.head_dim_v), 3, 1.0, c.layout);
  if (c.has_sinks) in.sinks = random_tensor(DType::kFloat32, shape_of(c.slope_lead, {c.num_q_heads}), 4, 3.0);
  if (c.has_alibi) {
    in.slopes = Tensor(DType::kFloat32, shape_of(c.slope_lead, {c.num_q_heads}));
    for (int64_t h = 0; h < in.slopes.count(); ++h) in.slopes.set(h, std::exp2(-(h % 8) - 1.0));
  }
  return in;
}

struct Result {
  Tensor out, lse;
  std::vector<float> workspace;
};

Result run(const Case& c, const Operands& in) {
  Result result;
  result.out = Tensor(c.dtype, shape_of(c.lead, {c.num_q_heads, c.head_dim_v}),
                      c.layout == Layout::kSpacedDims ? c.layout : Layout::kContiguous);
  result.lse = Tensor(DType::kFloat32, shape_of(c.lead, {c.num_q_heads}));
  SingleDecodeArgs args;
  args.q = in.q.view, args.k = in.k.view, args.v = in.v.view, args.sinks = in.sinks.view;
  args.alibi_slopes = in.slopes.view, args.out = result.out.view, args.lse = result.lse.view;
  const int64_t floats = single_decode_workspace_bytes(args, c.options) / 4;
  result.workspace.assign(static_cast<size_t>(floats + 16), std::nanf(""));
  args.workspace = TensorView::contiguous(result.workspace.data(), DType::kFloat32, {floats});
  single_decode(args, c.options);
  for (size_t i = static_cast<size_t>(floats); i < result.workspace.size(); ++i) {
    EXPECT_TRUE(std::isnan(result.workspace[i]));
  }
  return result;
}

template <class Real>
void rotate(const Case& c, Real position, Real* row) {
  const int64_t half = c.head_dim_qk / 2;
  const Real scale = c.options.rope_scale.value_or(1.0);
  const Real theta = c.options.rope_theta.value_or(1e4);
  for (int64_t i = 0; i < half; ++i) {
    const Real angle = position / scale * std::pow(theta, static_cast<Real>(-2 * i) / static_cast<Real>(2 * half));
    const Real a = row[i];
    const Real b = row[i + half];
    row[i] = a * std::cos(angle) - b * std::sin(angle);
    row[i + half] = b * std::cos(angle) + a * std::sin(angle);
  }
}

struct Expected {
  std::vector<double> out, lse;
};

// By the definition; in float, weights and outputs are rounded to the dtype as a plain implementation would.
template <class Real>
Expected expected(const Case& c, const Operands& in) {
  const int64_t d = c.head_dim_qk;
  const int64_t dv = c.head_dim_v;
  const bool has_rope = c.options.rope_scale || c.options.rope_theta;
  const bool is_nhd = c.options.kv_layout == KvLayout::kNHD;
  const Real scale = c.options.sm_scale.value_or(1.0 / std::sqrt(static_cast<double>(d)));
  const Real cap = c.options.softcap;
  const std::vector<Real> qs = values_of<Real>(in.q);
  const std::vector<Real> ks = values_of<Real>(in.k);
  const std::vector<Real> vs = values_of<Real>(in.v);
  const auto last = static_cast<Real>(c.kv_len - 1);
  Expected result;
  for (int64_t flat = 0; flat < product_of(c.lead) * c.num_q_heads; ++flat) {
    const int64_t index = flat / c.num_q_heads;
    const int64_t h = flat % c.num_q_heads;
    const int64_t kv_head = h / (c.num_q_heads / c.num_kv_heads);
    const int64_t kv_index = broadcast_index(c.lead, in.k.view, index);
    const auto kv_row = [&](int64_t j) {
      return kv_index * c.kv_len * c.num_kv_heads + (is_nhd ? j * c.num_kv_heads + kv_head : kv_head * c.kv_len + j);
    };
    const auto of_head = [&](const Tensor& tensor) {
      return static_cast<Real>(tensor.get(broadcast_index(c.lead, tensor.view, index) * c.num_q_heads + h));
    };
    const Real* q_row = qs.data() + (broadcast_index(c.lead, in.q.view, index) * c.num_q_heads + h) * d;
    std::vector<Real> q(q_row, q_row + d);
    if (has_rope) rotate<Real>(c, last, q.data());
    const int64_t window = c.options.window_left;
    const int64_t first = window < 0 || window >= c.kv_len ? 0 : c.kv_len - 1 - window;
    std::vector<Real> scores;
    Real top = -std::numeric_limits<Real>::infinity();
    for (int64_t j = first; j < c.kv_len; ++j) {
      std::vector<Real> k(ks.begin() + kv_row(j) * d, ks.begin() + (kv_row(j) + 1) * d);
      if (has_rope) rotate<Real>(c, static_cast<Real>(j), k.data());
      Real s = 0;
      for (int64_t x = 0; x < d; ++x) s += q[x] * k[x];
      s *= scale;
      if (cap > 0) s = cap * std::tanh(s / cap);
      if (c.has_alibi) s -= of_head(in.slopes) * (last - static_cast<Real>(j));
      scores.push_back(s);
      top = s > top || std::isnan(s) ? s : top;
    }
    if (c.has_sinks) top = std::max(top, of_head(in.sinks));
    const Real shift = std::isinf(top) ? 0 : top;
    Real total = c.has_sinks ? std::exp(of_head(in.sinks) - shift) : 0;
    for (Real& s : scores) total += s = std::exp(s - shift);
    for (Real& s : scores) s = static_cast<Real>(stored<Real>(s / (total == 0 ? 1 : total), c.dtype));
    for (int64_t x = 0; x < dv; ++x) {
      Real sum = 0;
      for (int64_t j = first; j < c.kv_len; ++j) sum += scores[j - first] * vs[kv_row(j) * dv + x];
      result.out.push_back(stored<Real>(sum, c.dtype));
    }
    result.lse.push_back(total == 0 ? -kInfinity : static_cast<double>(shift + std::log(total)));
  }
  return result;
}

class Decode : public EveryTarget {
 protected:
  struct Prepared {
    Operands in;
    Expected oracle, naive;
  };

  static void check(const Case& c) {
    SCOPED_TRACE(c.name);
    const auto& [in, oracle, naive] = once_for_all_targets(c.name, [&] {
      Prepared fresh{make_operands(c), {}, {}};
      fresh.oracle = expected<double>(c, fresh.in);
      fresh.naive = expected<float>(c, fresh.in);
      return fresh;
    });
    const Result result = run(c, in);
    expect_close(result.out, naive.out, oracle.out, c.dtype, row_size_of(c.head_dim_v, oracle.out), c.name + " out");
    expect_close(result.lse, naive.lse, oracle.lse, DType::kFloat32, static_cast<int64_t>(oracle.lse.size()),
                 c.name + " lse");
  }
};

INSTANTIATE_TEST_SUITE_P(, Decode, testing::ValuesIn(cpu_targets()), target_name);

TEST_P(Decode, LengthsHeadDimsAndDtypes) {
  struct Size {
    int64_t kv_len, d, dv;
  };
  for (DType dtype : kFloats) {
    for (Size size : {Size{1, 1, 1},
                      {5, 3, 7},
                      {31, 16, 32},
                      {32, 64, 64},
                      {33, 59, 61},
                      {255, 128, 128},
                      {256, 80, 96},
                      {257, 112, 16},
                      {513, 192, 128},
                      {700, 256, 256},
                      {1000, 2, 200}}) {
      for (KvLayout layout : {KvLayout::kNHD, KvLayout::kHND}) {
        Case c{.name = std::string(info(dtype).name) + " S " + std::to_string(size.kv_len) + " D " +
                       std::to_string(size.d) + "," + std::to_string(size.dv),
               .dtype = dtype,
               .kv_len = size.kv_len,
               .num_q_heads = 4,
               .num_kv_heads = 2,
               .head_dim_qk = size.d,
               .head_dim_v = size.dv};
        c.options.kv_layout = layout;
        check(c);
      }
    }
  }
}

TEST_P(Decode, GroupsOfQueryHeads) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (int64_t group : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64}) {
      for (int64_t head_dim : {24, 64}) {
        check({.name = "group " + std::to_string(group),
               .dtype = dtype,
               .kv_len = 77,
               .num_q_heads = 3 * group,
               .num_kv_heads = 3,
               .head_dim_qk = head_dim,
               .head_dim_v = head_dim,
               .has_sinks = true,
               .has_alibi = true});
      }
    }
  }
}

TEST_P(Decode, EveryVariant) {
  for (DType dtype : kFloats) {
    for (int bits = 0; bits < 32; ++bits) {
      for (int64_t kv_len : {150, 600}) {
        Case c{.name = "variants " + std::to_string(bits),
               .dtype = dtype,
               .kv_len = kv_len,
               .num_q_heads = 6,
               .num_kv_heads = 2,
               .head_dim_qk = 32,
               .head_dim_v = 40};
        if ((bits & 1) != 0) c.options.softcap = 2.5;
        if ((bits & 2) != 0) c.options.window_left = kv_len - 20;
        if ((bits & 4) != 0) c.options.rope_theta = 500.0;
        c.has_sinks = (bits & 8) != 0;
        c.has_alibi = (bits & 16) != 0;
        if ((bits & 3) == 3) c.options.sm_scale = -0.3;
        check(c);
      }
    }
  }
}

TEST_P(Decode, Windows) {
  for (int64_t window : {int64_t{0}, int64_t{1}, int64_t{40}, int64_t{299}, int64_t{300}, int64_t{699}, INT64_MAX}) {
    Case c{.name = "window " + std::to_string(window), .kv_len = 700, .num_q_heads = 2, .num_kv_heads = 1};
    c.options.window_left = window;
    check(c);
  }
}

TEST_P(Decode, RotatedKeys) {
  for (DType dtype : kFloats) {
    for (int64_t head_dim : {2, 18, 64, 128, 256}) {
      for (double scale : {0.001, 1.0, 8.0}) {  // the first: positions as far as 300000
        Case c{.name = "rope D " + std::to_string(head_dim) + " scale " + std::to_string(scale),
               .dtype = dtype,
               .kv_len = 300,
               .num_q_heads = 4,
               .num_kv_heads = 2,
               .head_dim_qk = head_dim,
               .head_dim_v = 16};
        c.options.rope_scale = scale;
        check(c);
      }
    }
  }
}

TEST_P(Decode, LayoutsAndBroadcasts) {
  for (DType dtype : kFloats) {
    for (Layout layout :
         {Layout::kHeadsFirst, Layout::kReversedTokens, Layout::kSpacedDims, Layout::kZeroTokenStride}) {
      for (bool has_rope : {false, true}) {
        Case c{.name = "layout " + std::to_string(static_cast<int>(layout)),
               .dtype = dtype,
               .kv_len = 290,
               .num_q_heads = 4,
               .num_kv_heads = 2,
               .head_dim_qk = 48,
               .head_dim_v = 32,
               .layout = layout};
        if (has_rope) c.options.rope_theta = 1e4;
        check(c);
      }
    }
  }
  struct Leads {
    std::vector<int64_t> full, q, kv, slopes;
  };
  for (const Leads& leads : {Leads{{3}, {3}, {3}, {3}},
                             {{3}, {3}, {1}, {1}},
                             {{3}, {1}, {3}, {1}},
                             {{3}, {1}, {1}, {3}},
                             {{2, 3}, {2, 1}, {1, 3}, {2, 3}},
                             {{0}, {0}, {1}, {1}}}) {
    for (int64_t kv_len : {20, 300}) {
      check({.name = "leading axes",
             .lead = leads.full,
             .q_lead = leads.q,
             .kv_lead = leads.kv,
             .slope_lead = leads.slopes,
             .kv_len = kv_len,
             .num_q_heads = 4,
             .num_kv_heads = 2,
             .has_sinks = true,
             .has_alibi = true});
    }
  }
}

TEST_P(Decode, NoKeys) {
  for (bool has_sinks : {false, true}) {
    check({.name = "no keys", .kv_len = 0, .num_q_heads = 3, .num_kv_heads = 3, .has_sinks = has_sinks});
  }
}

TEST_P(Decode, LargeLogitsAndSinks) {
  for (double gain : {1e3, 1e4}) {
    check({.name = "gain " + std::to_string(gain),
           .kv_len = 600,
           .num_q_heads = 4,
           .num_kv_heads = 2,
           .has_sinks = true,
           .gain = gain});
  }
}

// What a window hides is not read, and no value of a tensor is touched outside it.
TEST_P(Decode, HiddenAndForeignMemory) {
  for (DType dtype : kFloats) {
    for (int64_t head_dim : {5, 64}) {
      for (bool has_rope : {false, true}) {
        Case c{.name = "hidden",
               .dtype = dtype,
               .kv_len = 90,
               .num_q_heads = 2,
               .num_kv_heads = 1,
               .head_dim_qk = has_rope ? head_dim + head_dim % 2 : head_dim,
               .head_dim_v = head_dim};
        c.options.window_left = 50;
        if (has_rope) c.options.rope_theta = 1e4;
        Operands in = make_operands(c);
        const Result clean = run(c, in);
        for (int64_t i = 0; i < 39 * c.head_dim_qk; ++i) in.k.set(i, kNaN);
        for (int64_t i = 0; i < 39 * c.head_dim_v; ++i) in.v.set(i, kInfinity);
        const Guarded guards[] = {Guarded(in.q), Guarded(in.k), Guarded(in.v)};
        EXPECT_EQ(run(c, in).out.memory, clean.out.memory);
      }
    }
  }
}

TEST_P(Decode, SpecialValues) {
  Case c{.name = "special", .kv_len = 300, .num_q_heads = 2, .num_kv_heads = 2, .head_dim_qk = 16, .head_dim_v = 16};
  for (double value : {kNaN, kInfinity}) {
    Operands in = make_operands(c);
    in.v.set((270 * 2 + 1) * 16 + 3, value);  // of the second head
    const Result result = run(c, in);
    const Expected oracle = expected<double>(c, in);
    expect_close(result.out, expected<float>(c, in).out, oracle.out, c.dtype, 16, "v");
    Operands keys = make_operands(c);
    keys.k.set((270 * 2 + 1) * 16 + 3, kNaN);
    const Result spoilt = run(c, keys);
    EXPECT_TRUE(std::isnan(spoilt.out.get(16)) && std::isnan(spoilt.lse.get(1)));
    EXPECT_TRUE(std::isfinite(spoilt.out.get(0)) && std::isfinite(spoilt.lse.get(0)));
  }
}

// The same bytes at every call, for any number of leading indices, and beside any others.
TEST(DecodeCalls, BatchesGiveTheBytesOfSingleCalls) {
  Case c{.dtype = DType::kBFloat16,
         .lead = {5},
         .q_lead = {5},
         .kv_lead = {5},
         .kv_len = 3000,
         .num_q_heads = 8,
         .num_kv_heads = 2,
         .head_dim_qk = 64,
         .head_dim_v = 64};
  c.options.batch_invariant = true;
  const Operands in = make_operands(c);
  const Result batch = run(c, in);
  EXPECT_EQ(run(c, in).out.memory, batch.out.memory);
  Case alone = c;
  alone.lead = alone.q_lead = alone.kv_lead = {1};
  for (int64_t i = 0; i < 5; ++i) {
    Operands one = in;
    for (Tensor* tensor : {&one.q, &one.k, &one.v}) {
      tensor->view.data = static_cast<uint16_t*>(tensor->view.data) + i * tensor->count() / 5;
      tensor->view.shape[0] = 1;
    }
    const Result single = run(alone, one);
    EXPECT_EQ(std::memcmp(single.out.view.data, static_cast<uint16_t*>(batch.out.view.data) + i * 8 * 64, 8 * 64 * 2),
              0);
    EXPECT_EQ(std::memcmp(single.lse.view.data, static_cast<float*>(batch.lse.view.data) + i * 8, 8 * 4), 0);
  }
}

TEST(DecodeCalls, ManyKeys) {
  const Case c{.kv_len = 40000, .num_q_heads = 2, .num_kv_heads = 1, .head_dim_qk = 32, .head_dim_v = 32};
  const Operands in = make_operands(c);
  const Result result = run(c, in);
  const Expected oracle = expected<double>(c, in);
  const Expected naive = expected<float>(c, in);
  expect_close(result.out, naive.out, oracle.out, c.dtype, 32, "out");
  expect_close(result.lse, naive.lse, oracle.lse, DType::kFloat32, 2, "lse");
}

}  // namespace
}  // namespace heed
