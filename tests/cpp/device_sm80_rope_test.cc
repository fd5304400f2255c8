// The device code of the GPU kernel of rotary embeddings, run on the CPU (device_emulation/) with the parameters that
// the host side makes, and compared with float64 by the one tolerance rule.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/small_problems.h"
#include "cuda/device/sm80_rope.cuh"
#include "cuda/sm80_rope.h"
#include "emulated_rows.h"
#include "guarded.h"
#include "ops/views.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary
using cuda::Element;
using Ints = std::vector<int32_t>;
using Spec = cuda::Sm80RopeSpec;

struct Case {
  Shape q_shape, k_shape;  // [lead.., n, heads, D]
  RopeOptions options{};
  Ints indptr{}, offsets{}, pos_ids{};  // of every leading index
  int64_t max_position = 0;             // of a cache
  Layout layout = Layout::kContiguous;
  bool is_index_mapped = false;  // indptr and offsets, or pos_ids, differ among leading indices
};

struct Inputs {
  Tensor q, k, indptr, offsets, pos_ids, cache;
};

int64_t size_of(const Tensor& tensor, int from_end) { return tensor.view.shape[tensor.view.rank - from_end]; }

int64_t num_leads(const Tensor& tensor) {
  return tensor.count() / size_of(tensor, 1) / size_of(tensor, 2) / size_of(tensor, 3);
}

// The values for each leading index; later ones are moved on by one, to tell them apart.
Tensor per_lead(const Case& c, const Ints& values, int32_t move) {
  Shape shape(c.q_shape.begin(), c.q_shape.end() - 3);
  if (!c.is_index_mapped) shape.assign(shape.size(), 1);
  int64_t leads = 1;
  for (int64_t size : shape) leads *= size;
  Ints all;
  for (int32_t lead = 0; lead < leads; ++lead) {
    for (int32_t value : values) all.push_back(value + move * lead);
  }
  shape.push_back(static_cast<int64_t>(values.size()));
  return int_tensor(all, shape);
}

Inputs make_inputs(const Case& c, DType dtype) {
  Inputs in;
  in.q = random_tensor(dtype, c.q_shape, 1, c.layout);
  in.k = random_tensor(dtype, c.k_shape, 2, c.layout);
  if (c.pos_ids.empty()) {
    in.indptr = per_lead(c, c.indptr, 0);
    in.offsets = per_lead(c, c.offsets, 5);
  } else {
    in.pos_ids = per_lead(c, c.pos_ids, 3);
  }
  if (c.max_position > 0) {
    Shape shape(c.q_shape.size() - 3, 1);
    shape.push_back(c.max_position);
    shape.push_back(c.options.rotary_dim);
    in.cache = random_tensor(DType::kFloat32, shape, 3);
  }
  return in;
}

// A token's position; false for one outside every sequence.
bool position_of(const Inputs& in, int64_t lead, int64_t token, int64_t& position) {
  const auto row = [&](const Tensor& tensor) {
    const int64_t size = tensor.view.shape[tensor.view.rank - 1];
    return tensor.count() / size == 1 ? 0 : lead * size;
  };
  if (in.pos_ids.view.defined()) {
    position = static_cast<int64_t>(in.pos_ids.get(row(in.pos_ids) + token));
    return true;
  }
  for (int64_t b = 0; b < size_of(in.offsets, 1); ++b) {
    const auto begin = static_cast<int64_t>(in.indptr.get(row(in.indptr) + b));
    const auto end = static_cast<int64_t>(in.indptr.get(row(in.indptr) + b + 1));
    if (token < begin || token >= end) continue;
    position = static_cast<int64_t>(in.offsets.get(row(in.offsets) + b)) + token - begin;
    return true;
  }
  return false;
}

