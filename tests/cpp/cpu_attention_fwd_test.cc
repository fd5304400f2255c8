// The CPU attention forward kernel: every instruction set of this build, forced one after the other, against float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention_oracle.h"
#include "cpu/simd.h"
#include "heed/heed.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

class EveryTarget : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { cpu::force_target(GetParam()); }
  void TearDown() override { cpu::force_target(""); }

  struct Prepared {
    Inputs in;
    Expected oracle, naive;
  };

  static void check(const Case& c) {
    SCOPED_TRACE(c.name);
    const Prepared& made = once_for_all_targets(c.name, [&] {
      Prepared fresh{make_inputs(c), {}, {}};
      fresh.oracle = attention<double>(c, fresh.in);
      fresh.naive = attention<float>(c, fresh.in);
      return fresh;
    });
    Inputs in = made.in;
    const Layout out_layout = c.layout == Layout::kZeroTokenStride ? Layout::kContiguous : c.layout;
    Tensor out(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_v}, out_layout);
    Tensor lse(DType::kFloat32, {c.batch, c.num_q_heads, c.q_len});
    attention_forward(make_args(in, out, lse), c.options);
    // The noise of a row of a few elements is a matter of luck: those are judged together.
    const int64_t row_size = c.head_dim_v < 8 ? std::max<int64_t>(out.count(), 1) : c.head_dim_v;
    expect_close(out, made.naive.out, made.oracle.out, c.dtype, row_size, c.name + " out");
    expect_close(lse, made.naive.lse, made.oracle.lse, DType::kFloat32, std::max<int64_t>(c.q_len, 1), c.name + " lse");
  }
};

INSTANTIATE_TEST_SUITE_P(, EveryTarget, testing::ValuesIn(cpu_targets()),
                         [](const testing::TestParamInfo<std::string>& info) { return info.param; });

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

TEST_P(EveryTarget, LengthsAndHeadDims) {
  struct Size {
    int64_t q_len, kv_len, d, dv;
  };
  const Size sizes[] = {{1, 1, 1, 1},       {1, 257, 32, 32},  {3, 127, 59, 59},    {48, 128, 64, 64},
                        {49, 129, 72, 80},  {97, 300, 16, 96}, {200, 131, 112, 32}, {13, 64, 256, 256},
                        {64, 13, 192, 128}, {7, 259, 5, 250},  {193, 1, 8, 17},     {31, 40, 33, 1}};
  for (DType dtype : kFloats) {
    for (const Size& size : sizes) {
      for (bool is_causal : {false, true}) {
        Case c{.name = std::string(info(dtype).name) + " " + std::to_string(size.q_len) + "x" +
                       std::to_string(size.kv_len) + " d " + std::to_string(size.d) + "," + std::to_string(size.dv),
               .dtype = dtype,
               .batch = 2,
               .q_len = size.q_len,
               .kv_len = size.kv_len,
               .num_q_heads = 2,
               .num_kv_heads = 2,
               .head_dim_qk = size.d,
               .head_dim_v = size.dv};
        c.options.is_causal = is_causal;
        check(c);
      }
    }
  }
}

TEST_P(EveryTarget, GroupsOfQueryHeads) {
  for (int64_t group : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64}) {
    Case c{.name = "group " + std::to_string(group),
           .q_len = 19,
           .kv_len = 35,
           .num_q_heads = group,
           .head_dim_qk = 16,
           .head_dim_v = 24,
           .has_sinks = true,
           .has_alibi = true};
    if (group < 16) c.num_kv_heads = 2, c.num_q_heads *= 2;
    c.options.is_causal = true;
    check(c);
  }
}

TEST_P(EveryTarget, CausalMasksAndWindows) {
  struct Window {
    int64_t left, right;
  };
  for (CausalAlign align : {CausalAlign::kBottomRight, CausalAlign::kTopLeft}) {
    for (bool is_causal : {false, true}) {
      for (Window window : {Window{-1, -1}, {0, 0}, {30, 0}, {30, -1}, {-1, 7}, {140, 3}, {0, 200}, {INT64_MAX, 5}}) {
        for (auto [q_len, kv_len] : {std::pair{150, 290}, {290, 150}, {64, 64}, {1, 200}, {130, 1}}) {
          Case c{.name = "window " + std::to_string(window.left) + "," + std::to_string(window.right) + " causal " +
                         std::to_string(is_causal) + " " + std::to_string(q_len) + "x" + std::to_string(kv_len),
                 .q_len = q_len,
                 .kv_len = kv_len,
                 .num_q_heads = 3,
                 .head_dim_qk = 16,
                 .head_dim_v = 24};
          c.options.is_causal = is_causal;
          c.options.causal_align = align;
          c.options.window_left = window.left;
          c.options.window_right = window.right;
          check(c);
        }
      }
    }
  }
}

