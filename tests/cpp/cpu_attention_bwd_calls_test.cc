// The CPU attention backward kernel as a library function: batches of variable lengths, leading axes, huge strides,
// callers at once, and how its work is cut.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "attention_bwd_oracle.h"
#include "cpu/attention_bwd_schedule.h"
#include "heed/heed.h"

namespace heed {
namespace {

using namespace testing_oracle;  // NOLINT(google-build-using-namespace): this file's vocabulary
using Ints = std::vector<int32_t>;

Tensor int_tensor(const Ints& values) {
  Tensor tensor(DType::kInt32, {static_cast<int64_t>(values.size())});
  for (size_t i = 0; i < values.size(); ++i) tensor.set(static_cast<int64_t>(i), values[i]);
  return tensor;
}

// Without its batch axis, of size 1.
TensorView packed(TensorView view) {
  std::copy(view.shape.begin() + 1, view.shape.end(), view.shape.begin());
  std::copy(view.strides.begin() + 1, view.strides.end(), view.strides.begin());
  view.rank -= 1;
  return view;
}

// `len` entries of `axis` from `begin` on.
TensorView slice(TensorView view, int axis, int64_t begin, int64_t len) {
  view.data = static_cast<float*>(view.data) + begin * view.strides[axis];
  view.shape[axis] = len;
  return view;
}

void fill(Tensor& tensor, double value) {
  for (int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, value);
}

struct Lengths {
  Ints cu_q, cu_k, used;  // the last two may be empty
};

// All operands of a float32 case with one batch row, and the results of a call with `lengths` on them as packed.
struct VarlenCall {
  Case c;
  Lengths lengths;
  Inputs in;
  Cotangents more;
  GradientTensors got;
  Tensor cu_q, cu_k, used;

  VarlenCall(const Case& of, Lengths given) : c(of), lengths(std::move(given)), in(make_inputs(c)) {
    more = make_cotangents(c, in, true);
    got = GradientTensors(c, Layout::kContiguous);
    cu_q = int_tensor(lengths.cu_q), cu_k = int_tensor(lengths.cu_k), used = int_tensor(lengths.used);
  }

  std::pair<int64_t, int64_t> queries(size_t b) const { return {lengths.cu_q[b], lengths.cu_q[b + 1]}; }
  std::pair<int64_t, int64_t> keys(size_t b) const {
    const Ints& cu = lengths.cu_k.empty() ? lengths.cu_q : lengths.cu_k;
    const int64_t len = cu[b + 1] - cu[b];
    return {cu[b], cu[b] + (lengths.used.empty() ? len : std::min<int64_t>(len, lengths.used[b]))};
  }
  size_t num_sequences() const { return lengths.cu_q.size() - 1; }

  void run() {
    AttentionForwardArgs forward = make_args(in, more.out, more.lse);
    for (TensorView* view : {&forward.q, &forward.k, &forward.v, &forward.out, &forward.lse}) *view = packed(*view);
    AttentionBackwardArgs args = make_backward_args(in, more, got);
    for (TensorView* view : {&args.q, &args.k, &args.v, &args.out, &args.lse, &args.dout, &args.dlse, &args.dq,
                             &args.dk, &args.dv, &args.dsinks, &args.dalibi_slopes}) {
      if (view->defined()) *view = packed(*view);
    }
    args.cu_seqlens_q = forward.cu_seqlens_q = cu_q.view;
    if (!lengths.cu_k.empty()) args.cu_seqlens_k = forward.cu_seqlens_k = cu_k.view;
    if (!lengths.used.empty()) args.seqused_k = forward.seqused_k = used.view;
    attention_forward(forward, c.options);
    run_backward(args, c.options, got);
  }

