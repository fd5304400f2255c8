// The CPU kernel of rotary embeddings for one instruction set. See rope.cc.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ROPE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ROPE_INL_H_
#undef HEED_CPU_ROPE_INL_H_
#else
#define HEED_CPU_ROPE_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/rope_plan.h"
#include "cpu/rotation-inl.h"
#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

template <class Storage>
class RopeTokens {
 public:
  using Stored = typename Storage::Stored;
  using Plan = RopePlan;

  RopeTokens(const Plan& plan, const Plan::Walk::Offsets& offsets)
      : plan_(plan), offsets_(offsets), positions_(plan, offsets) {}

  void run(int64_t token) {
    int64_t position = 0;
    const bool is_rotated = positions_.find(token, position);
    if (is_rotated) turn_to(position);
    run_heads(token, Plan::kQ, Plan::kQRope, plan_.num_q_heads, is_rotated);
    run_heads(token, Plan::kK, Plan::kKRope, plan_.num_kv_heads, is_rotated);
  }

 private:
  void turn_to(int64_t position) {
    const RopeTensor& cache = plan_.tensors[Plan::kCosSinCache];
    if (cache.data == nullptr) {
      make_rotation(plan_.frequencies, position, plan_.is_inverse, rotation_);
      return;
    }
    const int64_t row = std::clamp<int64_t>(position, 0, plan_.max_position - 1);
    const float* cos = static_cast<const float*>(cache.data) + offsets_[Plan::kCosSinCache] + row * cache.token;
    const float* sin = cos + plan_.frequencies.num_pairs * cache.dim;
    for (int i = 0; i < plan_.frequencies.num_pairs; ++i) {
      rotation_.cos[i] = cos[i * cache.dim];
      rotation_.sin[i] = plan_.is_inverse ? -sin[i * cache.dim] : sin[i * cache.dim];
    }
  }

  void run_heads(int64_t token, Plan::Tensor source, Plan::Tensor target, int64_t num_heads, bool is_rotated) {
    const RopeTensor& in = plan_.tensors[source];
    const RopeTensor& out = plan_.tensors[target];
    const Stored* from = static_cast<const Stored*>(in.data) + offsets_[source] + token * in.token;
    Stored* to = static_cast<Stored*>(out.data) + offsets_[target] + token * out.token;
    const bool is_dense = in.dim == 1 && in.head == plan_.head_dim;
    constexpr int kLineElements = 64 / sizeof(Stored);
    const RowWriter<Stored> writer(out.dim, plan_.is_streaming, out_);
    for (int64_t head = 0; head < num_heads; ++head, from += in.head, to += out.head) {
      if (is_dense) {
        for (int x = 0; x < plan_.head_dim; x += kLineElements) prefetch_ahead<1>(from + x);
      }
      const Stored* row = gathered<Stored>(from, in.dim, plan_.head_dim, in_);
      if (row == to) {
        // In place: what is written must not be read again, and the last vectors of a row overlap.
        std::copy_n(row, plan_.head_dim, in_);
        row = in_;
      }
      Stored* rotated = writer.begin(to);
      const int64_t first_kept = is_rotated ? plan_.rotary_dim() : 0;
      if (is_rotated && plan_.interleaves) {
        rotate_neighbours<Storage>(row, rotation_, plan_.frequencies.num_pairs, rotated);
      } else if (is_rotated) {
        rotate_halves<Storage, Storage>(row, rotation_, plan_.frequencies.num_pairs, rotated);
      }
      std::copy(row + first_kept, row + plan_.head_dim, rotated + first_kept);
      writer.end(to, plan_.head_dim);
    }
  }

  const Plan& plan_;
  Plan::Walk::Offsets offsets_;
  Positions positions_;
  Rotation rotation_;
  Stored in_[2 * kMaxRotaryPairs];
  HWY_ALIGN Stored out_[2 * kMaxRotaryPairs];
};

void rope_run(const RopePlan& plan) {
  const int64_t tokens = std::max<int64_t>(1, kItemBytes / plan.token_bytes);
  const int64_t blocks = (plan.num_tokens + tokens - 1) / tokens;
  const int64_t num_problems = plan.walk.num_rows();
  const int threads = num_threads();
  with_storage(plan.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    parallel_for(num_problems * blocks, num_problems * plan.num_tokens * plan.token_bytes < kSmallBytes,
                 [&](int64_t turn) {
                   const int64_t index = spread_item(turn, num_problems * blocks, threads);
                   const RopePlan::Walk::Cursor cursor(plan.walk, index / blocks);
                   RopeTokens<Storage> work(plan, cursor.offsets());
                   const int64_t first = index % blocks * tokens;
                   const int64_t last = std::min(first + tokens, plan.num_tokens);
                   for (int64_t token = first; token < last; ++token) work.run(token);
                   if (plan.is_streaming) hwy::FlushStream();
                 });
  });
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ROPE_INL_H_
