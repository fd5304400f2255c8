// The CPU attention backward kernel: every instruction set of this build, forced one after the other, against float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "attention_bwd_oracle.h"
#include "cpu/simd.h"
#include "heed/heed.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

// The same problem with the elements of every head dim in another order: (i * step) % size.
Tensor reordered(const Tensor& from, int64_t step) {
  if (!from.view.defined()) return {};
  std::vector<int64_t> shape(from.view.shape.begin(), from.view.shape.begin() + from.view.rank);
  Tensor to(from.view.dtype, shape);
  const int64_t size = shape.back();
  for (int64_t i = 0; i < to.count(); ++i) to.set(i, from.get(i / size * size + (i % size) * step % size));
  return to;
}

void restore_order(std::vector<double>& values, int64_t size, int64_t step) {
  std::vector<double> restored(values.size());
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
    restored[i / size * size + (i % size) * step % size] = values[i];
  }
  values = restored;
}

// A plain implementation's gradients. A row to which few pairs add has the error of one or two dot products: a number
// that may be 0 by luck. So several plain implementations that add in different orders, and of each element the worst.
Gradients naive_backward(const Case& c, const Inputs& in, const Cotangents& more, const Gradients& oracle) {
  Gradients worst = backward<float>(c, in, more);
  for (int64_t order = 1; order <= 4; ++order) {
    const auto step_of = [&](int64_t size) {  // without a common divisor with the size
      int64_t step = order == 1 ? size - 1 : size / order + 1;
      while (std::gcd(step, size) != 1) ++step;
      return step;
    };
    const int64_t step_qk = step_of(c.head_dim_qk);
    const int64_t step_v = step_of(c.head_dim_v);
    Inputs other = in;
    other.q = reordered(in.q, step_qk), other.k = reordered(in.k, step_qk), other.v = reordered(in.v, step_v);
    Cotangents other_more = more;
    other_more.out = reordered(more.out, step_v), other_more.dout = reordered(more.dout, step_v);
    Gradients naive = backward<float>(c, other, other_more);
    restore_order(naive.dq, c.head_dim_qk, step_qk);
    restore_order(naive.dk, c.head_dim_qk, step_qk);
    restore_order(naive.dv, c.head_dim_v, step_v);
    for (auto part : {&Gradients::dq, &Gradients::dk, &Gradients::dv, &Gradients::dsinks, &Gradients::dslopes}) {
      for (size_t i = 0; i < (worst.*part).size(); ++i) {
        const double truth = (oracle.*part)[i];
        double& value = (worst.*part)[i];
        if (std::abs((naive.*part)[i] - truth) > std::abs(value - truth)) value = (naive.*part)[i];
      }
    }
  }
  return worst;
}

// What a case takes and should give. Its `out` and `lse` come from the best instruction set whatever is tested.
struct Prepared {
  Inputs in;
  Cotangents more;
  Gradients oracle, naive;
};

class EveryTarget : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { cpu::force_target(GetParam()); }
  void TearDown() override { cpu::force_target(""); }

  using Edit = std::function<void(Inputs&, Cotangents&)>;

  // `edit`: what is overwritten after the forward pass.
  static void check(const Case& c, bool has_dlse = true, const Edit& edit = {}) {
    SCOPED_TRACE(c.name);
    const Prepared& prepared = prepare(c, has_dlse, edit);
    Inputs in = prepared.in;
    Cotangents more = prepared.more;
    GradientTensors got(c, c.layout);
    AttentionBackwardArgs args = make_backward_args(in, more, got);
    run_backward(args, c.options, got);
    expect_gradients(got, prepared.naive, prepared.oracle, c.dtype, c.name);
  }

 private:
  // The same for every target, so prepared once; the test and the place in it name a case.
  static const Prepared& prepare(const Case& c, bool has_dlse, const Edit& edit) {
    static std::map<std::string, Prepared> all;
    const std::string test = testing::UnitTest::GetInstance()->current_test_info()->name();
    const auto [at, is_new] = all.try_emplace(test.substr(0, test.find('/')) + " " + c.name);
    Prepared& made = at->second;
    if (!is_new) return made;
    cpu::force_target("");
    made.in = make_inputs(c);
    made.more = make_cotangents(c, made.in, has_dlse);
    cpu::force_target(GetParam());
    if (edit) edit(made.in, made.more);
    made.oracle = backward<double>(c, made.in, made.more);
    made.naive = naive_backward(c, made.in, made.more, made.oracle);
    return made;
  }
};

INSTANTIATE_TEST_SUITE_P(, EveryTarget, testing::ValuesIn(cpu_targets()),
                         [](const testing::TestParamInfo<std::string>& info) { return info.param; });

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