  // The gradients of sequence b by a dense call of its own.
  GradientTensors alone(size_t b) {
    const auto [q_begin, q_end] = queries(b);
    const auto [k_begin, k_end] = keys(b);
    Case one = c;
    one.q_len = q_end - q_begin;
    one.kv_len = k_end - k_begin;
    GradientTensors part(one, Layout::kContiguous);
    AttentionBackwardArgs args = make_backward_args(in, more, part);
    for (TensorView* view : {&args.q, &args.out, &args.dout}) *view = slice(*view, 1, q_begin, one.q_len);
    for (TensorView* view : {&args.k, &args.v}) *view = slice(*view, 1, k_begin, one.kv_len);
    for (TensorView* view : {&args.lse, &args.dlse}) *view = slice(*view, 2, q_begin, one.q_len);
    run_backward(args, c.options, part);
    return part;
  }
};

void expect_rows(const Tensor& whole, int64_t begin, const Tensor& part, const std::string& what) {
  const int64_t row = part.view.shape[2] * part.view.shape[3];
  for (int64_t i = 0; i < part.count(); ++i) {
    ASSERT_EQ(whole.get(begin * row + i), part.get(i)) << what << ", row " << begin + i / row;
  }
}

Case varlen_case(bool is_causal) {
  Case c{.name = "packed",
         .q_len = 700,
         .kv_len = 900,
         .num_q_heads = 4,
         .num_kv_heads = 2,
         .head_dim_qk = 24,
         .head_dim_v = 40};
  c.options.is_causal = is_causal;
  return c;
}

// Sequences of 0 to 400 queries with room between and around them.
const Lengths kMixed = {{7, 7, 57, 58, 458, 458, 501, 650, 650},
                        {3, 20, 73, 73, 630, 631, 690, 800, 800},
                        {17, 50, 0, 540, 1, 1000, 90, 0}};

// Each sequence is bitwise what a dense call gives for it alone, and everything outside is exactly 0, whatever it
// holds.
TEST(CpuAttentionBwdVarlen, ASequenceIsWhatItIsAlone) {
  for (bool is_causal : {false, true}) {
    VarlenCall call(varlen_case(is_causal), kMixed);
    std::vector<bool> in_q(700), in_k(900);
    for (size_t b = 0; b < call.num_sequences(); ++b) {
      const auto [q_begin, q_end] = call.queries(b);
      const auto [k_begin, k_end] = call.keys(b);
      std::fill(in_q.begin() + q_begin, in_q.begin() + q_end, true);
      std::fill(in_k.begin() + k_begin, in_k.begin() + k_end, true);
    }
    for (Tensor* tensor : {&call.in.q, &call.in.k, &call.in.v, &call.more.dout}) {
      const std::vector<bool>& used = tensor->view.shape[1] == 700 ? in_q : in_k;
      const int64_t row = tensor->view.shape[2] * tensor->view.shape[3];
      for (int64_t i = 0; i < tensor->count(); ++i) {
        if (!used[static_cast<size_t>(i / row)]) tensor->set(i, kNaN);
      }
    }
    call.run();
    for (size_t b = 0; b < call.num_sequences(); ++b) {
      GradientTensors part = call.alone(b);
      expect_rows(call.got.dq, call.queries(b).first, part.dq, "dq of sequence " + std::to_string(b));
      expect_rows(call.got.dk, call.keys(b).first, part.dk, "dk of sequence " + std::to_string(b));
      expect_rows(call.got.dv, call.keys(b).first, part.dv, "dv of sequence " + std::to_string(b));
    }
    for (Tensor* tensor : {&call.got.dq, &call.got.dk, &call.got.dv}) {
      const std::vector<bool>& used = tensor->view.shape[1] == 700 ? in_q : in_k;
      const int64_t row = tensor->view.shape[2] * tensor->view.shape[3];
      for (int64_t i = 0; i < tensor->count(); ++i) {
        const bool is_outside = !used[static_cast<size_t>(i / row)];
        ASSERT_TRUE(!is_outside || tensor->get(i) == 0.0) << "row " << i / row;
      }
    }
  }
}

// A sink's and a slope's gradient is the sum over the sequences; rows outside add nothing.
TEST(CpuAttentionBwdVarlen, SinksAndSlopesAddUp) {
  Case c = varlen_case(true);
  c.has_sinks = c.has_alibi = true;
  VarlenCall call(c, kMixed);
  call.run();
  std::vector<float> naive(8);
  std::vector<double> oracle(8);
  for (size_t b = 0; b < call.num_sequences(); ++b) {
    GradientTensors part = call.alone(b);
    for (int64_t h = 0; h < 4; ++h) {
      naive[h] += static_cast<float>(part.dsinks.get(h)), naive[4 + h] += static_cast<float>(part.dslopes.get(h));
      oracle[h] += part.dsinks.get(h), oracle[4 + h] += part.dslopes.get(h);
    }
  }
  expect_close(call.got.dsinks, {naive.begin(), naive.begin() + 4}, {oracle.begin(), oracle.begin() + 4},
               DType::kFloat32, 4, "dsinks");
  expect_close(call.got.dslopes, {naive.begin() + 4, naive.end()}, {oracle.begin() + 4, oracle.end()}, DType::kFloat32,
               4, "dalibi_slopes");
}

TEST(CpuAttentionBwdVarlen, ZeroLengthsAnywhere) {
  for (const Lengths& lengths : std::vector<Lengths>{{{0, 76, 110, 256}, {0, 1, 2, 3}, {}},
                                                     {{0, 0, 0, 0}, {0, 0, 0, 0}, {}},
                                                     {{256, 256}, {3, 3}, {}},
                                                     {{0, 256}, {1, 1}, {}},
                                                     {{0, 0, 256, 256}, {0, 2, 2, 3}, {}},
                                                     {{10, 10, 20, 20, 20, 256, 256}, {}, {}},
                                                     {{0}, {}, {}},
                                                     {{0}, {0}, {}}}) {
    Case c{.name = "zero lengths", .q_len = 256, .kv_len = lengths.cu_k.empty() ? 256 : 3, .num_q_heads = 2};
    c.options.is_causal = true;
    VarlenCall call(c, lengths);
    fill(call.got.dq, kNaN), fill(call.got.dk, kNaN), fill(call.got.dv, kNaN);
    call.run();
    std::vector<bool> in_k(static_cast<size_t>(c.kv_len));
    for (size_t b = 0; b < call.num_sequences(); ++b) {
      GradientTensors part = call.alone(b);
      expect_rows(call.got.dq, call.queries(b).first, part.dq, "dq");
      expect_rows(call.got.dk, call.keys(b).first, part.dk, "dk");
      std::fill(in_k.begin() + call.keys(b).first, in_k.begin() + call.keys(b).second, true);
    }
    for (Tensor* tensor : {&call.got.dq, &call.got.dk, &call.got.dv}) {
      for (int64_t i = 0; i < tensor->count(); ++i) ASSERT_FALSE(std::isnan(tensor->get(i)));
    }
    for (int64_t i = 0; i < call.got.dv.count(); ++i) {
      ASSERT_TRUE(in_k[static_cast<size_t>(i / 8)] || call.got.dv.get(i) == 0.0);
    }
  }
}

// Whatever the index arrays hold: the call returns, and touches nothing outside its tensors (each is as large as its
// elements, so that an address sanitizer sees the first byte too far).
TEST(CpuAttentionBwdVarlen, GarbageIndices) {
  std::mt19937 random(2025);
  const auto pick = [&](int64_t total) -> int32_t {
    constexpr int32_t kWild[] = {INT32_MIN, INT32_MIN + 1, -1, INT32_MAX, INT32_MAX - 1, 1 << 30, -(1 << 30)};
    if (random() % 4 == 0) return kWild[random() % std::size(kWild)];
    return static_cast<int32_t>(random() % static_cast<uint32_t>(total + 8)) - 4;
  };
  for (int round = 0; round < 300; ++round) {
    const int64_t q_len = random() % 300;
    const int64_t kv_len = random() % 500;
    const bool has_window = random() % 2 == 0;
    AttentionOptions options;
    options.is_causal = random() % 2 == 0;
    if (has_window) options.window_left = random() % 40;
    const size_t batch = random() % 7;
    Ints cu_q(batch + 1), cu_k(batch + 1), used(batch);
    for (int32_t& x : cu_q) x = pick(q_len);
    for (int32_t& x : cu_k) x = pick(kv_len);
    for (int32_t& x : used) x = pick(kv_len);
    const auto floats = [&](int64_t count) {
      std::vector<float> values(static_cast<size_t>(count));
      for (float& x : values) x = static_cast<float>(random() % 1000) / 500 - 1;
      return values;
    };
    constexpr int64_t kHeads = 2, kDim = 9;
    std::vector<float> q = floats(q_len * kHeads * kDim), out = q, dout = q, dq = q;
    std::vector<float> k = floats(kv_len * kDim), v = k, dk = k, dv = k;
    std::vector<float> lse = floats(kHeads * q_len);
    AttentionBackwardArgs args;
    const auto rows = [&](std::vector<float>& of) {
      return TensorView::contiguous(of.data(), DType::kFloat32, {q_len, kHeads, kDim});
    };
    const auto key_rows = [&](std::vector<float>& of) {
      return TensorView::contiguous(of.data(), DType::kFloat32, {kv_len, 1, kDim});
    };
    args.q = rows(q), args.out = rows(out), args.dout = rows(dout), args.dq = rows(dq);
    args.k = key_rows(k), args.v = key_rows(v), args.dk = key_rows(dk), args.dv = key_rows(dv);
    args.lse = TensorView::contiguous(lse.data(), DType::kFloat32, {kHeads, q_len});
    const auto ints = [](Ints& of) {
      return TensorView::contiguous(of.data(), DType::kInt32, {static_cast<int64_t>(of.size())});
    };
    args.cu_seqlens_q = ints(cu_q);
    if (random() % 3 != 0) args.cu_seqlens_k = ints(cu_k);
    if (batch > 0 && random() % 2 == 0) args.seqused_k = ints(used);
    GradientTensors to;
    run_backward(args, options, to);
    for (float x : dq) ASSERT_TRUE(std::isfinite(x)) << "round " << round;
  }
}

TEST(CpuAttentionBwd, LeadingAxesBroadcast) {
  // q [3, 1, ..], k [1, 2, ..], v [1, 1, ..], dout [3, 2, ..], everything else in full or broadcast.
  const Case c{.name = "leading",
               .batch = 2,
               .q_len = 33,
               .kv_len = 250,
               .num_q_heads = 4,
               .num_kv_heads = 2,
               .head_dim_qk = 16,
               .head_dim_v = 8,
               .has_sinks = true,
               .has_alibi = true};
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  const auto draw = [&](std::vector<int64_t> shape) {
    Tensor tensor(DType::kFloat32, std::move(shape));
    for (int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, normal(random));
    return tensor;
  };
  Tensor q = draw({3, 1, 2, 33, 4, 16}), k = draw({1, 2, 2, 250, 2, 16}), v = draw({1, 1, 2, 250, 2, 8});
  Tensor sinks = draw({1, 2, 4}), slopes = draw({3, 1, 4}), dout = draw({3, 2, 2, 33, 4, 8});
  Tensor dlse = draw({1, 2, 2, 4, 33});
  Tensor out(c.dtype, {3, 2, 2, 33, 4, 8}), lse(DType::kFloat32, {3, 2, 2, 4, 33});
  AttentionForwardArgs forward;
  forward.q = q.view, forward.k = k.view, forward.v = v.view, forward.out = out.view, forward.lse = lse.view;
  forward.sinks = sinks.view, forward.alibi_slopes = slopes.view;
  attention_forward(forward);
  GradientTensors got;
  got.dq = draw({3, 2, 2, 33, 4, 16}), got.dk = draw({3, 2, 2, 250, 2, 16}), got.dv = draw({3, 2, 2, 250, 2, 8});
  got.dsinks = draw({3, 2, 2, 4}), got.dslopes = draw({3, 2, 2, 4});
  AttentionBackwardArgs args;
  args.q = q.view, args.k = k.view, args.v = v.view, args.out = out.view, args.lse = lse.view;
  args.sinks = sinks.view, args.alibi_slopes = slopes.view, args.dout = dout.view, args.dlse = dlse.view;
  args.dq = got.dq.view, args.dk = got.dk.view, args.dv = got.dv.view;
  args.dsinks = got.dsinks.view, args.dalibi_slopes = got.dslopes.view;
  run_backward(args, {}, got);

  const auto part_of = [](TensorView view, int64_t a, int64_t b) {  // without the leading axes
    view.data = static_cast<float*>(view.data) + (view.shape[0] == 1 ? 0 : a * view.strides[0]) +
                (view.shape[1] == 1 ? 0 : b * view.strides[1]);
    std::copy(view.shape.begin() + 2, view.shape.end(), view.shape.begin());
    std::copy(view.strides.begin() + 2, view.strides.end(), view.strides.begin());
    view.rank -= 2;
    return view;
  };
  for (int64_t a = 0; a < 3; ++a) {
    for (int64_t b = 0; b < 2; ++b) {
      GradientTensors alone(c, Layout::kContiguous);
      AttentionBackwardArgs one;
      one.q = part_of(q.view, a, b), one.k = part_of(k.view, a, b), one.v = part_of(v.view, a, b);
      one.sinks = part_of(sinks.view, a, b), one.alibi_slopes = part_of(slopes.view, a, b);
      one.out = part_of(out.view, a, b), one.lse = part_of(lse.view, a, b);
      one.dout = part_of(dout.view, a, b), one.dlse = part_of(dlse.view, a, b);
      one.dq = alone.dq.view, one.dk = alone.dk.view, one.dv = alone.dv.view;
      one.dsinks = alone.dsinks.view, one.dalibi_slopes = alone.dslopes.view;
      run_backward(one, {}, alone);
      const std::pair<const Tensor*, const Tensor*> pairs[] = {{&got.dq, &alone.dq},
                                                               {&got.dk, &alone.dk},
                                                               {&got.dv, &alone.dv},
                                                               {&got.dsinks, &alone.dsinks},
                                                               {&got.dslopes, &alone.dslopes}};
      for (const auto& [whole, part] : pairs) {
        for (int64_t i = 0; i < part->count(); ++i) {
          ASSERT_EQ(whole->get((a * 2 + b) * part->count() + i), part->get(i)) << a << " " << b << " " << i;
        }
      }
    }
  }
}

TEST(CpuAttentionBwd, OffsetsBeyond32Bits) {
  // Batches 3e9 elements apart, in memory that is reserved and never filled.
  constexpr int64_t kStride = 3'000'000'000;
  constexpr int64_t kRow = int64_t{29} * 16 * 72;
  constexpr size_t kBytes = (kStride + kRow) * sizeof(float);
  const Case c{.name = "far apart",
               .batch = 2,
               .q_len = 29,
               .kv_len = 29,
               .num_q_heads = 16,
               .num_kv_heads = 16,
               .head_dim_qk = 72,
               .head_dim_v = 72};
  Inputs in = make_inputs(c);
  Cotangents more = make_cotangents(c, in, false);
  GradientTensors got(c, c.layout);
  AttentionBackwardArgs args = make_backward_args(in, more, got);
  run_backward(args, c.options, got);
  const GradientTensors near = got;
  std::vector<void*> reserved;
  for (TensorView* view : {&args.q, &args.k, &args.v, &args.out, &args.dout, &args.dq, &args.dk, &args.dv}) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) GTEST_SKIP() << "no address space";
    reserved.push_back(memory);
    for (int64_t b = 0; b < 2; ++b) {
      std::memcpy(static_cast<float*>(memory) + b * kStride, static_cast<float*>(view->data) + b * kRow, kRow * 4);
    }
    view->data = memory;
    view->strides[0] = kStride;
  }
  run_backward(args, c.options, got);
  const TensorView* far_views[] = {&args.dq, &args.dk, &args.dv};
  const Tensor* near_tensors[] = {&near.dq, &near.dk, &near.dv};
  for (int t = 0; t < 3; ++t) {
    for (int64_t i = 0; i < 2 * kRow; ++i) {
      ASSERT_EQ(static_cast<float*>(far_views[t]->data)[i / kRow * kStride + i % kRow], near_tensors[t]->get(i));
    }
  }
  for (void* memory : reserved) munmap(memory, kBytes);
}