template <class Real>
Real frequency_of(const RopeOptions& options, int64_t rotary_dim, int64_t pair) {
  const Real plain =
      std::pow(static_cast<Real>(options.theta), -2 * static_cast<Real>(pair) / static_cast<Real>(rotary_dim));
  const Real slow = plain / static_cast<Real>(options.scale);
  if (!options.is_llama31) return slow;
  const Real wavelength = static_cast<Real>(2 * 3.14159265358979323846) / plain;
  const Real context = static_cast<Real>(options.old_context_len);
  if (wavelength < context / static_cast<Real>(options.high_freq_factor)) return plain;
  if (wavelength > context / static_cast<Real>(options.low_freq_factor)) return slow;
  const Real low = static_cast<Real>(options.low_freq_factor);
  const Real smooth = (context / wavelength - low) / (static_cast<Real>(options.high_freq_factor) - low);
  return (1 - smooth) * slow + smooth * plain;
}

// `x` is q or k.
template <class Real>
std::vector<double> rope(const Case& c, const Inputs& in, const Tensor& x, const Tensor& result) {
  const int64_t dim = size_of(x, 1), heads = size_of(x, 2), tokens = size_of(x, 3);
  const int64_t rotary_dim = c.options.rotary_dim == 0 ? dim : c.options.rotary_dim;
  std::vector<double> all(static_cast<size_t>(result.count()));
  for (int64_t row = 0; row < result.count() / dim; ++row) {
    const int64_t lead = row / heads / tokens, token = row / heads % tokens;
    const int64_t from = num_leads(x) == 1 ? row % (heads * tokens) : row;
    double* to = all.data() + row * dim;
    for (int64_t i = 0; i < dim; ++i) to[i] = x.get(from * dim + i);
    int64_t position;
    if (!position_of(in, lead, token, position)) continue;
    for (int64_t pair = 0; pair < rotary_dim / 2; ++pair) {
      const int64_t left = c.options.interleave ? 2 * pair : pair;
      const int64_t right = c.options.interleave ? 2 * pair + 1 : pair + rotary_dim / 2;
      const Real angle = static_cast<Real>(position) * frequency_of<Real>(c.options, rotary_dim, pair);
      Real sine = std::sin(angle), cosine = std::cos(angle);
      if (c.max_position > 0) {
        const int64_t entry = std::clamp<int64_t>(position, 0, c.max_position - 1) * rotary_dim + pair;
        cosine = static_cast<Real>(in.cache.get(entry));
        sine = static_cast<Real>(in.cache.get(entry + rotary_dim / 2));
      }
      if (c.options.inverse) sine = -sine;
      const Real a = static_cast<Real>(to[left]), b = static_cast<Real>(to[right]);
      const DType dtype = x.view.dtype;
      to[left] = rounded(static_cast<double>(a * cosine - b * sine), dtype, sizeof(Real) == 4);
      to[right] = rounded(static_cast<double>(b * cosine + a * sine), dtype, sizeof(Real) == 4);
    }
  }
  return all;
}

// As a larger call would have it: several heads of a token for each thread.
void set_heads_per_thread(cuda::Sm80RopePlan& plan, int64_t num_tokens, int heads, int heads_at_once) {
  const int threads = (plan.params.num_heads + heads - 1) / heads;
  plan.spec.heads = heads_at_once;
  plan.params.threads_per_token = cuda::make_divisor(static_cast<unsigned>(threads));
  plan.params.num_slots = static_cast<unsigned>(num_tokens * threads);
  plan.num_blocks = (plan.params.num_slots + plan.params.slots_per_block - 1) / plan.params.slots_per_block;
}

