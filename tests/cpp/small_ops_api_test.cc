// The small ops of the public C++ interface: what can be told exactly, optional tensors, broadcasting and strides,
// workspaces, and typed errors. How accurate the kernels are is tested with them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "heed/heed.h"
#include "heed/ops.h"

namespace heed {
namespace {

constexpr float kUnwritten = -7.0F;

std::vector<float> random_values(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// A float32 tensor with memory of its own.
struct Floats {
  std::vector<float> values;
  TensorView view;

  explicit Floats(std::initializer_list<int64_t> shape, unsigned seed = 0) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    values = seed == 0 ? std::vector<float>(static_cast<size_t>(count), kUnwritten) : random_values(count, seed);
    view = TensorView::contiguous(values.data(), DType::kFloat32, shape);
  }
  bool is_unwritten() const {
    return std::all_of(values.begin(), values.end(), [](float value) { return value == kUnwritten; });
  }
};

template <class Error>
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// The parts of `memory` that lie `step` apart, as a view of `shape`.
TensorView strided(std::vector<float>& memory, std::initializer_list<int64_t> shape, int64_t step) {
  TensorView view = TensorView::contiguous(memory.data(), DType::kFloat32, shape);
  for (int axis = 0; axis < view.rank; ++axis) view.strides[axis] *= step;
  return view;
}

// ---------------------------------------------------------------------------------------------------------------------
// Gated activations.

TEST(ActAndMul, IsExactWhereItsActivationIs) {
  // A gate of 100 is its own activation, and one of 0 has none.
  Floats x({2, 6});
  x.values = {100, 0, 100, 0.5, 2, -4, 0, 0, 100, 1, 1, -0.25};
  Floats out({2, 3});
  for (const Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
    act_and_mul({.x = x.view, .out = out.view}, activation);
    EXPECT_EQ(out.values, (std::vector<float>{50, 0, -400, 0, 0, -25}));
  }
}

TEST(ActAndMul, GradientIsExactWhereItsActivationIs) {
  // There the gate's gradient is the factor's, and the other way round; a gate of 0 has the slope 1/2.
  Floats x({1, 4});
  x.values = {100, 0, 0.5, 8};
  Floats dout({1, 2});
  dout.values = {2, 4};
  Floats dx({1, 4});
  for (const Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
    act_and_mul_backward({.x = x.view, .dout = dout.view, .dx = dx.view}, activation);
    EXPECT_EQ(dx.values, (std::vector<float>{1, 16, 200, 0}));
  }
}

TEST(ActAndMul, StridesAndBroadcastsChangeNothing) {
  Floats x({5, 14}, 1);
  Floats out({5, 7});
  act_and_mul({.x = x.view, .out = out.view}, Activation::kGelu);
  std::vector<float> spaced_x(5 * 14 * 3), spaced_out(5 * 7 * 2, kUnwritten);
  for (size_t i = 0; i < x.values.size(); ++i) spaced_x[3 * i] = x.values[i];
  act_and_mul({.x = strided(spaced_x, {5, 14}, 3), .out = strided(spaced_out, {5, 7}, 2)}, Activation::kGelu);
  for (size_t i = 0; i < out.values.size(); ++i) {
    ASSERT_EQ(spaced_out[2 * i], out.values[i]) << i;
    ASSERT_EQ(spaced_out[2 * i + 1], kUnwritten) << i;
  }
  // The gradient of one x for three gradients of its result.
  Floats dout({3, 5, 7}, 2);
  Floats dx({3, 5, 14});
  TensorView one_x = TensorView::contiguous(x.values.data(), DType::kFloat32, {1, 5, 14});
  act_and_mul_backward({.x = one_x, .dout = dout.view, .dx = dx.view}, Activation::kGelu);
  for (int i = 0; i < 3; ++i) {
    Floats alone({5, 14});
    act_and_mul_backward(
        {.x = x.view, .dout = TensorView::contiguous(&dout.values[i * 35], DType::kFloat32, {5, 7}), .dx = alone.view},
        Activation::kGelu);
    EXPECT_TRUE(std::equal(alone.values.begin(), alone.values.end(), dx.values.begin() + i * 70)) << i;
  }
}

TEST(ActAndMul, ErrorsAreTypedAndLeaveTheOutputAlone) {
  Floats x({4, 6}, 1);
  Floats out({4, 3});
  const auto call = [&](const std::function<void(ActAndMulArgs&)>& change, Backend backend = Backend::kAuto) {
    return [&, change, backend] {
      ActAndMulArgs args{.x = x.view, .out = out.view};
      change(args);
      act_and_mul(args, Activation::kSilu, backend);
    };
  };
  EXPECT_EQ(message_of<ValueError>(call([](auto& args) { args.x.shape[1] = 5; })),
            "x: got shape [4, 5] with a last axis of 5, expected an even size of 2 or more: the gates, then what they "
            "are multiplied with");
  EXPECT_EQ(message_of<ValueError>(call([](auto& args) { args.out.shape[0] = 5; })),
            "out: got float32 [5, 3], expected float32 [4, 3]");
  EXPECT_EQ(message_of<TypeError>(call([](auto& args) { args.out.dtype = DType::kFloat16; })),
            "out: got float16 [4, 3], expected float32 [4, 3]");
  EXPECT_EQ(message_of<ValueError>(call([](auto& args) { args.out = {}; })),
            "out: got nothing, expected float32 [4, 3]");
  EXPECT_EQ(message_of<ValueError>(call([](auto& args) {
              args.out.device = {DeviceType::kCuda, 0};
            })),
            "out: got another device than x, expected the device of x");
  EXPECT_EQ(message_of<ValueError>(call([](auto& args) { args.out.strides[0] = 0; })),
            "out: got strides [0, 1], expected strides that keep output elements apart");
  EXPECT_EQ(message_of<ValueError>(call([](auto& args) { args.x.data = nullptr; })),
            "x: got a null pointer, expected memory");
  EXPECT_EQ(message_of<UnsupportedError>(call([](auto&) {}, Backend::kSm90)).substr(0, 61),
            "no kernel serves this gated activation on target cpu:\n  sm80_");
  EXPECT_TRUE(out.is_unwritten());
  EXPECT_EQ(message_of<ValueError>(call([](auto&) {})), "");
}

// ---------------------------------------------------------------------------------------------------------------------
// Rotary embeddings.

struct RopeCase {
  Floats q{{6, 2, 8}, 1}, k{{6, 1, 8}, 2}, q_rope{{6, 2, 8}}, k_rope{{6, 1, 8}};
  std::vector<int32_t> indptr = {1, 3, 3, 5}, offsets = {0, 9, -1}, pos_ids = {0, 0, 1, -1, 0, 0};
  RopeArgs args;