TEST_P(EveryTarget, EveryVariant) {
  for (DType dtype : kFloats) {
    for (int bits = 0; bits < 32; ++bits) {
      Case c{.name = "variants " + std::to_string(bits),
             .dtype = dtype,
             .batch = 1,
             .q_len = 170,
             .kv_len = 173,
             .num_q_heads = 4,
             .num_kv_heads = 2,
             .head_dim_qk = 24,
             .head_dim_v = 40};
      c.has_sinks = (bits & 1) != 0;
      c.has_alibi = (bits & 2) != 0;
      c.has_segments = (bits & 4) != 0;
      if ((bits & 8) != 0) c.options.softcap = 5.0;
      c.options.is_causal = (bits & 16) != 0;
      check(c);
    }
  }
}

TEST_P(EveryTarget, AnyStrides) {
  for (DType dtype : kFloats) {
    for (Layout layout :
         {Layout::kHeadsFirst, Layout::kReversedTokens, Layout::kSpacedDims, Layout::kZeroTokenStride}) {
      Case c{.name = "layout " + std::to_string(static_cast<int>(layout)),
             .dtype = dtype,
             .batch = 2,
             .q_len = 50,
             .kv_len = 70,
             .num_q_heads = 4,
             .num_kv_heads = 2,
             .head_dim_qk = 20,
             .head_dim_v = 36,
             .layout = layout};
      c.options.is_causal = true;
      check(c);
    }
  }
}

TEST_P(EveryTarget, ScalesAndCapsFarFromOne) {
  for (double scale : {-0.3, 0.0, 1e-35, 1e-20, 1.0, 40.0}) {
    for (double softcap : {0.0, 1e-3, 50.0, 1e20, 1e35}) {
      Case c{.name = "scale " + std::to_string(scale) + " softcap " + std::to_string(softcap),
             .q_len = 40,
             .kv_len = 150,
             .head_dim_qk = 24,
             .head_dim_v = 32,
             .gain = scale > 1.0 ? 1.0 / scale : 1.0};
      c.options.softmax_scale = scale;
      c.options.softcap = softcap;
      c.options.is_causal = true;
      check(c);
    }
  }
}

TEST_P(EveryTarget, LargeLogits) {
  for (DType dtype : kFloats) {
    for (bool has_window : {false, true}) {
      Case c{.name = "logits of 1e4",
             .dtype = dtype,
             .q_len = 100,
             .kv_len = 300,
             .head_dim_qk = 72,
             .head_dim_v = 64,
             .gain = 400.0};
      c.options.softmax_scale = 1.0;
      if (has_window) c.options.window_left = 20, c.options.window_right = 2;
      // Products that float32 holds exactly: what is left is the softmax, and not whose rounding was luckier.
      c.edit = [](Tensor& q, Tensor& k, Tensor&) {
        for (int64_t i = 0; i < q.count(); ++i) q.set(i, std::nearbyint(q.get(i)));
        for (int64_t i = 0; i < k.count(); ++i) k.set(i, std::nearbyint(8 * k.get(i)) / 8);
      };
      check(c);
      // One sequence far above and one far below the rest.
      c.name = "skewed statistics";
      c.gain = 0.125;
      c.batch = 3;
      c.edit = [&c](Tensor& q, Tensor& k, Tensor&) {
        for (int64_t i = 0; i < q.count() / 3; ++i) q.set(i, 1.0), k.set(i, 1.25);
        for (int64_t i = 2 * q.count() / 3; i < q.count(); ++i) q.set(i, -2.0);
        for (int64_t i = 2 * k.count() / 3; i < k.count(); ++i) k.set(i, 1.0 + 0.125 * static_cast<double>(i % 3));
      };
      check(c);
    }
  }
}

TEST_P(EveryTarget, EmptyRowsAndLengths) {
  for (bool has_sinks : {false, true}) {
    for (auto [q_len, kv_len] : {std::pair{0, 5}, {5, 0}, {0, 0}, {130, 7}}) {
      Case c{.name = "empty",
             .batch = 2,
             .q_len = q_len,
             .kv_len = kv_len,
             .num_q_heads = 2,
             .head_dim_qk = 8,
             .head_dim_v = 8,
             .has_sinks = has_sinks};
      c.options.is_causal = true;
      check(c);
    }
  }
  Case none{.name = "no batch", .batch = 0, .q_len = 3, .kv_len = 3};
  check(none);
}