TEST_P(EveryTarget, LengthsAndHeadDims) {
  struct Size {
    int64_t q_len, kv_len, d, dv;
  };
  const Size sizes[] = {{1, 1, 1, 1},       {2, 257, 32, 32},  {5, 127, 59, 59},    {48, 128, 64, 64},
                        {97, 193, 72, 80},  {97, 300, 16, 96}, {200, 131, 112, 32}, {13, 64, 256, 256},
                        {64, 13, 192, 128}, {7, 259, 5, 250},  {193, 1, 8, 17},     {31, 40, 33, 1}};
  for (DType dtype : kFloats) {
    for (const Size& size : sizes) {
      for (bool is_causal : {false, true}) {
        Case c{.name = std::string(info(dtype).name) + " " + std::to_string(size.q_len) + "x" +
                       std::to_string(size.kv_len) + " d " + std::to_string(size.d) + "," + std::to_string(size.dv) +
                       (is_causal ? " causal" : ""),
               .dtype = dtype,
               .batch = 2,
               .q_len = size.q_len,
               .kv_len = size.kv_len,
               .num_q_heads = 2,
               .num_kv_heads = 2,
               .head_dim_qk = size.d,
               .head_dim_v = size.dv};
        c.options.is_causal = is_causal;
        check(c, is_causal);
      }
    }
  }
}

