// What the C++ tests of attention compare with: tensors in any layout, attention by its definition in float64 and
// float32, and the one tolerance rule. Independent of the library's own conversions and arithmetic.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "heed/heed.h"

namespace heed::testing_oracle {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ---------------------------------------------------------------------------------------------------------------------
// Storage, bit by bit and independent of the kernel's conversions.

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline double half_value(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const double mantissa = half & 1023;
  const double sign = (half & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa != 0 ? kNaN : sign * kInfinity;
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

// Nearest value with `digits` significant bits and least exponent `min_exponent`, ties to even.
inline double round_to(double x, int digits, int min_exponent, double overflow) {
  if (!std::isfinite(x) || x == 0.0) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int shift = digits - std::max(exponent, min_exponent);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, shift)), -shift);
  return std::abs(rounded) >= overflow ? std::copysign(kInfinity, x) : rounded;
}

inline double round_to(double x, DType dtype) {
  if (dtype == DType::kFloat16) return round_to(x, 11, -13, 65536.0);
  if (dtype == DType::kBFloat16) return round_to(x, 8, -125, std::ldexp(1.0, 128));
  return static_cast<float>(x);
}

inline double epsilon(DType dtype) {
  return dtype == DType::kFloat16 ? 0x1p-10 : dtype == DType::kBFloat16 ? 0x1p-7 : 0x1p-23;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors in any layout.

enum class Layout { kContiguous, kHeadsFirst, kReversedTokens, kSpacedDims, kZeroTokenStride };

struct Tensor {
  TensorView view;
  std::vector<char> memory;

  Tensor() = default;
  Tensor(DType dtype, std::vector<int64_t> shape, Layout layout = Layout::kContiguous) {
    const int rank = static_cast<int>(shape.size());
    std::vector<int> order(rank);
    for (int i = 0; i < rank; ++i) order[i] = i;
    if (layout == Layout::kHeadsFirst) std::swap(order[rank - 2], order[rank - 3]);
    view.dtype = dtype;
    view.rank = rank;
    int64_t stride = layout == Layout::kSpacedDims ? 3 : 1;
    int64_t first = 0;
    for (int i = rank - 1; i >= 0; --i) {
      const int axis = order[i];
      view.shape[axis] = shape[axis];
      view.strides[axis] = stride;
      if (layout == Layout::kZeroTokenStride && axis == rank - 3) {
        view.strides[axis] = 0;
        continue;
      }
      if (layout == Layout::kReversedTokens && axis == rank - 3 && shape[axis] > 0) {
        first = stride * (shape[axis] - 1);
        view.strides[axis] = -stride;
      }
      stride *= std::max<int64_t>(shape[axis], 1);
    }
    const int64_t size = info(dtype).size_bytes;
    memory.assign(static_cast<size_t>((stride + 3) * size), '\x5A');
    view.data = memory.data() + first * size;
  }

  int64_t count() const {
    int64_t total = 1;
    for (int i = 0; i < view.rank; ++i) total *= view.shape[i];
    return total;
  }
  int64_t offset(int64_t flat) const {  // of the element at row-major index `flat`
    int64_t elements = 0;
    for (int i = view.rank - 1; i >= 0; --i) {
      elements += flat % view.shape[i] * view.strides[i];
      flat /= view.shape[i];
    }
    return elements;
  }
  double get(int64_t flat) const {
    const int64_t at = offset(flat);
    if (view.dtype == DType::kFloat32) return static_cast<float*>(view.data)[at];
    if (view.dtype == DType::kInt32) return static_cast<int32_t*>(view.data)[at];
    const uint16_t bits = static_cast<uint16_t*>(view.data)[at];
    return view.dtype == DType::kFloat16 ? half_value(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
  }
  void set(int64_t flat, double x) {
    const int64_t at = offset(flat);
    const double rounded = round_to(x, view.dtype);
    if (view.dtype == DType::kFloat32) static_cast<float*>(view.data)[at] = static_cast<float>(rounded);
    if (view.dtype == DType::kInt32) static_cast<int32_t*>(view.data)[at] = static_cast<int32_t>(x);
    if (view.dtype == DType::kBFloat16) {
      static_cast<uint16_t*>(view.data)[at] = float_bits(static_cast<float>(rounded)) >> 16;
    }
    if (view.dtype == DType::kFloat16) {
      static const auto* const table = [] {
        auto* made = new std::vector<std::pair<double, uint16_t>>;
        for (uint32_t half = 0; half < 0x10000; ++half) {
          const double value = half_value(static_cast<uint16_t>(half));
          if (!std::isnan(value) && half != 0x8000) made->emplace_back(value, half);
        }
        std::sort(made->begin(), made->end());
        return made;
      }();
      const auto found = std::lower_bound(table->begin(), table->end(), rounded,
                                          [](const auto& entry, double value) { return entry.first < value; });
      static_cast<uint16_t*>(view.data)[at] = std::isnan(rounded) ? 0x7E00 : found->second;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// One case, its inputs and what they should give.

struct Case {
  std::string name;
  DType dtype = DType::kFloat32;
  int64_t batch = 1, q_len = 1, kv_len = 1, num_q_heads = 1, num_kv_heads = 1, head_dim_qk = 8, head_dim_v = 8;
  AttentionOptions options{};
  bool has_sinks = false, has_alibi = false, has_segments = false;
  Layout layout = Layout::kContiguous;
  double gain = 1.0;  // of the queries
  std::function<void(Tensor& q, Tensor& k, Tensor& v)> edit{};
  std::vector<double> sinks{};  // of the first heads, where they are not drawn at random
};

struct Inputs {
  Tensor q, k, v, sinks, slopes, q_ids, kv_ids;
};

inline Inputs make_inputs(const Case& c) {
  std::mt19937 random(12345);
  std::normal_distribution<double> normal;
  Inputs in;
  const auto fill = [&](Tensor& tensor, double gain) {
    for (int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, gain * normal(random));
  };
  in.q = Tensor(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_qk}, c.layout);
  in.k = Tensor(c.dtype, {c.batch, c.kv_len, c.num_kv_heads, c.head_dim_qk}, c.layout);
  in.v = Tensor(c.dtype, {c.batch, c.kv_len, c.num_kv_heads, c.head_dim_v}, c.layout);
  fill(in.q, c.gain);
  fill(in.k, 1.0);
  fill(in.v, 1.0);
  if (c.edit) c.edit(in.q, in.k, in.v);
  if (c.has_sinks) {
    in.sinks = Tensor(DType::kFloat32, {c.num_q_heads});
    fill(in.sinks, 3.0);
    for (size_t h = 0; h < c.sinks.size(); ++h) in.sinks.set(static_cast<int64_t>(h), c.sinks[h]);
  }
  if (c.has_alibi) {
    in.slopes = Tensor(DType::kFloat32, {c.num_q_heads});
    for (int64_t h = 0; h < c.num_q_heads; ++h) in.slopes.set(h, std::exp2(-(h % 8) - 1.0));
  }
  if (c.has_segments) {
    in.q_ids = Tensor(DType::kInt32, {c.batch, c.q_len});
    in.kv_ids = Tensor(DType::kInt32, {c.batch, c.kv_len});
    // Packed sequences of 50 tokens; the last one of the queries has no keys.
    for (int64_t i = 0; i < in.q_ids.count(); ++i) in.q_ids.set(i, static_cast<double>(i % c.q_len / 50));
    for (int64_t i = 0; i < in.kv_ids.count(); ++i) {
      const int64_t id = i % c.kv_len / 50;
      in.kv_ids.set(i, static_cast<double>(id == (c.q_len - 1) / 50 ? -7 : id));
    }
  }
  return in;
}

struct Expected {
  std::vector<double> out, lse;  // [B, Lq, Hq, Dv], [B, Hq, Lq]
};

inline bool is_visible(const Case& c, const Inputs& in, int64_t b, int64_t i, int64_t j) {
  const bool is_bottom_right = c.options.causal_align == CausalAlign::kBottomRight;
  const int64_t diagonal = i + (is_bottom_right ? c.kv_len - c.q_len : 0);
  const int64_t left = c.options.window_left;
  const int64_t right = c.options.is_causal ? 0 : c.options.window_right;
  if (left >= 0 && diagonal - j > left) return false;
  if (right >= 0 && j - diagonal > right) return false;
  return !c.has_segments || in.q_ids.get(b * c.q_len + i) == in.kv_ids.get(b * c.kv_len + j);
}

// By the definition, in `Real` arithmetic. With float, weights and outputs are rounded to the dtype as a plain
// implementation would.
template <class Real>
Expected attention(const Case& c, const Inputs& in) {
  const bool is_naive = sizeof(Real) == sizeof(float);
  const auto store = [&](Real x) { return is_naive ? static_cast<Real>(round_to(x, c.dtype)) : x; };
  const Real scale = c.options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(c.head_dim_qk)));
  const Real cap = c.options.softcap;
  const int64_t group = c.num_q_heads / c.num_kv_heads;
  const int64_t offset = c.options.causal_align == CausalAlign::kBottomRight ? c.kv_len - c.q_len : 0;
  Expected result;
  result.out.resize(static_cast<size_t>(c.batch * c.q_len * c.num_q_heads * c.head_dim_v));
  result.lse.resize(static_cast<size_t>(c.batch * c.q_len * c.num_q_heads));
  const auto cache = [](const Tensor& tensor) {
    std::vector<Real> values(static_cast<size_t>(tensor.count()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<Real>(tensor.get(static_cast<int64_t>(i)));
    return values;
  };
  const std::vector<Real> q = cache(in.q);
  const std::vector<Real> k = cache(in.k);
  const std::vector<Real> v = cache(in.v);
  std::vector<Real> weights(static_cast<size_t>(c.kv_len));
  for (int64_t row = 0; row < c.batch * c.q_len * c.num_q_heads; ++row) {
    const int64_t h = row % c.num_q_heads;
    const int64_t i = row / c.num_q_heads % c.q_len;
    const int64_t b = row / c.num_q_heads / c.q_len;
    Real top = -std::numeric_limits<Real>::infinity();
    std::vector<int64_t> keys;
    for (int64_t j = 0; j < c.kv_len; ++j) {
      if (!is_visible(c, in, b, i, j)) continue;
      keys.push_back(j);
      Real s = 0;
      const int64_t kv_row = (b * c.kv_len + j) * c.num_kv_heads + h / group;
      for (int64_t x = 0; x < c.head_dim_qk; ++x) s += q[row * c.head_dim_qk + x] * k[kv_row * c.head_dim_qk + x];
      s *= scale;
      if (cap > 0) s = cap * std::tanh(s / cap);
      if (c.has_alibi) s -= static_cast<Real>(in.slopes.get(h)) * static_cast<Real>(std::abs(i + offset - j));
      weights[j] = s;
      top = s > top || std::isnan(s) ? s : top;
    }
    if (c.has_sinks) top = std::max(top, static_cast<Real>(in.sinks.get(h)));
    const Real shift = top == -std::numeric_limits<Real>::infinity() ? 0 : top;
    Real total = c.has_sinks ? std::exp(static_cast<Real>(in.sinks.get(h)) - shift) : 0;
    for (int64_t j : keys) total += weights[j] = std::exp(weights[j] - shift);
    for (int64_t j : keys) weights[j] = store(weights[j] / (total == 0 ? 1 : total));
    for (int64_t x = 0; x < c.head_dim_v; ++x) {
      Real sum = 0;
      for (int64_t j : keys) {
        sum += weights[j] * v[((b * c.kv_len + j) * c.num_kv_heads + h / group) * c.head_dim_v + x];
      }
      result.out[row * c.head_dim_v + x] = store(sum);
    }
    result.lse[(b * c.num_q_heads + h) * c.q_len + i] = total == 0 ? -kInfinity : shift + std::log(total);
  }
  return result;
}

// What make() gives for the next case of the running test. A test that runs for every instruction set has the same
// cases in the same order for each, so the first one makes what the others find: the oracles take far longer than the
// kernels.
template <class Make>
const auto& once_for_all_targets(const std::string& name, const Make& make) {
  struct Made {
    std::string name;
    decltype(make()) value;
  };
  static std::map<std::pair<std::string, int>, Made> all;
  static const testing::TestInfo* running = nullptr;
  static int number = 0;
  const testing::TestInfo* const test = testing::UnitTest::GetInstance()->current_test_info();
  if (test != running) running = test, number = 0;
  const std::string full = test->name();
  const std::pair key(test->test_suite_name() + full.substr(0, full.find('/')), number++);
  auto at = all.find(key);
  if (at == all.end()) at = all.try_emplace(key, Made{name, make()}).first;
  EXPECT_EQ(at->second.name, name) << "the cases differ among targets";
  return at->second.value;
}

// The one tolerance rule: identical inf and NaN positions; over everything max|x - oracle| <= 2 max|naive - oracle| +
// eps max|oracle|, and per row (everything along the last axis) the same with twice the bound.
inline void expect_close(const Tensor& x, const std::vector<double>& naive, const std::vector<double>& oracle,
                         DType dtype, int64_t row_size, const std::string& what) {
  struct Bound {
    double error = 0, noise = 0, size = 0;
    double limit(double eps) const { return 2 * noise + eps * size; }
  };
  const double eps = epsilon(dtype);
  Bound all;
  for (size_t start = 0; start < oracle.size(); start += static_cast<size_t>(row_size)) {
    Bound row;
    for (size_t i = start; i < start + static_cast<size_t>(row_size); ++i) {
      const double got = x.get(static_cast<int64_t>(i));
      if (!std::isfinite(oracle[i])) {
        ASSERT_TRUE(std::isnan(oracle[i]) ? std::isnan(got) : got == oracle[i])
            << what << ": element " << i << " is " << got << ", expected " << oracle[i];
        continue;
      }
      ASSERT_TRUE(std::isfinite(got)) << what << ": element " << i << " is " << got << ", expected " << oracle[i];
      row.error = std::max(row.error, std::abs(got - oracle[i]));
      row.noise = std::max(row.noise, std::abs(naive[i] - oracle[i]));
      row.size = std::max(row.size, std::abs(oracle[i]));
    }
    ASSERT_LE(row.error, 2 * row.limit(eps)) << what << ": row at element " << start;
    all = {std::max(all.error, row.error), std::max(all.noise, row.noise), std::max(all.size, row.size)};
  }
  ASSERT_LE(all.error, all.limit(eps)) << what;
}

inline AttentionForwardArgs make_args(Inputs& in, Tensor& out, Tensor& lse) {
  AttentionForwardArgs args;
  args.q = in.q.view, args.k = in.k.view, args.v = in.v.view, args.out = out.view, args.lse = lse.view;
  args.sinks = in.sinks.view, args.alibi_slopes = in.slopes.view;
  args.q_segment_ids = in.q_ids.view, args.kv_segment_ids = in.kv_ids.view;
  return args;
}

}  // namespace heed::testing_oracle