TEST_P(EveryTarget, MaskedNaNNeverReachesAnOutput) {
  for (bool has_segments : {false, true}) {
    for (double poison : {kNaN, kInfinity, -kInfinity}) {
      Case c{.name = "poisoned tail",
             .q_len = 160,
             .kv_len = 260,
             .num_q_heads = 2,
             .head_dim_qk = 24,
             .head_dim_v = 24,
             .has_segments = has_segments};
      c.options.is_causal = true;
      c.options.window_left = 40;
      c.edit = [&](Tensor&, Tensor& k, Tensor& v) {
        // Keys that some queries of every panel see and others do not.
        for (int64_t j : {0, 57, 150, 201, 259}) {
          for (int64_t x = 0; x < 24; ++x) v.set(j * 24 + x, poison);
          if (std::isnan(poison)) k.set(j * 24 + 3, poison);
        }
      };
      check(c);
    }
  }
}

TEST_P(EveryTarget, VisibleNaNAndInfinityFollowIeee) {
  for (double special : {kNaN, kInfinity, -kInfinity}) {
    for (int which : {0, 1, 2}) {
      Case c{.name = "special in operand " + std::to_string(which),
             .q_len = 60,
             .kv_len = 140,
             .head_dim_qk = 16,
             .head_dim_v = 16};
      c.edit = [&](Tensor& q, Tensor& k, Tensor& v) {
        Tensor& tensor = which == 0 ? q : which == 1 ? k : v;
        tensor.set(16 * 33 + 5, special);
      };
      check(c);
    }
  }
}

TEST_P(EveryTarget, InfiniteSinks) {
  for (double sink : {-kInfinity, kInfinity, kNaN, 300.0, -300.0}) {
    Case c{.name = "sink " + std::to_string(sink), .q_len = 20, .kv_len = 9, .head_dim_qk = 8, .head_dim_v = 8};
    c.options.is_causal = true;
    c.has_sinks = true;
    Inputs in = make_inputs(c);
    in.sinks.set(0, sink);
    Tensor out(c.dtype, {1, 20, 1, 8});
    Tensor lse(DType::kFloat32, {1, 1, 20});
    attention_forward(make_args(in, out, lse), c.options);
    for (int64_t i = 0; i < 20; ++i) {
      const bool is_empty = i < 11;
      if (!std::isfinite(sink) && sink != -kInfinity) {
        EXPECT_TRUE(std::isnan(lse.get(i)));
      } else if (is_empty || sink == 300.0) {
        EXPECT_EQ(lse.get(i), sink);
        EXPECT_NEAR(out.get(i * 8), 0.0, 1e-30);
      } else {
        EXPECT_TRUE(std::isfinite(lse.get(i)));
        EXPECT_GT(std::abs(out.get(i * 8)), 0.0);
      }
    }
  }
}

// Conversions, through a call whose output is its only value: every half, and floats around every rounding boundary.
TEST_P(EveryTarget, ConversionsAreExact) {
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    constexpr int64_t kDim = 256;
    Tensor q(dtype, {256, 1, 1, 1});
    Tensor k(dtype, {256, 1, 1, 1});
    Tensor v(dtype, {256, 1, 1, kDim});
    Tensor out(dtype, {256, 1, 1, kDim});
    for (int64_t i = 0; i < 256; ++i) q.set(i, 0), k.set(i, 0);
    auto* bits = static_cast<uint16_t*>(v.view.data);
    for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
    AttentionForwardArgs args;
    args.q = q.view, args.k = k.view, args.v = v.view, args.out = out.view;
    attention_forward(args);
    for (int64_t i = 0; i < 65536; ++i) {
      const double expected = v.get(i);
      ASSERT_TRUE(std::isnan(expected) ? std::isnan(out.get(i)) : out.get(i) == expected)
          << info(dtype).name << " " << i;
    }
    // Two values of equal weight: their mean needs one more bit than the dtype has, so it rounds.
    Tensor k2(dtype, {256, 2, 1, 1});
    Tensor v2(dtype, {256, 2, 1, kDim});
    std::mt19937 random(7);
    for (int64_t i = 0; i < k2.count(); ++i) k2.set(i, 0);
    auto* pairs = static_cast<uint16_t*>(v2.view.data);
    for (int64_t i = 0; i < v2.count(); ++i) pairs[i] = static_cast<uint16_t>(random());
    for (int64_t b = 0; b < 256; ++b) {  // neighbours: ties
      for (int64_t x = 0; x < kDim / 2; ++x) pairs[(b * 2 + 1) * kDim + x] = pairs[b * 2 * kDim + x] + 1;
    }
    args.k = k2.view, args.v = v2.view;
    attention_forward(args);
    for (int64_t i = 0; i < out.count(); ++i) {
      const int64_t b = i / kDim;
      const int64_t x = i % kDim;
      const double sum = v2.get(b * 2 * kDim + x) + v2.get((b * 2 + 1) * kDim + x);
      if (!std::isfinite(sum) || std::abs(sum) > 1e38) continue;
      ASSERT_EQ(out.get(i), round_to(sum / 2, dtype)) << info(dtype).name << " " << i;
    }
  }
}

