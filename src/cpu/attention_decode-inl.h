// The CPU kernel of attention of one query for one instruction set. See attention_decode.cc for the plan of attack.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ATTENTION_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ATTENTION_DECODE_INL_H_
#undef HEED_CPU_ATTENTION_DECODE_INL_H_
#else
#define HEED_CPU_ATTENTION_DECODE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cpu/attention_decode_plan.h"
#include "cpu/attention_decode_tiles-inl.h"
#include "cpu/math-inl.h"
#include "cpu/parallel.h"
#include "cpu/rotation-inl.h"
#include "cpu/rows-inl.h"
#include "variants/alibi.h"
#include "variants/sinks.h"
#include "variants/softcap.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace decode {
namespace score = variants::HWY_NAMESPACE;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kCacheLineBytes = 64;
constexpr float kLog2E = 1.44269504088896340736f;

constexpr int round_up(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// What an item keeps of a query head.
struct HeadState {
  float max;                         // of scores, in natural units
  float slope;                       // ALiBi
  HWY_ALIGN_MAX float sums[kLanes];  // of weights exp(score - max), per lane
};

// A thread's scratch memory.
struct Scratch {
  HeadState* heads;     // [Q]: the item's query heads
  float* q;             // [Q][q_stride], padded with zeros
  float* o;             // [Q][o_stride]
  float* k_block;       // [kBlockKeys][kRowStride], columns past the head dim 0
  float* v_block;       // [kBlockKeys][kRowStride]
  Rotation* rotations;  // [kBlockKeys], of the block's keys
};

template <class Storage>
class DecodeItem {
 public:
  using Stored = typename Storage::Stored;
  using Plan = DecodePlan;

  // Keys of chunk `chunk`, KV heads [first_head, last_head).
  DecodeItem(const Plan& plan, int64_t problem, int64_t chunk, int64_t first_head, int64_t last_head)
      : plan_(plan),
        problem_(problem),
        chunk_(chunk),
        first_head_(first_head),
        last_head_(last_head),
        offsets_(Plan::Walk::Cursor(plan.walk, problem).offsets()),
        q_stride_(round_up(plan.head_dim_qk)),
        o_stride_(round_up(plan.head_dim_v)) {
    const auto needs_block = [&](Plan::Tensor tensor, int head_dim) {
      const bool are_conversions_repeated = sizeof(Stored) < sizeof(float) && plan.group > kTileHeads;
      return plan.tensors[tensor].dim != 1 || head_dim % kLanes != 0 || are_conversions_repeated;
    };
    copies_k_ = plan.has_rope || needs_block(Plan::kK, plan.head_dim_qk);
    copies_v_ = needs_block(Plan::kV, plan.head_dim_v);
    carve(static_cast<char*>(thread_scratch(carve(nullptr))));
  }

  void run() {
    start();
    const int64_t first = plan_.chunks.first_key + chunk_ * plan_.chunks.keys_per_chunk;
    const int64_t last = std::min(first + plan_.chunks.keys_per_chunk, plan_.kv_len);
    for (int64_t key = first; key < last; key += kBlockKeys) {
      const int num_keys = static_cast<int>(std::min<int64_t>(kBlockKeys, last - key));
      if (plan_.has_rope) {
        for (int t = 0; t < num_keys; ++t) make_rotation(plan_.frequencies, key + t, false, scratch_.rotations[t]);
      }
      for (int64_t head = first_head_; head < last_head_; ++head) {
        const bool is_last_head = head + 1 == last_head_;
        const int64_t next_key = is_last_head ? key + kBlockKeys : key;
        run_block(head, key, num_keys, is_last_head ? first_head_ : head + 1, next_key,
                  static_cast<int>(std::clamp<int64_t>(last - next_key, 0, kBlockKeys)));
      }
    }
    if (plan_.chunks.count == 1) {
      finish();
    } else {
      store_chunk();
    }
  }

 private:
  int num_heads() const { return static_cast<int>((last_head_ - first_head_) * plan_.group); }

  size_t carve(char* base) {
    size_t used = 0;
    const auto take = [&](size_t bytes) {
      char* at = base + (base == nullptr ? 0 : used);
      used += (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
      return at;
    };
    const auto floats = [&](size_t count) { return reinterpret_cast<float*>(take(count * sizeof(float))); };
    const auto heads = static_cast<size_t>(num_heads());
    scratch_.heads = reinterpret_cast<HeadState*>(take(heads * sizeof(HeadState)));
    scratch_.q = floats(heads * static_cast<size_t>(q_stride_));
    scratch_.o = floats(heads * static_cast<size_t>(o_stride_));
    scratch_.k_block = floats(copies_k_ ? size_t{kBlockKeys} * kRowStride : 0);
    scratch_.v_block = floats(copies_v_ ? size_t{kBlockKeys} * kRowStride : 0);
    scratch_.rotations = reinterpret_cast<Rotation*>(take(plan_.has_rope ? kBlockKeys * sizeof(Rotation) : 0));
    return used;
  }

  // An operand's data at the problem, KV head and key.
  const Stored* rows(Plan::Tensor tensor, int64_t head, int64_t key) const {
    const DecodeTensor& from = plan_.tensors[tensor];
    return static_cast<const Stored*>(from.data) + offsets_[tensor] + head * from.head + key * from.token;
  }
  // A float of each query head, or null.
  const float* head_value(Plan::Tensor tensor, int64_t q_head) const {
    const DecodeTensor& from = plan_.tensors[tensor];
    if (from.data == nullptr) return nullptr;
    return static_cast<const float*>(from.data) + offsets_[tensor] + q_head * from.head;
  }

  void start() {
    if (copies_k_) std::fill_n(scratch_.k_block, size_t{kBlockKeys} * kRowStride, 0.0f);
    if (copies_v_) std::fill_n(scratch_.v_block, size_t{kBlockKeys} * kRowStride, 0.0f);
    std::fill_n(scratch_.o, static_cast<size_t>(num_heads()) * o_stride_, 0.0f);
    std::fill_n(scratch_.q, static_cast<size_t>(num_heads()) * q_stride_, 0.0f);
    Rotation* const rotation = scratch_.rotations;
    if (plan_.has_rope) make_rotation(plan_.frequencies, plan_.kv_len - 1, false, *rotation);
    const DecodeTensor& q = plan_.tensors[Plan::kQ];
    for (int h = 0; h < num_heads(); ++h) {
      const int64_t q_head = first_head_ * plan_.group + h;
      HeadState& state = scratch_.heads[h];
      state.max = -kInfinity;
      std::fill_n(state.sums, kLanes, 0.0f);
      const float* slope = head_value(Plan::kSlopes, q_head);
      state.slope = slope == nullptr ? 0.0f : *slope;
      load_rotated(rows(Plan::kQ, q_head, 0), q.dim, rotation, scratch_.q + h * q_stride_);
    }
  }

  // A row of q or K as floats, rotated if there is a rotation.
  HWY_INLINE void load_rotated(const Stored* row, int64_t stride, const Rotation* rotation, float* to) const {
    if (!plan_.has_rope) {
      load_row<Storage>(row, stride, plan_.head_dim_qk, to);
      return;
    }
    Stored buffer[kMaxHeadDim];
    rotate_halves<Storage, Float32>(gathered<Stored>(row, stride, plan_.head_dim_qk, buffer), *rotation,
                                    plan_.frequencies.num_pairs, to);
  }

  NextRows next_rows(Plan::Tensor tensor, int head_dim, int64_t kv_head, int64_t key, int num_keys) const {
    const DecodeTensor& from = plan_.tensors[tensor];
    if (from.dim != 1 || num_keys == 0) return {};
    return {rows(tensor, kv_head, key), from.token * static_cast<int64_t>(sizeof(Stored)),
            head_dim * static_cast<int>(sizeof(Stored)), num_keys};
  }

  // The block's keys against the query heads of one KV head; after them come those of `next_head` from `next_key` on.
  void run_block(int64_t kv_head, int64_t key, int num_keys, int64_t next_head, int64_t next_key, int num_next_keys) {
    NextRows next_k = next_rows(Plan::kK, plan_.head_dim_qk, next_head, next_key, num_next_keys);
    NextRows next_v = next_rows(Plan::kV, plan_.head_dim_v, next_head, next_key, num_next_keys);
    const DecodeTensor& k = plan_.tensors[Plan::kK];
    const DecodeTensor& v = plan_.tensors[Plan::kV];
    const Stored* const keys = rows(Plan::kK, kv_head, key);
    const Stored* const values = rows(Plan::kV, kv_head, key);
    if (copies_k_) {
      for (int t = 0; t < num_keys; ++t) {
        next_k.fetch();
        load_rotated(keys + t * k.token, k.dim, scratch_.rotations + t, scratch_.k_block + t * kRowStride);
      }
    }
    if (copies_v_) {
      for (int t = 0; t < num_keys; ++t) {
        next_v.fetch();
        load_row<Storage>(values + t * v.token, v.dim, plan_.head_dim_v, scratch_.v_block + t * kRowStride);
      }
    }
    const auto first = static_cast<int>((kv_head - first_head_) * plan_.group);
    Block block{key, num_keys, {keys, k.token}, {values, v.token}, next_k, next_v};
    int h = 0;
    for (; h + kTileHeads <= plan_.group; h += kTileHeads) run_tile<kTileHeads>(block, first + h);
    if constexpr (kTileHeads == 4) {
      if (h + 2 <= plan_.group) run_tile<2>(block, first + h), h += 2;
    }
    if (h < plan_.group) run_tile<1>(block, first + h);
  }

  struct Block {
    int64_t key;  // the first
    int num_keys;
    Rows<Stored> k, v;
    NextRows next_k, next_v;
  };

  template <int kHeads>
  HWY_NOINLINE void run_tile(Block& block, int first) {
    HWY_ALIGN_MAX float weights[kHeads * kBlockKeys];
    float rescale[kHeads];
    const float* const q = scratch_.q + first * q_stride_;
    float* const o = scratch_.o + first * o_stride_;
    if (copies_k_) {
      scores<Float32, kHeads>({scratch_.k_block, kRowStride}, block.num_keys, q, q_stride_, q_stride_, weights,
                              block.next_k);
    } else {
      scores<Storage, kHeads>(block.k, block.num_keys, q, q_stride_, q_stride_, weights, block.next_k);
    }
    for (int h = 0; h < kHeads; ++h) {
      rescale[h] = softmax(block, scratch_.heads[first + h], weights + h * kBlockKeys);
    }
    if (copies_v_) {
      add_values<Float32, kHeads>({scratch_.v_block, kRowStride}, block.num_keys, weights, rescale, o, o_stride_,
                                  o_stride_, block.next_v);
    } else {
      add_values<Storage, kHeads>(block.v, block.num_keys, weights, rescale, o, o_stride_, o_stride_, block.next_v);
    }
  }

  // Raw products -> weights; returns what the sums so far must be multiplied with.
  HWY_INLINE float softmax(const Block& block, HeadState& state, float* HWY_RESTRICT weights) const {
    constexpr int kVecs = kBlockKeys / kLanes;
    const DF d;
    const VectorMath<DF> math{d};
    const VF minus_infinity = hn::Set(d, -kInfinity);
    VF s[kVecs];
    VF max = hn::Set(d, state.max);
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
      const VF lane = hn::Iota(d, static_cast<float>(m * kLanes));
      VF value = hn::Load(d, weights + m * kLanes);
      value = plan_.softcap.is_on ? score::soft_capped(math, value, plan_.softcap.scale_over_cap, plan_.softcap.cap)
                                  : hn::Mul(value, hn::Set(d, plan_.scale));
      if (plan_.tensors[Plan::kSlopes].data != nullptr) {
        const VF distance = hn::Sub(hn::Set(d, static_cast<float>(plan_.kv_len - 1 - block.key)), lane);
        value = score::alibi_biased(math, value, hn::Set(d, state.slope), distance);
      }
      const auto is_key = hn::Lt(lane, hn::Set(d, static_cast<float>(block.num_keys)));
      s[m] = hn::IfThenElse(is_key, value, minus_infinity);
      max = hn::Max(max, s[m]);
    }
    const float new_max = hn::GetLane(hn::MaxOfLanes(d, max));
    const VF shift = hn::Set(d, new_max == -kInfinity ? 0.0f : new_max);  // no -inf - -inf
    const VF log2e = hn::Set(d, kLog2E);
    const VF rescale = exp2_nonpositive(d, hn::Sub(hn::Set(d, state.max), shift), log2e);
    VF sum = hn::Mul(hn::Load(d, state.sums), rescale);
    VF block_sum = hn::Zero(d);
    HEED_UNROLL for (int m = 0; m < kVecs; ++m) {
      const VF weight = exp2_nonpositive(d, hn::Sub(s[m], shift), log2e);
      hn::Store(weight, d, weights + m * kLanes);
      block_sum = hn::Add(block_sum, weight);
    }
    sum = hn::Add(sum, block_sum);
    hn::Store(sum, d, state.sums);
    state.max = new_max;
    return hn::GetLane(rescale);
  }

  static float total(const HeadState& state) {
    const DF d;
    return hn::GetLane(hn::SumOfLanes(d, hn::Load(d, state.sums)));
  }

  void store_chunk() const {
    for (int h = 0; h < num_heads(); ++h) {
      const int64_t q_head = problem_ * plan_.num_kv_heads * plan_.group + first_head_ * plan_.group + h;
      float* to = plan_.workspace + (q_head * plan_.chunks.count + chunk_) * plan_.floats_per_chunk();
      std::copy_n(scratch_.o + h * o_stride_, plan_.head_dim_v, to);
      to[plan_.head_dim_v] = scratch_.heads[h].max;
      to[plan_.head_dim_v + 1] = total(scratch_.heads[h]);
    }
  }

  void finish() const;

  const Plan& plan_;
  int64_t problem_, chunk_, first_head_, last_head_;
  Plan::Walk::Offsets offsets_;
  int q_stride_, o_stride_;
  bool copies_k_, copies_v_;
  Scratch scratch_{};
};

// Writes a query head's result. `o` [Dv] and `sum` are relative to `max`.
template <class Storage>
void write_result(const DecodePlan& plan, const DecodePlan::Walk::Offsets& offsets, int64_t q_head, const float* o,
                  float max, float sum) {
  using Stored = typename Storage::Stored;
  const auto place = [&](DecodePlan::Tensor tensor, int64_t element_bytes) {
    const DecodeTensor& to = plan.tensors[tensor];
    return static_cast<char*>(to.data) + (offsets[tensor] + q_head * to.head) * element_bytes;
  };
  const bool has_sink = plan.tensors[DecodePlan::kSinks].data != nullptr;
  const double sink = has_sink ? *reinterpret_cast<float*>(place(DecodePlan::kSinks, sizeof(float))) : 0.0;
  const auto end = variants::finish_row<double>(max, 0.0, sum, has_sink, sink, [](double x) { return std::exp(x); });
  const auto divisor = static_cast<float>(end.divisor);
  store_row<Storage>(o, plan.head_dim_v, reinterpret_cast<Stored*>(place(DecodePlan::kOut, sizeof(Stored))),
                     plan.tensors[DecodePlan::kOut].dim,
                     [=](auto d, auto x) HWY_ATTR { return hn::Div(x, hn::Set(d, divisor)); });
  if (plan.tensors[DecodePlan::kLse].data != nullptr) {
    *reinterpret_cast<float*>(place(DecodePlan::kLse, sizeof(float))) =
        static_cast<float>(end.top + std::log(end.total));
  }
}

template <class Storage>
void DecodeItem<Storage>::finish() const {
  for (int h = 0; h < num_heads(); ++h) {
    write_result<Storage>(plan_, offsets_, first_head_ * plan_.group + h, scratch_.o + h * o_stride_,
                          scratch_.heads[h].max, total(scratch_.heads[h]));
  }
}

// Adds up the chunks of a query head of a leading index.
template <class Storage>
void merge_chunks(const DecodePlan& plan, int64_t problem, int64_t q_head) {
  const int64_t heads = plan.num_kv_heads * plan.group;
  const int64_t stride = plan.floats_per_chunk();
  const int head_dim = plan.head_dim_v;
  const float* const chunks = plan.workspace + (problem * heads + q_head) * plan.chunks.count * stride;
  const auto max_of = [&](int64_t chunk) { return chunks[chunk * stride + head_dim]; };
  float max = -kInfinity;
  for (int64_t chunk = 0; chunk < plan.chunks.count; ++chunk) max = std::max(max, max_of(chunk));
  const float shift = max == -kInfinity ? 0.0f : max;
  HWY_ALIGN_MAX float o[kMaxHeadDim] = {};
  double sum = 0.0;
  for (int64_t chunk = 0; chunk < plan.chunks.count; ++chunk) {
    const float* const from = chunks + chunk * stride;
    const auto weight = static_cast<float>(std::exp(static_cast<double>(max_of(chunk)) - shift));
    sum += static_cast<double>(weight) * from[head_dim + 1];
    for_vectors_once(DF(), static_cast<size_t>(head_dim), [&](auto d, size_t x) HWY_ATTR {
      hn::StoreU(hn::MulAdd(hn::Set(d, weight), hn::LoadU(d, from + x), hn::LoadU(d, o + x)), d, o + x);
    });
  }
  const DecodePlan::Walk::Cursor cursor(plan.walk, problem);
  write_result<Storage>(plan, cursor.offsets(), q_head, o, max, static_cast<float>(sum));
}

}  // namespace decode

void attention_decode_run(const DecodePlan& plan) {
  const int64_t num_problems = plan.walk.num_rows();
  const int64_t head_blocks = (plan.num_kv_heads + plan.heads_per_item - 1) / plan.heads_per_item;
  const int64_t q_heads = plan.num_kv_heads * plan.group;
  const bool is_small = plan.num_bytes() < kSmallBytes;
  with_storage(plan.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    parallel_for(num_problems * plan.chunks.count * head_blocks, is_small, [&](int64_t index) {
      const int64_t first_head = index % head_blocks * plan.heads_per_item;
      const int64_t chunk = index / head_blocks % plan.chunks.count;
      decode::DecodeItem<Storage>(plan, index / head_blocks / plan.chunks.count, chunk, first_head,
                                  std::min(first_head + plan.heads_per_item, plan.num_kv_heads))
          .run();
    });
    if (plan.chunks.count == 1) return;
    parallel_for(num_problems * q_heads, num_problems * q_heads * plan.chunks.count * plan.floats_per_chunk() < 50000,
                 [&](int64_t index) { decode::merge_chunks<Storage>(plan, index / q_heads, index % q_heads); });
  });
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ATTENTION_DECODE_INL_H_