TEST_P(EveryTarget, GroupsOfQueryHeads) {
  for (int64_t group : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64, 100}) {
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
        for (auto [q_len, kv_len] : {std::pair{150, 490}, {290, 150}, {64, 64}, {1, 200}, {130, 1}}) {
          Case c{.name = std::string(align == CausalAlign::kTopLeft ? "top-left " : "") + "window " +
                         std::to_string(window.left) + "," + std::to_string(window.right) + " causal " +
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
    for (int bits = 0; bits < 64; bits += dtype == DType::kFloat32 ? 1 : 5) {  // storage changes nothing in the masks
      Case c{.name = std::string(info(dtype).name) + " variants " + std::to_string(bits),
             .dtype = dtype,
             .batch = 1,
             .q_len = 170,
             .kv_len = 213,
             .num_q_heads = 4,
             .num_kv_heads = 2,
             .head_dim_qk = 24,
             .head_dim_v = 40};
      c.has_sinks = (bits & 1) != 0;
      c.has_alibi = (bits & 2) != 0;
      c.has_segments = (bits & 4) != 0;
      if ((bits & 8) != 0) c.options.softcap = 5.0;
      c.options.is_causal = (bits & 16) != 0;
      check(c, (bits & 32) != 0);
    }
  }
}

TEST_P(EveryTarget, AnyStrides) {
  for (DType dtype : kFloats) {
    for (Layout layout :
         {Layout::kHeadsFirst, Layout::kReversedTokens, Layout::kSpacedDims, Layout::kZeroTokenStride}) {
      Case c{.name = std::string(info(dtype).name) + " layout " + std::to_string(static_cast<int>(layout)),
             .dtype = dtype,
             .batch = 2,
             .q_len = 50,
             .kv_len = 270,
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
    for (double softcap : {0.0, 1.0, 50.0, 1e20, 1e35}) {
      std::ostringstream name;
      name << "scale " << scale << " softcap " << softcap;
      Case c{.name = name.str(),
             .q_len = 40,
             .kv_len = 250,
             .head_dim_qk = 24,
             .head_dim_v = 32,
             .gain = scale >= 1.0 ? 0.2 / scale : 1.0};
      c.options.softmax_scale = scale;
      c.options.softcap = softcap;
      c.options.is_causal = true;
      check(c);
    }
  }
}

// Lengths that need several chunks of keys and several blocks of rows, which the turn of each chunk then orders.
TEST_P(EveryTarget, ManyChunksAndBlocks) {
  for (auto [d, dv] : {std::pair{32, 48}, {160, 160}}) {
    for (int64_t window_left : {-1, 100}) {
      Case c{.name = "long, d " + std::to_string(d) + " window " + std::to_string(window_left),
             .q_len = 500,
             .kv_len = 700,
             .num_q_heads = 3,
             .num_kv_heads = 1,
             .head_dim_qk = d,
             .head_dim_v = dv,
             .has_sinks = true,
             .has_alibi = true};
      c.options.is_causal = true;
      c.options.window_left = window_left;
      check(c);
    }
  }
}

TEST_P(EveryTarget, LargeLogits) {
  for (DType dtype : kFloats) {
    for (bool has_window : {false, true}) {
      Case c{.name = std::string(info(dtype).name) + (has_window ? " window" : "") + " logits of 1e4",
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
    }
  }
}

// Scores, and with them every lse, far below what float32's exponential can represent: only differences count.
TEST_P(EveryTarget, VeryNegativeLse) {
  for (auto [q_len, kv_len] : {std::pair{64, 192}, {320, 320}, {8, 128}}) {
    Case c{.name = "lse of -200, " + std::to_string(q_len) + "x" + std::to_string(kv_len),
           .q_len = q_len,
           .kv_len = kv_len,
           .num_q_heads = 2,
           .num_kv_heads = 2,
           .head_dim_qk = 64,
           .head_dim_v = 64,
           .gain = 0.25};
    c.options.is_causal = true;
    c.options.softmax_scale = 1.0;
    // One element of the head dim moves all scores by -200. All products are exact, so that this costs no digits.
    c.edit = [](Tensor& q, Tensor& k, Tensor&) {
      for (int64_t i = 0; i < q.count(); ++i) q.set(i, i % 64 == 0 ? 16.0 : std::nearbyint(16 * q.get(i)) / 16);
      for (int64_t i = 0; i < k.count(); ++i) k.set(i, i % 64 == 0 ? -12.5 : std::nearbyint(16 * k.get(i)) / 16);
    };
    check(c);
  }
}

TEST_P(EveryTarget, EmptyRowsAndLengths) {
  for (bool has_sinks : {false, true}) {
    for (auto [q_len, kv_len] : {std::pair{0, 5}, {5, 0}, {0, 0}, {130, 7}, {400, 250}}) {
      Case c{.name = "empty " + std::to_string(q_len) + "x" + std::to_string(kv_len) + (has_sinks ? " sinks" : ""),
             .batch = 2,
             .q_len = q_len,
             .kv_len = kv_len,
             .num_q_heads = 2,
             .head_dim_qk = 8,
             .head_dim_v = 8,
             .has_sinks = has_sinks,
             .has_alibi = has_sinks};
      c.options.is_causal = true;
      check(c);
    }
  }
  Case none{.name = "no batch", .batch = 0, .q_len = 3, .kv_len = 3};
  check(none);
}

// What rows that see nothing hold, and their cotangents, reaches no gradient but that of their sink.
TEST_P(EveryTarget, RowsThatSeeNothingMayHoldNaN) {
  for (bool has_sinks : {false, true}) {
    Case c{.name = has_sinks ? "hidden rows, sinks" : "hidden rows",
           .q_len = 330,
           .kv_len = 210,
           .num_q_heads = 4,
           .num_kv_heads = 2,
           .head_dim_qk = 24,
           .head_dim_v = 24,
           .has_sinks = has_sinks};
    c.options.is_causal = true;
    check(c, !has_sinks, [&](Inputs& in, Cotangents& more) {
      constexpr int64_t kHidden = 330 - 210;
      for (int64_t i = 0; i < kHidden * 4 * 24; ++i) {
        in.q.set(i, kNaN);
        if (!has_sinks) more.dout.set(i, kNaN);
      }
      for (int64_t h = 0; h < 4 && !has_sinks; ++h) {
        for (int64_t i = 0; i < kHidden; ++i) more.dlse.set(h * 330 + i, kNaN);
      }
    });
  }
}

// Pairs that a mask hides add exactly 0, where either side holds NaN or infinities that other pairs do see.
TEST_P(EveryTarget, MaskedNaNNeverReachesAGradient) {
  for (bool has_segments : {false, true}) {
    for (double poison : {kNaN, kInfinity}) {
      for (int which : {0, 1, 2, 3}) {
        if (which < 2 && poison == kInfinity) continue;  // `lse` would not be that of the scores
        Case c{.name = "poison " + std::to_string(poison) + " in " + std::to_string(which) +
                       (has_segments ? " segments" : ""),
               .q_len = 160,
               .kv_len = 260,
               .num_q_heads = 2,
               .head_dim_qk = 24,
               .head_dim_v = 24,
               .has_segments = has_segments};
        c.options.is_causal = true;
        c.options.window_left = 40;
        check(c, true, [&](Inputs& in, Cotangents& more) {
          Tensor* const tensors[] = {&in.q, &in.k, &in.v, &more.dout};
          const int64_t heads = which == 0 || which == 3 ? 2 : 1;
          for (int64_t token : {0, 57, 99, 150, 201, 259}) {
            if (token * heads * 24 < tensors[which]->count()) tensors[which]->set(token * heads * 24 + 3, poison);
          }
        });
      }
    }
  }
}

TEST_P(EveryTarget, VisibleNaNFollowsIeee) {
  for (int which : {0, 1, 2, 3}) {
    Case c{.name = "NaN in " + std::to_string(which), .q_len = 60, .kv_len = 240, .head_dim_qk = 16, .head_dim_v = 16};
    check(c, true, [&](Inputs& in, Cotangents& more) {
      Tensor* const tensors[] = {&in.q, &in.k, &in.v, &more.dout};
      tensors[which]->set(16 * 33 + 5, kNaN);
    });
  }
}

// A row that sees one key only has weight 1 and out = v: without dlse its score has no gradient, exactly.
TEST_P(EveryTarget, OneVisibleKeyGivesExactlyZero) {
  for (DType dtype : kFloats) {
    for (int64_t head_dim : {7, 64, 200}) {
      Case c{.name = "one key", .dtype = dtype, .q_len = 50, .kv_len = 50, .head_dim_qk = 32, .head_dim_v = head_dim};
      c.options.window_left = c.options.window_right = 0;
      Inputs in = make_inputs(c);
      Cotangents more = make_cotangents(c, in, false);
      GradientTensors got(c, c.layout);
      AttentionBackwardArgs args = make_backward_args(in, more, got);
      run_backward(args, c.options, got);
      for (int64_t i = 0; i < got.dq.count(); ++i) ASSERT_EQ(got.dq.get(i), 0.0) << i;
      for (int64_t i = 0; i < got.dk.count(); ++i) ASSERT_EQ(got.dk.get(i), 0.0) << i;
    }
  }
}

}  // namespace
}  // namespace heed