// With one key and softcap 1 the lse is tanh of the product; with two keys, values 0 and 1 and scores 0 and x the
// output is e^x / (1 + e^x). So both functions can be read through calls.
TEST_P(EveryTarget, TanhAndExpAreAccurate) {
  constexpr int64_t kCount = 20000;
  Tensor q(DType::kFloat32, {kCount, 1, 1, 1});
  Tensor k(DType::kFloat32, {kCount, 1, 1, 1});
  Tensor v(DType::kFloat32, {kCount, 1, 1, 1});
  Tensor out(DType::kFloat32, {kCount, 1, 1, 1});
  Tensor lse(DType::kFloat32, {kCount, 1, 1});
  for (int64_t i = 0; i < kCount; ++i) {
    const double magnitude = std::exp2(static_cast<double>(i) * 48 / kCount - 40);  // 1e-12 .. 256
    q.set(i, i % 2 == 0 ? magnitude : -magnitude);
    k.set(i, 1.0);
    v.set(i, 1.0);
  }
  AttentionForwardArgs args;
  args.q = q.view, args.k = k.view, args.v = v.view, args.out = out.view, args.lse = lse.view;
  AttentionOptions options;
  options.softmax_scale = 1.0;
  options.softcap = 1.0;
  attention_forward(args, options);
  for (int64_t i = 0; i < kCount; ++i) {
    const double expected = std::tanh(q.get(i));
    ASSERT_NEAR(lse.get(i), expected, std::abs(expected) * 2 * 0x1p-23) << "tanh " << q.get(i);
  }

  Tensor keys(DType::kFloat32, {kCount, 2, 1, 1});
  Tensor values(DType::kFloat32, {kCount, 2, 1, 1});
  for (int64_t i = 0; i < kCount; ++i) {
    q.set(i, 1.0);
    keys.set(2 * i, 0.0), keys.set(2 * i + 1, -90.0 * static_cast<double>(i) / kCount);
    values.set(2 * i, 0.0), values.set(2 * i + 1, 1.0);
  }
  args.k = keys.view, args.v = values.view;
  options.softcap = 0.0;
  attention_forward(args, options);
  for (int64_t i = 0; i < kCount; ++i) {
    const double x = keys.get(2 * i + 1);
    const double expected = std::exp(x) / (1 + std::exp(x));
    if (x < -126 * std::log(2.0)) {
      ASSERT_LE(out.get(i), 0x1p-125) << "exp " << x;
    } else {
      // The scale that is folded into the exponent is one float: its rounding grows with |x|.
      ASSERT_NEAR(out.get(i), expected, expected * (3 - x) * 0x1p-23) << "exp " << x;
    }
  }
}

// A row's result does not depend on what else is in the call.
TEST_P(EveryTarget, RowsAreIndependentOfTheirBatch) {
  constexpr int64_t kTokens = 333;
  constexpr int64_t kDim = 40;
  Case c{.name = "alone",
         .batch = 3,
         .q_len = kTokens,
         .kv_len = kTokens,
         .num_q_heads = 6,
         .num_kv_heads = 2,
         .head_dim_qk = kDim,
         .head_dim_v = kDim};
  c.options.is_causal = true;
  Inputs in = make_inputs(c);
  Tensor out(c.dtype, {3, kTokens, 6, kDim});
  Tensor lse(DType::kFloat32, {3, 6, kTokens});
  // One batch entry, one KV head, and the last queries only: bottom-right alignment keeps their diagonals.
  const auto part_of = [](TensorView view, int64_t b, int64_t h, int64_t heads, int64_t first) {
    view.data =
        static_cast<float*>(view.data) + b * view.strides[0] + first * view.strides[1] + h * heads * view.strides[2];
    view.shape = {1, kTokens - first, heads, kDim};
    return view;
  };
  for (int64_t window_left : {-1, 37}) {
    c.options.window_left = window_left;
    attention_forward(make_args(in, out, lse), c.options);
    for (int64_t b = 0; b < 3; ++b) {
      for (int64_t h = 0; h < 2; ++h) {
        for (int64_t first : {0, 100, 331}) {
          Tensor part(c.dtype, {1, kTokens - first, 3, kDim});
          AttentionForwardArgs args;
          args.q = part_of(in.q.view, b, h, 3, first);
          args.k = part_of(in.k.view, b, h, 1, 0);
          args.v = part_of(in.v.view, b, h, 1, 0);
          args.out = part.view;
          attention_forward(args, c.options);
          const TensorView whole = part_of(out.view, b, h, 3, first);
          for (int64_t i = 0; i < part.count(); ++i) {
            const int64_t at = i / (3 * kDim) * whole.strides[1] + i % (3 * kDim);
            ASSERT_EQ(part.get(i), static_cast<float*>(whole.data)[at]) << "query " << first + i / (3 * kDim);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace heed
