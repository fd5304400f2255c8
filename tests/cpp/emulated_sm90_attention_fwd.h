// What the tests of the Hopper forward kernel on the CPU share: the kernel with the tensor maps that the host makes, in
// several schedules, beside the float64 oracle.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "cuda/device/sm90_attention_fwd.cuh"
#include "cuda/tensor_map_host.h"
#include "emulated_attention_fwd.h"
#include "guarded.h"

namespace heed::testing_oracle {

using cuda::Element;
using cuda::Sm90AttentionFwdParams;
using cuda::Sm90AttentionFwdSpec;

// ---------------------------------------------------------------------------------------------------------------------
// What the host passes to the kernel.

template <Sm90AttentionFwdSpec kSpec>
void make_maps(Sm90AttentionFwdParams& params, const Case& c) {
  constexpr int kKvRows = cuda::sm90_attention_fwd_tile(kSpec).kv_rows;
  const auto make = [&](cuda::TensorMap& map, const cuda::DeviceOperand& operand, int64_t len, int64_t num_heads,
                        int64_t dim, int box_rows, int64_t packed_heads = 1) {
    const cuda::MappedOperand mapped{operand,  kSpec.element, std::max<int64_t>(len, 1), num_heads, dim,
                                     box_rows, packed_heads};
    const cuda::Misfit misfit = kSpec.is_varlen ? make_ragged_map(map, mapped) : make_dense_map(map, mapped, params);
    ASSERT_FALSE(misfit.exists()) << misfit.got;
  };
  const int64_t packed_heads = int64_t{1} << params.head_shift;
  make(params.q_map, params.q, c.q_len, c.num_q_heads, c.head_dim_qk, 64, packed_heads);
  make(params.k_map, params.k, c.kv_len, c.num_kv_heads, c.head_dim_qk, kKvRows);
  make(params.v_map, params.v, c.kv_len, c.num_kv_heads, c.head_dim_v, kKvRows);
  make(params.out_map, params.out, c.q_len, c.num_q_heads, c.head_dim_v, 16, packed_heads);
}

// How blocks share the tiles, and when asynchronous operations happen.
struct Schedule {
  const char* name;
  int num_blocks;
  bool takes_turns;  // by a counter; otherwise each block has its share
  bool copies_late, copies_vary;
  bool is_replayed;  // as graphs do: with the same parameters again
};
inline constexpr Schedule kSchedules[] = {
    {"one block, copies arrive early: ", 1, true, false, false, false},
    {"shares of three blocks, copies arrive late: ", 3, false, true, false, false},
    {"two blocks, copies arrive at random: ", 2, true, false, true, false}};
inline constexpr Schedule kReplayed = {"replayed: ", 2, true, false, true, true};

template <Sm90AttentionFwdSpec kSpec>
void run_kernel(const Sm90AttentionFwdParams& problem, const Schedule& schedule) {
  using Kernel = cuda::Sm90AttentionFwd<kSpec>;
  constexpr int kQRows = cuda::sm90_attention_fwd_tile(kSpec).q_rows();
  Sm90AttentionFwdParams params = problem;
  device_emulation::block.copies_late = schedule.copies_late;
  device_emulation::block.copies_vary = schedule.copies_vary;
  const int num_rows = params.q_len << params.head_shift;
  params.num_tiles = kSpec.is_varlen ? num_rows / kQRows + params.batch + 2 : (num_rows + kQRows - 1) / kQRows;
  params.num_tiles_in_all = static_cast<unsigned>(params.num_tiles) * params.num_heads;
  const unsigned num_blocks = std::min(static_cast<unsigned>(schedule.num_blocks), params.num_tiles_in_all);
  // What the counter's memory holds is anybody's; with the nonce of this launch it is zeros at the end.
  alignas(16) unsigned counter[4] = {7, 8, 9, 10};
  params.next_tile = schedule.takes_turns ? counter : nullptr;
  for (unsigned i = 0; i < 3; ++i) params.nonce[i] = 80 + i;
  gridDim.x = num_blocks;
  for (const bool is_replay : {false, true}) {
    if (is_replay && !schedule.is_replayed) break;
    for (unsigned index = num_blocks; index-- > 0;) {  // the later ones leave no more than its first tile to the first
      device_emulation::run_block(index, Kernel::kNumThreads, Kernel::kSharedBytes, [&] { Kernel::run(params); });
    }
    if (!schedule.takes_turns) continue;
    for (const unsigned word : counter) EXPECT_EQ(word, 0u);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Comparison.

// The inputs between and behind the sequences, which nobody may read.
inline void poison_outside(Tensor& tensor, const Ints& bounds, const Ints& used) {
  if (bounds.empty()) return;
  const int64_t row = tensor.count() / tensor.view.shape[1];
  for (int64_t token = 0; token < tensor.view.shape[1]; ++token) {
    bool is_inside = false;
    for (size_t b = 0; b + 1 < bounds.size(); ++b) {
      const int64_t end = used.empty() ? bounds[b + 1] : std::min(bounds[b + 1], bounds[b] + used[b]);
      is_inside = is_inside || (token >= bounds[b] && token < end);
    }
    for (int64_t i = 0; !is_inside && i < row; ++i) tensor.set(token * row + i, kNaN);
  }
}

// What else a case has.
struct Details {
  Bounds bounds{};
  std::function<void(Sm90AttentionFwdParams&)> edit{};  // of the parameters
  int head_shift = 0;                                   // the exponent of 2 of the heads of a tile
};

// In every schedule, and in each with the same bits.
template <Sm90AttentionFwdSpec kSpec>
void expect_matches(const Case& c, const Details& details = {}) {
  Bounds bounds = details.bounds;
  Inputs in = make_inputs(c);
  poison_outside(in.q, bounds.q, {});
  poison_outside(in.k, bounds.k, bounds.used);
  poison_outside(in.v, bounds.k, bounds.used);
  const Guarded guarded_q(in.q);
  const Guarded guarded_k(in.k);
  const Guarded guarded_v(in.v);
  const Expected oracle = packed_attention<double>(c, in, bounds);
  const Expected naive = packed_attention<float>(c, in, bounds);
  std::vector<double> first;
  for (const Schedule& schedule : kSchedules) {
    Tensor out(c.dtype, {c.batch, c.q_len, c.num_q_heads, c.head_dim_v});
    Tensor lse(DType::kFloat32, {c.batch, c.num_q_heads, c.q_len});
    const Guarded guarded_out(out);
    const Guarded guarded_lse(lse);
    auto params = make_params<Sm90AttentionFwdParams>(c);
    params.head_shift = details.head_shift;
    params.num_heads >>= details.head_shift;
    set_operands(params, in, out, lse);
    make_maps<kSpec>(params, c);
    if (kSpec.is_varlen) set_bounds(params, bounds);
    if (details.edit) details.edit(params);
    run_kernel<kSpec>(params, schedule);
    expect_close(out, naive.out, oracle.out, c.dtype, c.head_dim_v, std::string(schedule.name) + "out");
    if (params.lse.data != nullptr) {
      expect_close(lse, naive.lse, oracle.lse, DType::kFloat32, c.q_len, std::string(schedule.name) + "lse");
    }
    std::vector<double> values;
    for (int64_t i = 0; i < out.count(); ++i) values.push_back(std::isnan(out.get(i)) ? 0.0 : out.get(i));
    for (int64_t i = 0; i < lse.count(); ++i) values.push_back(std::isnan(lse.get(i)) ? 0.0 : lse.get(i));
    if (first.empty()) first = values;
    EXPECT_TRUE(values == first) << schedule.name << "not the same bits";
  }
}

constexpr Sm90AttentionFwdSpec spec_of(Element element, int head_dim_qk, int head_dim_v, bool has_mask = false) {
  return {.element = element, .head_dim_qk = head_dim_qk, .head_dim_v = head_dim_v, .has_mask = has_mask};
}
inline constexpr Sm90AttentionFwdSpec kBf16 = spec_of(Element::kBFloat16, 128, 128);
inline constexpr Sm90AttentionFwdSpec kBf16Masked = spec_of(Element::kBFloat16, 128, 128, true);
inline constexpr Sm90AttentionFwdSpec kF16 = spec_of(Element::kFloat16, 128, 128);

constexpr Sm90AttentionFwdSpec varlen(Sm90AttentionFwdSpec spec) {
  spec.is_varlen = true;
  return spec;
}

// Lengths that fill no tile, and two query heads that share one of K and V.
inline Case case_of(DType dtype, int64_t q_len, int64_t kv_len, int64_t head_dim = 128) {
  Case c;
  c.dtype = dtype;
  c.q_len = q_len;
  c.kv_len = kv_len;
  c.num_q_heads = 2;
  c.head_dim_qk = head_dim;
  c.head_dim_v = head_dim;
  return c;
}
inline Case causal_case_of(DType dtype, int64_t q_len, int64_t kv_len, CausalAlign align, int64_t head_dim = 128) {
  Case c = case_of(dtype, q_len, kv_len, head_dim);
  c.options.is_causal = true;
  c.options.causal_align = align;
  return c;
}

// Scores that grow along the keys, by row and by warp: references get too old, and steps are computed again.
inline void make_growing(Tensor& q, Tensor& k, Tensor& /*v*/) {
  const int64_t dim = q.view.shape[3];
  for (int64_t row = 0; row < q.count() / dim; ++row) {
    const int64_t token = row / q.view.shape[2];
    q.set(row * dim, token % 3 == 0 ? 0.0 : static_cast<double>(token) / 4);
  }
  for (int64_t row = 0; row < k.count() / dim; ++row) {
    k.set(row * dim, static_cast<double>(row / k.view.shape[2]) / 2);
  }
}

}  // namespace heed::testing_oracle
