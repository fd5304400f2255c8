// The CPU kernel of rotary embeddings: every instruction set of this build against float64.
#include <optional>

#include "cpu_small_ops.h"
#include "guarded.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary

struct Case {
  std::string name{};
  DType dtype = DType::kFloat32;
  std::vector<int64_t> lead{}, q_lead{}, k_lead{}, list_lead{};  // the first: full sizes
  int64_t num_tokens = 1, num_q_heads = 2, num_kv_heads = 1, head_dim = 8;
  std::vector<double> indptr{}, offsets{};  // of one leading index, or
  std::vector<double> pos_ids{};
  RopeOptions options{};
  Layout layout = Layout::kContiguous;
};

struct Operands {
  Tensor q, k, indptr, offsets, pos_ids, cache;
};

// Lists are repeated over their leading axes, shifted so that they differ.
Tensor list_of(const std::vector<int64_t>& lead, const std::vector<double>& values, double shift) {
  std::vector<double> all;
  for (int64_t i = 0; i < product_of(lead); ++i) {
    for (double value : values) all.push_back(value + static_cast<double>(i) * shift);
  }
  return tensor_of(DType::kInt32, shape_of(lead, {static_cast<int64_t>(values.size())}), all);
}

Operands make_operands(const Case& c) {
  Operands in;
  in.q = random_tensor(c.dtype, shape_of(c.q_lead, {c.num_tokens, c.num_q_heads, c.head_dim}), 1, 1.0, c.layout);
  in.k = random_tensor(c.dtype, shape_of(c.k_lead, {c.num_tokens, c.num_kv_heads, c.head_dim}), 2, 1.0, c.layout);
  if (c.indptr.empty()) {
    in.pos_ids = list_of(c.list_lead, c.pos_ids, 17.0);
  } else {
    in.indptr = list_of(c.list_lead, c.indptr, 0.0);
    in.offsets = list_of(c.list_lead, c.offsets, 1000.0);
  }
  return in;
}

RopeArgs args_of(const Operands& in, const Tensor& q_rope, const Tensor& k_rope) {
  RopeArgs args;
  args.q = in.q.view, args.k = in.k.view, args.indptr = in.indptr.view, args.offsets = in.offsets.view;
  args.pos_ids = in.pos_ids.view, args.cos_sin_cache = in.cache.view;
  args.q_rope = q_rope.view, args.k_rope = k_rope.view;
  return args;
}

// The position of a token, if it is in a sequence.
std::optional<double> position_of(const Case& c, const Operands& in, int64_t lead_index, int64_t token) {
  if (c.indptr.empty()) {
    const auto count = static_cast<int64_t>(c.pos_ids.size());
    return in.pos_ids.get(broadcast_index(c.lead, in.pos_ids.view, lead_index) * count + token);
  }
  const auto count = static_cast<int64_t>(c.offsets.size());
  const int64_t index = broadcast_index(c.lead, in.offsets.view, lead_index);
  for (int64_t s = 0; s < count; ++s) {
    const double begin = in.indptr.get(index * (count + 1) + s);
    const double end = in.indptr.get(index * (count + 1) + s + 1);
    if (static_cast<double>(token) >= begin && static_cast<double>(token) < end) {
      return in.offsets.get(index * count + s) + static_cast<double>(token) - begin;
    }
  }
  return std::nullopt;
}

template <class Real>
Real frequency_of(const RopeOptions& options, int64_t rotary_dim, int64_t pair) {
  const auto scale = static_cast<Real>(options.scale);
  Real frequency =
      std::pow(static_cast<Real>(options.theta), static_cast<Real>(-2 * pair) / static_cast<Real>(rotary_dim));
  if (!options.is_llama31) return frequency / scale;
  const auto low = static_cast<Real>(options.low_freq_factor);
  const auto high = static_cast<Real>(options.high_freq_factor);
  const Real wavelength = static_cast<Real>(2 * 3.14159265358979323846) / frequency;
  const Real periods = static_cast<Real>(options.old_context_len) / wavelength;
  if (periods < low) return frequency / scale;
  if (periods > high) return frequency;
  const Real smooth = (periods - low) / (high - low);
  return (1 - smooth) * frequency / scale + smooth * frequency;
}