  RopeCase() {
    args.q = q.view;
    args.k = k.view;
    args.q_rope = q_rope.view;
    args.k_rope = k_rope.view;
    args.indptr = TensorView::contiguous(indptr.data(), DType::kInt32, {4});
    args.offsets = TensorView::contiguous(offsets.data(), DType::kInt32, {3});
  }
  void use_pos_ids() {
    args.indptr = args.offsets = {};
    args.pos_ids = TensorView::contiguous(pos_ids.data(), DType::kInt32, {6});
  }
};

TEST(Rope, KeepsWhatItDoesNotRotate) {
  RopeCase c;
  apply_rope(c.args, {.rotary_dim = 4});
  // Tokens 0 and 5 are in no sequence; tokens 1 and 4 are at position 0; the others keep all but four elements.
  for (int token = 0; token < 6; ++token) {
    const bool is_rotated = token == 2 || token == 3;
    for (int i = 0; i < 16; ++i) {
      const size_t at = static_cast<size_t>(token * 16 + i);
      if (!is_rotated || i % 8 >= 4) {
        EXPECT_EQ(c.q_rope.values[at], c.q.values[at]) << at;
      } else {
        EXPECT_NE(c.q_rope.values[at], c.q.values[at]) << at;
      }
    }
  }
}

TEST(Rope, OffsetsPositionsAndInverseAgree) {
  RopeCase by_offsets;
  RopeCase by_ids;
  by_ids.use_pos_ids();
  for (const bool interleave : {false, true}) {
    apply_rope(by_offsets.args, {.interleave = interleave});
    apply_rope(by_ids.args, {.interleave = interleave});
    EXPECT_EQ(by_ids.q_rope.values, by_offsets.q_rope.values);
    EXPECT_EQ(by_ids.k_rope.values, by_offsets.k_rope.values);
    // Back is to the opposite position.
    RopeCase back;
    back.use_pos_ids();
    for (int32_t& position : back.pos_ids) position = -position;
    apply_rope(back.args, {.interleave = interleave, .inverse = true});
    EXPECT_EQ(back.q_rope.values, by_ids.q_rope.values);
  }
}

TEST(Rope, ACacheHoldsTheRotation) {
  RopeCase c;
  c.use_pos_ids();
  c.pos_ids = {0, 1, 2, 1, 0, 5};  // the last is past the end: clamped
  // Quarter turns: position 1 maps (a, b) to (-b, a), position 2 to (-a, -b).
  Floats cache({3, 4});
  cache.values = {1, 1, 0, 0, 0, 0, 1, 1, -1, -1, 0, 0};
  c.args.cos_sin_cache = cache.view;
  apply_rope(c.args);
  for (int token = 0; token < 6; ++token) {
    const int turns = std::min(c.pos_ids[static_cast<size_t>(token)], 2);
    for (int i = 0; i < 2; ++i) {
      const float a = c.k.values[static_cast<size_t>(token * 8 + i)];
      const float b = c.k.values[static_cast<size_t>(token * 8 + i + 2)];
      const float expected_a[] = {a, -b, -a}, expected_b[] = {b, a, -b};
      EXPECT_EQ(c.k_rope.values[static_cast<size_t>(token * 8 + i)], expected_a[turns]) << token;
      EXPECT_EQ(c.k_rope.values[static_cast<size_t>(token * 8 + i + 2)], expected_b[turns]) << token;
    }
  }
}

TEST(Rope, ValuesOfIndicesNeverLeadOutOfBounds) {
  RopeCase c;
  c.indptr = {-50, 1 << 30, 2, std::numeric_limits<int32_t>::min()};
  c.offsets = {std::numeric_limits<int32_t>::max(), 1, 2};
  apply_rope(c.args);
  EXPECT_FALSE(c.q_rope.is_unwritten());
}

TEST(Rope, ErrorsAreTypedAndLeaveTheOutputAlone) {
  RopeCase c;
  const auto refused = [&](const std::function<void(RopeArgs&)>& change, const RopeOptions& options = {}) {
    RopeArgs args = c.args;
    change(args);
    return message_of<std::invalid_argument>([&] { apply_rope(args, options); });
  };
  EXPECT_EQ(refused([](auto& args) { args.offsets = {}; }), "offsets: got nothing, expected a tensor");
  EXPECT_EQ(refused([](auto& args) { args.indptr.data = nullptr; }), "indptr: got a null pointer, expected memory");
  EXPECT_EQ(refused([](auto& args) {
              args.indptr.device = {DeviceType::kCuda, 0};
            }),
            "indptr: got another device than q, expected the device of q");
  EXPECT_EQ(refused([](auto& args) { args.k_rope = {}; }), "k_rope: got nothing, expected float32 [6, 1, 8]");
  EXPECT_EQ(refused([](auto& args) { args.q_rope.shape[1] = 1; }),
            "q_rope: got float32 [6, 1, 8], expected float32 [6, 2, 8]");
  EXPECT_EQ(refused([](auto&) {}, {.rotary_dim = 3}),
            "rotary_dim: got 3, expected an even number from 2 to head_dim 8");
  EXPECT_TRUE(c.q_rope.is_unwritten());
  EXPECT_TRUE(c.k_rope.is_unwritten());
}

// ---------------------------------------------------------------------------------------------------------------------
// RMS norms.

TEST(RmsNorm, SumIsAResultOfItsOwn) {
  Floats x({4, 9}, 1), residual({4, 9}, 2), weight({9}, 3), out({4, 9}), sum({4, 9}), out_of_sum({4, 9});
  rms_norm({.x = x.view, .weight = weight.view, .residual = residual.view, .out = out.view, .sum = sum.view});
  for (size_t i = 0; i < sum.values.size(); ++i) ASSERT_EQ(sum.values[i], x.values[i] + residual.values[i]);
  rms_norm({.x = sum.view, .weight = weight.view, .out = out_of_sum.view});
  EXPECT_EQ(out_of_sum.values, out.values);
}

TEST(RmsNorm, TheWeightsLeadingAxesArePairedWithThoseOfX) {
  Floats x({1, 4, 9}, 1), weight({3, 9}, 3), out({3, 4, 9}), alone({4, 9});
  rms_norm({.x = x.view, .weight = weight.view, .out = out.view}, 1e-5);
  for (int i = 0; i < 3; ++i) {
    rms_norm({.x = TensorView::contiguous(x.values.data(), DType::kFloat32, {4, 9}),
              .weight = TensorView::contiguous(&weight.values[i * 9], DType::kFloat32, {9}),
              .out = alone.view},
             1e-5);
    EXPECT_TRUE(std::equal(alone.values.begin(), alone.values.end(), out.values.begin() + i * 36)) << i;
  }
}

TEST(RmsNorm, GradientTakesItsWorkspaceAndAddsTheSums) {
  Floats x({70, 9}, 1), weight({9}, 2), dout({70, 9}, 3), dsum({70, 9}, 4), dx({70, 9}), dweight({9});
  RmsNormBackwardArgs args{.x = x.view, .weight = weight.view, .dout = dout.view};
  args.dx = dx.view;
  args.dweight = dweight.view;
  const int64_t bytes = rms_norm_backward_workspace_bytes(args);
  ASSERT_EQ(bytes % 4, 0);
  Floats workspace({bytes / 4 + 4});
  const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(workspace.values.data()) % 16 / 4);
  float* const aligned = workspace.values.data() + (4 - offset) % 4;
  args.workspace = TensorView::contiguous(aligned, DType::kFloat32, {bytes / 4});
  rms_norm_backward(args);
  const std::vector<float> without = dx.values, weights = dweight.values;
  std::fill(workspace.values.begin(), workspace.values.end(), NAN);  // scratch: whatever it holds
  args.dsum = dsum.view;
  rms_norm_backward(args);
  EXPECT_EQ(dweight.values, weights);
  for (size_t i = 0; i < without.size(); ++i) {
    // Rounded once more or once less than here.
    ASSERT_NEAR(dx.values[i], without[i] + dsum.values[i],
                4 * 0x1p-24 * (std::abs(without[i]) + std::abs(dsum.values[i])));
  }
  if (bytes > 0) {
    args.workspace.shape[0] -= 1;
    EXPECT_NE(message_of<ValueError>([&] { rms_norm_backward(args); }).find("expected at least"), std::string::npos);
  }
}

TEST(RmsNorm, NoRowsHaveNoGradientOfTheWeight) {
  Floats x({0, 5}), weight({5}, 2), dweight({5});
  RmsNormBackwardArgs args{.x = x.view, .weight = weight.view, .dout = x.view};
  args.dx = x.view;
  args.dweight = dweight.view;
  const int64_t bytes = rms_norm_backward_workspace_bytes(args);
  std::vector<double> workspace(static_cast<size_t>(bytes) / 8 + 3);
  const auto address = (reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16;
  args.workspace = TensorView::contiguous(reinterpret_cast<void*>(address), DType::kFloat32, {bytes / 4});
  rms_norm_backward(args);
  EXPECT_EQ(dweight.values, std::vector<float>(5, 0.0F));
}

TEST(RmsNorm, ErrorsAreTypedAndLeaveTheOutputAlone) {
  Floats x({4, 6}, 1), weight({6}, 2), out({4, 6}), sum({4, 6});
  const auto refused = [&](const std::function<void(RmsNormArgs&)>& change, double eps = 1e-6) {
    RmsNormArgs args{.x = x.view, .weight = weight.view, .out = out.view};
    change(args);
    return message_of<std::invalid_argument>([&] { rms_norm(args, eps); });
  };
  EXPECT_EQ(refused([&](auto& args) { args.sum = sum.view; }), "sum: got a tensor, expected nothing for these inputs");
  EXPECT_EQ(refused([&](auto& args) { args.residual = x.view; }), "sum: got nothing, expected float32 [4, 6]");
  EXPECT_EQ(refused([](auto& args) { args.weight.shape[0] = 4; }),
            "weight: got shape [4] with hidden 4, expected hidden 6 as in x");
  EXPECT_EQ(refused([](auto& args) { args.weight = {}; }), "weight: got nothing, expected a tensor");
  EXPECT_EQ(refused([](auto& args) { args.out.dtype = DType::kBFloat16; }),
            "out: got bfloat16 [4, 6], expected float32 [4, 6]");
  EXPECT_EQ(refused([](auto&) {}, -1), "eps: got -1.000000, expected 0 or a positive number");
  EXPECT_TRUE(out.is_unwritten());
  EXPECT_TRUE(sum.is_unwritten());
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one query.

// Memory for the workspace that a call asks for.
class DecodeWorkspace {
 public:
  DecodeWorkspace(SingleDecodeArgs& args, const SingleDecodeOptions& options = {}) {
    const int64_t bytes = single_decode_workspace_bytes(args, options);
    memory_.resize(static_cast<size_t>(bytes) / 8 + 3, NAN);
    const auto address = (reinterpret_cast<uintptr_t>(memory_.data()) + 15) / 16 * 16;
    args.workspace = TensorView::contiguous(reinterpret_cast<void*>(address), DType::kFloat32, {bytes / 4});
  }

 private:
  std::vector<double> memory_;
};

TEST(SingleDecode, OneKeyHasAllTheWeight) {
  for (const KvLayout layout : {KvLayout::kNHD, KvLayout::kHND}) {
    Floats q({4, 5}, 1), k({2, 2, 5}, 2), v({2, 2, 3}, 3), out({4, 3}), lse({4});
    SingleDecodeArgs args{.q = q.view, .k = k.view, .v = v.view};
    args.out = out.view;
    args.lse = lse.view;
    const SingleDecodeOptions options{.kv_layout = layout, .window_left = 0};  // sees only the last key
    const DecodeWorkspace workspace(args, options);
    single_decode(args, options);
    for (int head = 0; head < 4; ++head) {
      const int kv_head = head / 2;
      const int row = layout == KvLayout::kNHD ? 2 + kv_head : 2 * kv_head + 1;
      for (int i = 0; i < 3; ++i) EXPECT_EQ(out.values[head * 3 + i], v.values[row * 3 + i]) << head;
      EXPECT_TRUE(std::isfinite(lse.values[head]));
    }
  }
}

TEST(SingleDecode, AnEmptyCacheLeavesTheSink) {
  Floats q({2, 5}, 1), k({0, 1, 5}), v({0, 1, 3}), sinks({2}, 4), out({2, 3}), lse({2});
  SingleDecodeArgs args{.q = q.view, .k = k.view, .v = v.view};
  args.out = out.view;
  args.lse = lse.view;
  {
    const DecodeWorkspace workspace(args);
    single_decode(args);
  }
  EXPECT_EQ(out.values, std::vector<float>(6, 0.0F));
  EXPECT_EQ(lse.values, std::vector<float>(2, -std::numeric_limits<float>::infinity()));
  args.sinks = sinks.view;
  const DecodeWorkspace workspace(args);
  single_decode(args);
  EXPECT_EQ(out.values, std::vector<float>(6, 0.0F));
  EXPECT_EQ(lse.values, sinks.values);
}

TEST(SingleDecode, LeadingAxesBroadcast) {
  Floats q({3, 4, 5}, 1), k({1, 40, 2, 5}, 2), v({1, 40, 2, 3}, 3), out({3, 4, 3}), alone({4, 3});
  SingleDecodeArgs args{.q = q.view, .k = k.view, .v = v.view};
  args.out = out.view;
  const SingleDecodeOptions options{.batch_invariant = true};
  const DecodeWorkspace workspace(args, options);
  single_decode(args, options);
  for (int i = 0; i < 3; ++i) {
    SingleDecodeArgs one{.q = TensorView::contiguous(&q.values[i * 20], DType::kFloat32, {4, 5}),
                         .k = TensorView::contiguous(k.values.data(), DType::kFloat32, {40, 2, 5}),
                         .v = TensorView::contiguous(v.values.data(), DType::kFloat32, {40, 2, 3})};
    one.out = alone.view;
    const DecodeWorkspace own(one, options);
    single_decode(one, options);
    EXPECT_TRUE(std::equal(alone.values.begin(), alone.values.end(), out.values.begin() + i * 12)) << i;
  }
}

TEST(SingleDecode, ErrorsAreTypedAndLeaveTheOutputAlone) {
  Floats q({4, 6}, 1), k({9, 2, 6}, 2), v({9, 2, 3}, 3), out({4, 3}), lse({4});
  SingleDecodeArgs good{.q = q.view, .k = k.view, .v = v.view};
  good.out = out.view;
  good.lse = lse.view;
  const DecodeWorkspace workspace(good);
  const auto refused = [&](const std::function<void(SingleDecodeArgs&)>& change,
                           const SingleDecodeOptions& options = {}) {
    SingleDecodeArgs args = good;
    change(args);
    return message_of<std::invalid_argument>([&] { single_decode(args, options); });
  };
  EXPECT_EQ(refused([](auto& args) { args.v.shape[0] = 8; }),
            "v: got shape [8, 2, 3] with kv_len 8, expected kv_len 9 as in k");
  EXPECT_EQ(refused([](auto& args) { args.lse.shape[0] = 3; }), "lse: got float32 [3], expected float32 [4]");
  EXPECT_EQ(refused([](auto& args) { args.out.data = nullptr; }), "out: got a null pointer, expected memory");
  EXPECT_EQ(refused([](auto& args) { args.k.dtype = DType::kInt32; }),
            "k: got dtype int32, expected float32 (the dtype of q)");
  EXPECT_EQ(refused([](auto&) {}, {.window_left = -5}), "window_left: got -5, expected -1 (unbounded) or more");
  if (single_decode_workspace_bytes(good) > 0) {
    EXPECT_NE(refused([](auto& args) { args.workspace = {}; }).find("workspace: got nothing"), std::string::npos);
  }
  EXPECT_TRUE(out.is_unwritten());
  EXPECT_TRUE(lse.is_unwritten());
  EXPECT_EQ(refused([](auto&) {}), "");
}

}  // namespace
}  // namespace heed