// Several callers, whose row blocks have to be added to in turn, share the threads.
TEST(CpuAttentionBwd, CallersAtTheSameTime) {
  Case c{.name = "together",
         .q_len = 400,
         .kv_len = 800,
         .num_q_heads = 2,
         .num_kv_heads = 1,
         .head_dim_qk = 32,
         .head_dim_v = 32};
  c.options.is_causal = true;
  Inputs in = make_inputs(c);
  Cotangents more = make_cotangents(c, in, true);
  const auto call = [&](GradientTensors& to) {
    to = GradientTensors(c, c.layout);
    AttentionBackwardArgs args = make_backward_args(in, more, to);
    run_backward(args, c.options, to);
  };
  GradientTensors first;
  call(first);
  std::vector<GradientTensors> results(6);
  std::vector<std::thread> callers;
  callers.reserve(results.size());
  for (GradientTensors& result : results) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 10; ++repeat) call(result);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (GradientTensors& result : results) {
    EXPECT_EQ(result.dq.memory, first.dq.memory);
    EXPECT_EQ(result.dk.memory, first.dk.memory);
    EXPECT_EQ(result.dv.memory, first.dv.memory);
  }
}

// Each pair of a row and a key that its band keeps is in exactly one pair of a block and a chunk, which both know of.
TEST(BackwardSchedule, BlocksAndChunksAgree) {
  std::mt19937 random(99);
  for (int round = 0; round < 300; ++round) {
    cpu::BackwardPlan plan{};
    cpu::ForwardPlan& forward = plan.forward;
    forward.batch = forward.num_problems = 1 + random() % 2;
    forward.num_kv_heads = 1 + random() % 3;
    forward.group = 1 + random() % 5;
    forward.head_dim_qk = forward.head_dim_v = 64;
    forward.q_len = random() % 400;
    forward.kv_len = random() % 900;
    if (random() % 2 == 0) forward.window_left = random() % 300;
    if (random() % 2 == 0) forward.window_right = random() % 300;
    forward.is_bottom_right = random() % 2 == 0;
    plan.max_chunk_keys = cpu::max_chunk_keys(64, 64);
    const cpu::BackwardSchedule schedule(plan);
    std::set<std::pair<int64_t, int64_t>> visited;  // (block, chunk) of the first head
    std::set<std::pair<int64_t, int64_t>> heads;
    int64_t next_key = 0;
    for (int64_t i = 0; i < schedule.num_chunk_items(); ++i) {
      const cpu::BackwardItem item = schedule.chunk_item(i);
      ASSERT_TRUE(heads.emplace(item.problem * forward.num_kv_heads + item.kv_head, item.index).second);
      ASSERT_LT(item.problem, forward.num_problems);
      if (item.problem != 0 || item.kv_head != 0) continue;
      const variants::Range keys = schedule.chunk_keys(*item.part, item.index);
      ASSERT_EQ(keys.begin, next_key);
      next_key = keys.end;
      const variants::Range blocks = schedule.blocks_of_chunk(*item.part, item.index);
      for (int64_t b = blocks.begin; b < blocks.end; ++b) visited.emplace(b, item.index);
    }
    ASSERT_EQ(next_key, forward.kv_len);
    const variants::Band band = forward.band(forward.q_len, forward.kv_len);
    int64_t next_row = 0;
    for (int64_t i = 0; i < schedule.num_block_items(); ++i) {
      const cpu::BackwardItem item = schedule.block_item(i);
      if (item.problem != 0 || item.kv_head != 0) continue;
      const cpu::RowBlock block = schedule.row_block(*item.part, item.index);
      ASSERT_EQ(block.rows.begin, next_row);
      next_row = block.rows.end;
      for (int64_t chunk = 0; chunk * item.part->chunk_keys < forward.kv_len; ++chunk) {
        const variants::Range keys = schedule.chunk_keys(*item.part, chunk);
        bool is_seen = false;
        for (int64_t q = block.queries.begin; q < block.queries.end; ++q) {
          for (int64_t j = keys.begin; j < keys.end && !is_seen; ++j) is_seen = band.keep(q, j);
        }
        const bool is_among = block.chunks.begin <= chunk && chunk < block.chunks.end;
        ASSERT_EQ(is_seen, is_among);
        ASSERT_TRUE(!is_among || visited.count({item.index, chunk}) == 1);
      }
    }
    ASSERT_EQ(next_row, forward.q_len * forward.group);
  }
}

}  // namespace
}  // namespace heed