// By the definition, q or k.
template <class Real>
std::vector<double> expected(const Case& c, const Operands& in, const Tensor& x, int64_t num_heads) {
  const int64_t d = c.head_dim;
  const int64_t rotary_dim = c.options.rotary_dim == 0 ? d : c.options.rotary_dim;
  const std::vector<Real> values = values_of<Real>(x);
  std::vector<double> result;
  for (int64_t index = 0; index < product_of(c.lead); ++index) {
    const Real* at = values.data() + broadcast_index(c.lead, x.view, index) * c.num_tokens * num_heads * d;
    for (int64_t token = 0; token < c.num_tokens; ++token) {
      const std::optional<double> position = position_of(c, in, index, token);
      for (int64_t head = 0; head < num_heads; ++head, at += d) {
        std::vector<Real> row(at, at + d);
        for (int64_t i = 0; position && i < rotary_dim / 2; ++i) {
          const Real angle = static_cast<Real>(*position) * frequency_of<Real>(c.options, rotary_dim, i);
          const Real cos = std::cos(angle);
          const Real sin = c.options.inverse ? -std::sin(angle) : std::sin(angle);
          const int64_t first = c.options.interleave ? 2 * i : i;
          const int64_t second = c.options.interleave ? 2 * i + 1 : i + rotary_dim / 2;
          row[first] = at[first] * cos - at[second] * sin;
          row[second] = at[second] * cos + at[first] * sin;
        }
        for (Real value : row) result.push_back(stored<Real>(value, c.dtype));
      }
    }
  }
  return result;
}

class Rope : public EveryTarget {
 protected:
  static void check(const Case& c) {
    SCOPED_TRACE(c.name);
    const Operands in = make_operands(c);
    Tensor q_rope(c.dtype, shape_of(c.lead, {c.num_tokens, c.num_q_heads, c.head_dim}), c.layout);
    Tensor k_rope(c.dtype, shape_of(c.lead, {c.num_tokens, c.num_kv_heads, c.head_dim}), c.layout);
    apply_rope(args_of(in, q_rope, k_rope), c.options);
    compare(c, in, in.q, q_rope, c.num_q_heads, " q");
    compare(c, in, in.k, k_rope, c.num_kv_heads, " k");
  }

 private:
  static void compare(const Case& c, const Operands& in, const Tensor& x, const Tensor& result, int64_t num_heads,
                      const std::string& what) {
    const std::vector<double> oracle = expected<double>(c, in, x, num_heads);
    expect_close(result, expected<float>(c, in, x, num_heads), oracle, c.dtype, row_size_of(c.head_dim, oracle),
                 c.name + what);
  }
};

INSTANTIATE_TEST_SUITE_P(, Rope, testing::ValuesIn(cpu_targets()), target_name);

TEST_P(Rope, HeadDimsAndDtypes) {
  struct Dims {
    int64_t head_dim, rotary_dim;
  };
  for (DType dtype : kFloats) {
    for (Dims dims :
         {Dims{2, 0}, {3, 2}, {8, 0}, {18, 0}, {34, 30}, {59, 58}, {64, 32}, {80, 0}, {128, 0}, {255, 254}, {256, 0}}) {
      for (bool interleave : {false, true}) {
        for (bool inverse : {false, true}) {
          Case c{.name = std::string(info(dtype).name) + " D " + std::to_string(dims.head_dim) + " rotary " +
                         std::to_string(dims.rotary_dim) + (interleave ? " interleave" : ""),
                 .dtype = dtype,
                 .num_tokens = 11,
                 .num_q_heads = 3,
                 .num_kv_heads = 2,
                 .head_dim = dims.head_dim,
                 .indptr = {0, 4, 4, 11},
                 .offsets = {0, 5, 100}};
          c.options.rotary_dim = dims.rotary_dim;
          c.options.interleave = interleave;
          c.options.inverse = inverse;
          check(c);
        }
      }
    }
  }
}

TEST_P(Rope, FarPositions) {
  for (double offset : {-5.0, 4095.0, 1048576.0, 16777216.0, 2147483646.0}) {
    for (bool is_llama31 : {false, true}) {
      Case c{.name = "offset " + std::to_string(offset),
             .num_tokens = 3,
             .head_dim = 128,
             .indptr = {0, 3},
             .offsets = {offset}};
      c.options.is_llama31 = is_llama31;
      if (is_llama31) c.options.scale = 8.0, c.options.theta = 5e5;
      check(c);
    }
  }
}

TEST_P(Rope, ScalesAndBases) {
  for (double scale : {0.25, 1.0, 8.0}) {
    for (double theta : {1.0, 100.0, 5e5}) {
      for (double context : {64.0, 8192.0}) {
        Case c{.name = "scale " + std::to_string(scale) + " theta " + std::to_string(theta),
               .num_tokens = 40,
               .head_dim = 64,
               .indptr = {0, 40},
               .offsets = {7000}};
        c.options.scale = scale;
        c.options.theta = theta;
        check(c);
        c.name += " llama31";
        c.options.is_llama31 = true;
        c.options.old_context_len = context;
        check(c);
      }
    }
  }
}