template <Spec kSpec>
void expect_rope(const Case& c, int heads_per_thread = 0) {
  const DType dtype = dtype_of(kSpec.element);
  Inputs in = make_inputs(c, dtype);
  RopeRequest request;
  request.options = c.options;
  const std::array<const Tensor*, RopeProblem::kNumInputs> operands = {&in.q,       &in.k,       &in.indptr,
                                                                       &in.offsets, &in.pos_ids, &in.cache};
  for (int i = 0; i < RopeProblem::kNumInputs; ++i) {
    request.operands[i] = spec_of(RopeProblem::kNames[i], operands[i]->view);
  }
  const RopeProblem problem = validate(request);
  Tensor q_rope(dtype, problem.q_shape(), c.layout), k_rope(dtype, problem.k_shape(), c.layout);
  const auto guards =
      guard(c.layout, {&in.q, &in.k, &in.indptr, &in.offsets, &in.pos_ids, &in.cache, &q_rope, &k_rope});
  RopeArgs args;
  args.q = in.q.view, args.k = in.k.view, args.indptr = in.indptr.view, args.offsets = in.offsets.view;
  args.pos_ids = in.pos_ids.view, args.cos_sin_cache = in.cache.view;
  args.q_rope = q_rope.view, args.k_rope = k_rope.view;
  cuda::Sm80RopePlan plan = plan_sm80_rope(problem, args, cuda::sm80_rope_params(problem));
  if (heads_per_thread > 0) set_heads_per_thread(plan, problem.num_tokens, heads_per_thread, kSpec.heads);
  ASSERT_EQ(plan.spec, kSpec) << "the host chose another kernel";
  run_blocks<cuda::Sm80Rope<kSpec>>(plan.params, plan.num_blocks);
  const int64_t dim = problem.head_dim;
  expect_close(q_rope, rope<float>(c, in, in.q, q_rope), rope<double>(c, in, in.q, q_rope), dtype, dim, "q_rope");
  expect_close(k_rope, rope<float>(c, in, in.k, k_rope), rope<double>(c, in, in.k, k_rope), dtype, dim, "k_rope");
}

RopeOptions options_of(int64_t rotary_dim, bool interleave = false, bool inverse = false) {
  RopeOptions options;
  options.rotary_dim = rotary_dim;
  options.interleave = interleave;
  options.inverse = inverse;
  return options;
}

constexpr Spec kBf16{.element = Element::kBFloat16, .heads = 1};
constexpr Spec kF32{.element = Element::kFloat32, .heads = 1};

