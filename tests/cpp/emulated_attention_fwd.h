// What the tests of the attention forward kernels on the CPU share: the parameters of a case as the host passes them,
// what packed sequences should give, and inputs that are hard.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_oracle.h"
#include "cuda/attention_spec.h"

namespace heed::testing_oracle {

using Ints = std::vector<int32_t>;

// The bounds of packed sequences, whose rows are those of a batch of 1, and how many keys of each are used (empty:
// all); without bounds: a dense batch.
struct Bounds {
  Ints q, k, used{};
};

// ---------------------------------------------------------------------------------------------------------------------
// What the host passes to the kernel.

using Axes = std::vector<long long cuda::DeviceOperand::*>;

inline cuda::DeviceOperand operand_of(const Tensor& tensor, const Axes& axes) {
  cuda::DeviceOperand operand{};
  operand.data = tensor.view.data;
  for (int axis = 0; axis < tensor.view.rank; ++axis) {
    operand.*axes[axis] = tensor.view.shape[axis] == 1 ? 0 : tensor.view.strides[axis];
  }
  return operand;
}

template <class Params>
void set_operands(Params& params, const Inputs& in, const Tensor& out, const Tensor& lse) {
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

template <class Params>
Params make_params(const Case& c) {
  Params params{};
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

inline void set_bounds(cuda::AttentionParams& params, Bounds& bounds) {
  params.batch = static_cast<int>(bounds.q.size()) - 1;
  params.cu_seqlens_q.data = bounds.q.data();
  params.cu_seqlens_q.token = 1;
  params.cu_seqlens_k.data = bounds.k.data();
  params.cu_seqlens_k.token = 1;
  if (bounds.used.empty()) return;
  params.seqused_k.data = bounds.used.data();
  params.seqused_k.token = 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// What should come out.

inline Tensor rows_of(const Tensor& packed, int64_t begin, int64_t len) {
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
    if (!bounds.used.empty()) one.kv_len = std::min<int64_t>(one.kv_len, bounds.used[b]);
    Inputs part;
    part.q = rows_of(in.q, begin, one.q_len);
    part.k = rows_of(in.k, bounds.k[b], one.kv_len);
    part.v = rows_of(in.v, bounds.k[b], one.kv_len);
    part.sinks = in.sinks;
    part.slopes = in.slopes;
    const Expected expected = attention<Real>(one, part);
    std::copy(expected.out.begin(), expected.out.end(), all.out.begin() + begin * c.num_q_heads * c.head_dim_v);
    for (int64_t h = 0; h < c.num_q_heads; ++h) {
      std::copy_n(expected.lse.begin() + h * one.q_len, one.q_len, all.lse.begin() + h * c.q_len + begin);
    }
  }
  return all;
}

// Values of V that are not finite from a key on that only some rows see: the kernel notices, and starts again
// carefully.
inline void spoil_values(Tensor& /*q*/, Tensor& /*k*/, Tensor& v) {
  constexpr int64_t kFirstKey = 40;
  const int64_t row = v.view.shape[2] * v.view.shape[3];
  for (int64_t i = kFirstKey * row; i < v.count(); ++i) v.set(i, i % 3 == 0 ? kInfinity : kNaN);
}

// Rows whose scores reach thousands beside rows of moderate ones: the two round their references differently.
inline void make_mixed(Tensor& q, Tensor& k, Tensor& /*v*/) {
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

}  // namespace heed::testing_oracle