// Tokens before, between and after the sequences pass through bit by bit, NaN payloads included; lists that decrease or
// point outside touch nothing outside the tensors.
TEST_P(Rope, TokensOutsideEverySequence) {
  for (DType dtype : kFloats) {
    Case c{.name = "outside",
           .dtype = dtype,
           .num_tokens = 12,
           .head_dim = 20,
           .indptr = {3, 3, 7, 7, 10},
           .offsets = {9, 0, 4, 1}};
    check(c);
    Operands in = make_operands(c);
    std::memset(in.q.view.data, 0xFD, static_cast<size_t>(in.q.count() * info(dtype).size_bytes));
    Tensor q_rope(dtype, {12, 2, 20});
    Tensor k_rope(dtype, {12, 1, 20});
    apply_rope(args_of(in, q_rope, k_rope));
    const size_t token_bytes = static_cast<size_t>(2 * 20 * info(dtype).size_bytes);
    EXPECT_EQ(std::memcmp(in.q.view.data, q_rope.view.data, 3 * token_bytes), 0);
    EXPECT_EQ(std::memcmp(static_cast<char*>(in.q.view.data) + 10 * token_bytes,
                          static_cast<char*>(q_rope.view.data) + 10 * token_bytes, 2 * token_bytes),
              0);
    for (const std::vector<double>& indptr :
         {std::vector<double>{5, 2, 9, 1, 20}, {-7, -3, 400, 2147483647, -2147483648.0}, {12, 12, 12, 12, 12}}) {
      Operands odd = make_operands(c);
      odd.indptr = tensor_of(DType::kInt32, {5}, indptr);
      const Guarded guards[] = {Guarded(odd.q),       Guarded(odd.k),  Guarded(odd.indptr),
                                Guarded(odd.offsets), Guarded(q_rope), Guarded(k_rope)};
      apply_rope(args_of(odd, q_rope, k_rope));
    }
  }
}

// Results in the operands' own memory: the same bits as elsewhere, and as the oracle's.
TEST_P(Rope, InPlace) {
  for (DType dtype : kFloats) {
    for (Layout layout : {Layout::kContiguous, Layout::kSpacedDims}) {
      for (int64_t head_dim : {6, 8, 24, 40, 66, 96, 200, 256}) {
        for (bool interleave : {false, true}) {
          Case c{.name = "in place D " + std::to_string(head_dim) + (interleave ? " interleave" : ""),
                 .dtype = dtype,
                 .num_tokens = 5,
                 .head_dim = head_dim,
                 .indptr = {0, 4},
                 .offsets = {11},
                 .layout = layout};
          SCOPED_TRACE(c.name);
          c.options.rotary_dim = head_dim - 2 * (head_dim % 4);
          c.options.interleave = interleave;
          check(c);
          const Operands in = make_operands(c);
          Tensor q_rope(dtype, {5, 2, head_dim});
          Tensor k_rope(dtype, {5, 1, head_dim});
          apply_rope(args_of(in, q_rope, k_rope), c.options);
          const Operands own = make_operands(c);
          apply_rope(args_of(own, own.q, own.k), c.options);
          EXPECT_EQ(values_of<float>(own.q), values_of<float>(q_rope));
          EXPECT_EQ(values_of<float>(own.k), values_of<float>(k_rope));
        }
      }
    }
  }
}

TEST_P(Rope, PositionsOfTheirOwn) {
  Case c{.name = "pos_ids", .num_tokens = 9, .head_dim = 33, .pos_ids = {0, 5, 5, 1048577, 2147483647, -3, 2, 1, 7}};
  c.options.rotary_dim = 32;
  check(c);
}

TEST_P(Rope, CacheOfCosinesAndSines) {
  constexpr int64_t kPositions = 50;
  for (DType dtype : kFloats) {
    for (bool interleave : {false, true}) {
      for (bool inverse : {false, true}) {
        // Clamped to the cache: -4 is 0, 1000 is 49.
        Case c{.name = "cache", .dtype = dtype, .num_tokens = 5, .head_dim = 40, .pos_ids = {3, 49, 0, -4, 1000}};
        c.options.rotary_dim = 24;
        c.options.interleave = interleave;
        c.options.inverse = inverse;
        Operands in = make_operands(c);
        std::vector<double> cache;
        for (int64_t position = 0; position < kPositions; ++position) {
          for (int part = 0; part < 2; ++part) {
            for (int64_t i = 0; i < 12; ++i) {
              const double angle = static_cast<double>(position) * frequency_of<double>(c.options, 24, i);
              cache.push_back(part == 0 ? std::cos(angle) : std::sin(angle));
            }
          }
        }
        in.cache = tensor_of(DType::kFloat32, {kPositions, 24}, cache);
        Tensor q_rope(dtype, {5, 2, 40});
        Tensor k_rope(dtype, {5, 1, 40});
        apply_rope(args_of(in, q_rope, k_rope), c.options);
        in.pos_ids = tensor_of(DType::kInt32, {5}, {3, 49, 0, 0, 49});
        expect_close(q_rope, expected<float>(c, in, in.q, 2), expected<double>(c, in, in.q, 2), dtype, 40, "q");
        expect_close(k_rope, expected<float>(c, in, in.k, 1), expected<double>(c, in, in.k, 1), dtype, 40, "k");
      }
    }
  }
}