TEST(DeviceSm80RopeTest, Sequences) {
  // An empty sequence, and tokens before the first and after the last one, which are copied.
  expect_rope<kBf16>({.q_shape = {13, 6, 64}, .k_shape = {13, 2, 64}, .indptr = {1, 4, 4, 11}, .offsets = {7, 5, 0}});
  expect_rope<kF32>({.q_shape = {9, 3, 128}, .k_shape = {9, 1, 128}, .indptr = {0, 9}, .offsets = {3}});
}
TEST(DeviceSm80RopeTest, NoSequences) {
  expect_rope<kF32>({.q_shape = {3, 1, 8}, .k_shape = {3, 1, 8}, .indptr = {0}, .offsets = {}});
}
TEST(DeviceSm80RopeTest, ManySequences) {
  Ints indptr, offsets;
  for (int32_t i = 0; i <= 37; ++i) indptr.push_back(i * i / 20);
  for (int32_t i = 0; i < 37; ++i) offsets.push_back(100 * i);
  expect_rope<kF32>({.q_shape = {70, 1, 16}, .k_shape = {70, 1, 16}, .indptr = indptr, .offsets = offsets});
}
TEST(DeviceSm80RopeTest, Interleaved) {
  expect_rope<Spec{.element = Element::kBFloat16, .interleaves = true, .heads = 1}>({.q_shape = {7, 2, 64},
                                                                                     .k_shape = {7, 1, 64},
                                                                                     .options = options_of(32, true),
                                                                                     .indptr = {0, 7},
                                                                                     .offsets = {2}});
  expect_rope<Spec{.element = Element::kFloat32, .interleaves = true, .heads = 1}>(
      {.q_shape = {7, 2, 24}, .k_shape = {7, 1, 24}, .options = options_of(0, true), .indptr = {0, 7}, .offsets = {2}});
}
TEST(DeviceSm80RopeTest, PartOfTheHead) {
  expect_rope<kBf16>(
      {.q_shape = {7, 2, 72}, .k_shape = {7, 1, 72}, .options = options_of(32), .indptr = {0, 7}, .offsets = {2}});
  expect_rope<Spec{.element = Element::kFloat32, .is_aligned = false, .heads = 1}>(
      {.q_shape = {7, 2, 59}, .k_shape = {7, 1, 59}, .options = options_of(18), .indptr = {0, 7}, .offsets = {2}});
  expect_rope<Spec{.element = Element::kFloat16, .is_aligned = false, .interleaves = true, .heads = 1}>(
      {.q_shape = {7, 2, 59},
       .k_shape = {7, 1, 59},
       .options = options_of(58, true),
       .indptr = {0, 7},
       .offsets = {2}});
  expect_rope<Spec{.element = Element::kBFloat16, .is_aligned = false, .heads = 1}>(
      {.q_shape = {3, 1, 255}, .k_shape = {3, 1, 255}, .options = options_of(2), .indptr = {0, 3}, .offsets = {2}});
}
TEST(DeviceSm80RopeTest, Strides) {
  expect_rope<kF32>(
      {.q_shape = {7, 3, 16}, .k_shape = {7, 2, 16}, .indptr = {0, 7}, .offsets = {2}, .layout = Layout::kHeadsFirst});
  expect_rope<Spec{.element = Element::kBFloat16, .is_aligned = false, .heads = 1}>(
      {.q_shape = {7, 3, 16}, .k_shape = {7, 2, 16}, .indptr = {0, 7}, .offsets = {2}, .layout = Layout::kSpacedDims});
}
TEST(DeviceSm80RopeTest, Inverse) {
  expect_rope<kF32>({.q_shape = {7, 2, 16},
                     .k_shape = {7, 1, 16},
                     .options = options_of(0, false, true),
                     .indptr = {0, 7},
                     .offsets = {2}});
}
TEST(DeviceSm80RopeTest, Positions) {
  expect_rope<Spec{.element = Element::kFloat16, .has_pos_ids = true, .heads = 1}>(
      {.q_shape = {5, 2, 32}, .k_shape = {5, 1, 32}, .pos_ids = {3, 0, -4, 100, 9}});
}
TEST(DeviceSm80RopeTest, Cache) {
  const Ints pos_ids = {3, 0, -4, 100, 9};
  expect_rope<Spec{.element = Element::kBFloat16, .has_pos_ids = true, .has_cache = true, .heads = 1}>(
      {.q_shape = {5, 2, 64},
       .k_shape = {5, 1, 64},
       .options = options_of(32),
       .pos_ids = pos_ids,
       .max_position = 11});
  expect_rope<Spec{
      .element = Element::kFloat32, .interleaves = true, .has_pos_ids = true, .has_cache = true, .heads = 1}>(
      {.q_shape = {5, 2, 16},
       .k_shape = {5, 1, 16},
       .options = options_of(16, true),
       .pos_ids = pos_ids,
       .max_position = 11});
  expect_rope<Spec{
      .element = Element::kFloat32, .is_aligned = false, .has_pos_ids = true, .has_cache = true, .heads = 1}>(
      {.q_shape = {5, 2, 7}, .k_shape = {5, 1, 7}, .options = options_of(6), .pos_ids = pos_ids, .max_position = 11});
  expect_rope<Spec{
      .element = Element::kBFloat16, .interleaves = true, .has_pos_ids = true, .has_cache = true, .heads = 1}>(
      {.q_shape = {5, 2, 64},
       .k_shape = {5, 1, 64},
       .options = options_of(48, true),
       .pos_ids = pos_ids,
       .max_position = 11});
}
TEST(DeviceSm80RopeTest, LeadingAxes) {
  // All mapped; then k and the indices for all leading indices alike.
  expect_rope<kF32>({.q_shape = {2, 3, 4, 2, 16},
                     .k_shape = {2, 3, 4, 1, 16},
                     .indptr = {0, 3},
                     .offsets = {2},
                     .is_index_mapped = true});
  expect_rope<kF32>({.q_shape = {2, 3, 4, 2, 16}, .k_shape = {1, 1, 4, 1, 16}, .indptr = {0, 3}, .offsets = {2}});
  expect_rope<Spec{.element = Element::kFloat32, .has_pos_ids = true, .heads = 1}>(
      {.q_shape = {3, 4, 2, 16}, .k_shape = {1, 4, 1, 16}, .pos_ids = {1, 5, 2, 3}, .is_index_mapped = true});
}
// More heads than a thread has in flight at once, or fewer.
TEST(DeviceSm80RopeTest, SeveralHeadsAThread) {
  const Case c{.q_shape = {20, 11, 32}, .k_shape = {20, 3, 32}, .indptr = {0, 18}, .offsets = {2}};
  expect_rope<Spec{.element = Element::kBFloat16, .heads = 2}>(c, 3);
  expect_rope<Spec{.element = Element::kBFloat16, .heads = 2}>(c, 8);
  expect_rope<Spec{.element = Element::kFloat32, .heads = 2}>(c, 14);
}
TEST(DeviceSm80RopeTest, LargeCallsHaveSeveralHeadsAThread) {
  expect_rope<Spec{.element = Element::kFloat32, .is_aligned = false, .heads = 2}>(
      {.q_shape = {1024, 250, 2}, .k_shape = {1024, 7, 2}, .indptr = {0, 1024}, .offsets = {2}});
}
TEST(DeviceSm80RopeTest, Llama31) {
  RopeOptions options;
  options.is_llama31 = true;
  options.scale = 8.0;
  options.theta = 5e5;
  expect_rope<kF32>(
      {.q_shape = {16, 2, 128}, .k_shape = {16, 1, 128}, .options = options, .indptr = {0, 16}, .offsets = {9000}});
}