TEST_P(Rope, LayoutsAndBroadcasts) {
  for (DType dtype : kFloats) {
    for (Layout layout : {Layout::kHeadsFirst, Layout::kReversedTokens, Layout::kSpacedDims}) {
      for (bool interleave : {false, true}) {
        Case c{.name = "layout " + std::to_string(static_cast<int>(layout)),
               .dtype = dtype,
               .num_tokens = 6,
               .num_q_heads = 4,
               .num_kv_heads = 2,
               .head_dim = 48,
               .indptr = {0, 2, 6},
               .offsets = {3, 40},
               .layout = layout};
        c.options.interleave = interleave;
        check(c);
      }
    }
  }
  struct Leads {
    std::vector<int64_t> full, q, k, lists;
  };
  for (const Leads& leads : {Leads{{3}, {3}, {1}, {1}},
                             {{3}, {1}, {3}, {3}},
                             {{3}, {1}, {1}, {3}},
                             {{3}, {3}, {3}, {1}},
                             {{2, 3}, {2, 1}, {1, 3}, {2, 3}},
                             {{2, 3}, {2, 3}, {2, 3}, {1, 3}}}) {
    check({.name = "leading axes",
           .lead = leads.full,
           .q_lead = leads.q,
           .k_lead = leads.k,
           .list_lead = leads.lists,
           .num_tokens = 7,
           .head_dim = 16,
           .indptr = {1, 3, 6},
           .offsets = {0, 9}});
    check({.name = "leading axes, pos_ids",
           .lead = leads.full,
           .q_lead = leads.q,
           .k_lead = leads.k,
           .list_lead = leads.lists,
           .num_tokens = 3,
           .head_dim = 16,
           .pos_ids = {4, 0, 11}});
  }
}

TEST_P(Rope, NoTokensAndNoSequences) {
  check({.name = "no tokens", .num_tokens = 0, .indptr = {0, 0}, .offsets = {4}});
  check({.name = "no sequences", .num_tokens = 3, .indptr = {0}, .offsets = {}});
}

// Many tokens: shared among threads, and past the caches; the bytes are those of small calls.
TEST(RopeCalls, LargeCallsGiveTheBytesOfSmallOnes) {
  constexpr int64_t kTokens = 5003;
  Case c{.dtype = DType::kFloat16, .num_tokens = kTokens, .num_q_heads = 20, .num_kv_heads = 3, .head_dim = 128};
  c.indptr = {10, 700, 4000, 5000};
  c.offsets = {0, 70, 5};
  Operands in = make_operands(c);
  Tensor q_rope(c.dtype, {kTokens, 20, 128});
  Tensor k_rope(c.dtype, {kTokens, 3, 128});
  apply_rope(args_of(in, q_rope, k_rope), c.options);
  Operands small = in;
  Tensor small_q(c.dtype, {1, 20, 128});
  Tensor small_k(c.dtype, {1, 3, 128});
  for (int64_t token = 3; token < kTokens; token += 123) {
    const auto at = [&](const Tensor& tensor, int64_t heads) {
      return static_cast<uint16_t*>(tensor.view.data) + token * heads * 128;
    };
    const std::optional<double> position = position_of(c, in, 0, token);
    small.q.view = TensorView::contiguous(at(in.q, 20), c.dtype, {1, 20, 128});
    small.k.view = TensorView::contiguous(at(in.k, 3), c.dtype, {1, 3, 128});
    small.indptr = tensor_of(DType::kInt32, {2}, {0, position ? 1.0 : 0.0});
    small.offsets = tensor_of(DType::kInt32, {1}, {position.value_or(0.0)});
    apply_rope(args_of(small, small_q, small_k), c.options);
    ASSERT_EQ(std::memcmp(small_q.view.data, at(q_rope, 20), 20 * 128 * 2), 0) << token;
    ASSERT_EQ(std::memcmp(small_k.view.data, at(k_rope, 3), 3 * 128 * 2), 0) << token;
  }
}

}  // namespace
}  // namespace heed