TEST(DeviceSm80RopeTest, DeclinesWhatItCannotServe) {
  RopeProblem problem;
  problem.num_tokens = 8, problem.num_q_heads = problem.num_kv_heads = 1;
  problem.head_dim = problem.rotary_dim = 64;
  EXPECT_EQ(cuda::sm80_rope_declines(problem, parse_target("sm_90a")), "");
  EXPECT_EQ(cuda::sm80_rope_declines(problem, parse_target("cuda")), "");
  EXPECT_NE(cuda::sm80_rope_declines(problem, parse_target("cpu")), "");
  EXPECT_NE(cuda::sm80_rope_declines(problem, parse_target("sm_75")), "");
  problem.lead = {1 << 20, 1 << 10};  // 2^30 tokens, of 2 heads each
  problem.num_tokens = 1;
  EXPECT_NE(cuda::sm80_rope_declines(problem, parse_target("sm_90a")), "");
}

// Angles are as good at the end of a very long context as at its beginning, and fractions of a turn are not lost.
TEST(DeviceSm80RopeTest, AnglesOfFarPositions) {
  RopeProblem problem;
  problem.rotary_dim = 64;
  const cuda::Sm80RopeParams params = cuda::sm80_rope_params(problem);
  for (const int64_t position :
       {int64_t{1}, int64_t{-77}, int64_t{1} << 20, (int64_t{1} << 20) + 1, (int64_t{1} << 31) - 1}) {
    for (int pair = 0; pair < 32; ++pair) {
      float sine, cosine;
      cuda::sine_and_cosine(static_cast<unsigned long long>(position) * params.turns[pair], sine, cosine);
      const double angle = static_cast<double>(position) * std::pow(1e4, -2.0 * pair / 64);
      const double slack = 2e-7 + 4e-16 * std::abs(angle);  // what float64 leaves of such an angle
      EXPECT_NEAR(sine, std::sin(angle), slack) << position << " " << pair;
      EXPECT_NEAR(cosine, std::cos(angle), slack) << position << " " << pair;
    }
  }
}

}  // namespace
}  // namespace heed
