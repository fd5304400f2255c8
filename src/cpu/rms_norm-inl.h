// The CPU kernels of RMS norms for one instruction set. See rms_norm.cc.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_RMS_NORM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_RMS_NORM_INL_H_
#undef HEED_CPU_RMS_NORM_INL_H_
#else
#define HEED_CPU_RMS_NORM_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "cpu/parallel.h"
#include "cpu/rms_norm_plan.h"
#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Longest row that a thread keeps in its scratch memory, in elements.
constexpr int64_t kMaxHeldColumns = 32768;

// What a step of sum_of() reads of a row.
template <class Stored>
constexpr size_t kStepBytes = 4 * hn::MaxLanes(hn::ScalableTag<float>()) * sizeof(Stored);

// The sum of term(d, x) for x in [0, count), in four vectors of partial sums; prefetch(x) is called every four vectors.
template <class Term, class Prefetch>
HWY_INLINE double sum_of(int64_t count, const Term& term, const Prefetch& prefetch) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sum0 = hn::Zero(d), sum1 = hn::Zero(d), sum2 = hn::Zero(d), sum3 = hn::Zero(d);
  int64_t x = 0;
  for (; x + 4 * lanes <= count; x += 4 * lanes) {
    prefetch(x);
    sum0 = hn::Add(sum0, term(d, x));
    sum1 = hn::Add(sum1, term(d, x + lanes));
    sum2 = hn::Add(sum2, term(d, x + 2 * lanes));
    sum3 = hn::Add(sum3, term(d, x + 3 * lanes));
  }
  for (; x + lanes <= count; x += lanes) sum0 = hn::Add(sum0, term(d, x));
  double rest = 0.0;
  const hn::CappedTag<float, 1> d1;
  for (; x < count; ++x) rest += hn::GetLane(term(d1, x));
  const auto sum = hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3));
  return rest + hn::GetLane(hn::SumOfLanes(d, sum));
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward.

template <class Storage>
class RmsNormRow {
 public:
  using Stored = typename Storage::Stored;
  using Plan = RmsNormPlan;

  explicit RmsNormRow(const Plan& plan)
      : plan_(plan),
        is_streaming_(plan.is_streaming && plan.hidden <= kMaxHeldColumns),
        held_(is_streaming_ && has_residual()
                  ? static_cast<Stored*>(thread_scratch(static_cast<size_t>(plan.hidden) * sizeof(Stored)))
                  : nullptr) {}

  void run(const Plan::Walk::Offsets& offsets) {
    for (int i = 0; i < Plan::kNumTensors; ++i) {
      rows_[i] = static_cast<Stored*>(plan_.tensors[i].data);
      if (rows_[i] != nullptr) rows_[i] += offsets[i];
    }
    double sum = 0.0;
    for (int64_t first = 0; first < plan_.hidden; first += kChunk) {
      const int64_t count = std::min(kChunk, plan_.hidden - first);
      sum += squares(has_residual() ? add_residual(first, count) : piece(Plan::kX, first, count, in_), count);
    }
    const auto factor = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(plan_.hidden) + plan_.eps));
    for (int64_t first = 0; first < plan_.hidden; first += kChunk) {
      scale(first, std::min(kChunk, plan_.hidden - first), factor);
    }
  }

 private:
  bool has_residual() const { return plan_.tensors[Plan::kResidual].data != nullptr; }
  Stored* place(Plan::Tensor tensor, int64_t first) const {
    return rows_[tensor] + first * plan_.tensors[tensor].stride;
  }
  HWY_INLINE const Stored* piece(Plan::Tensor tensor, int64_t first, int64_t count, Stored* buffer) const {
    return gathered<Stored>(place(tensor, first), plan_.tensors[tensor].stride, count, buffer);
  }

  static HWY_INLINE double squares(const Stored* HWY_RESTRICT s, int64_t count) {
    return sum_of(
        count,
        [=](auto d, int64_t x) HWY_ATTR {
          const auto value = Storage::load(d, s + x);
          return hn::Mul(value, value);
        },
        [=](int64_t x) HWY_ATTR { prefetch_ahead<kStepBytes<Stored>>(s + x); });
  }

  // x + residual, rounded: written, and returned as adjacent elements.
  HWY_INLINE const Stored* add_residual(int64_t first, int64_t count) {
    const Stored* HWY_RESTRICT x = piece(Plan::kX, first, count, in_);
    const Stored* HWY_RESTRICT residual = piece(Plan::kResidual, first, count, other_);
    const int64_t stride = plan_.tensors[Plan::kSum].stride;
    Stored* const row = place(Plan::kSum, first);
    Stored* HWY_RESTRICT const sum = held_ != nullptr ? held_ + first : stride == 1 ? row : out_;
    for_vector_pairs(hn::ScalableTag<float>(), static_cast<size_t>(count), [=](auto d, size_t i, auto n) HWY_ATTR {
      hn::Vec<decltype(d)> v[n.value];
      HEED_UNROLL for (int j = 0; j < n.value; ++j) {
        const size_t at = i + j * hn::Lanes(d);
        v[j] = hn::Add(Storage::load(d, x + at), Storage::load(d, residual + at));
      }
      store_group<Storage>(v, d, sum + i);
    });
    RowWriter<Stored>(stride, held_ != nullptr, sum).end(row, count);
    return sum;
  }

  HWY_INLINE void scale(int64_t first, int64_t count, float factor) {
    const Stored* HWY_RESTRICT s =
        held_ != nullptr ? held_ + first : piece(has_residual() ? Plan::kSum : Plan::kX, first, count, in_);
    const Stored* HWY_RESTRICT weight = piece(Plan::kWeight, first, count, other_);
    const RowWriter<Stored> writer(plan_.tensors[Plan::kOut].stride, is_streaming_, out_);
    Stored* const row = place(Plan::kOut, first);
    Stored* HWY_RESTRICT const out = writer.begin(row);
    for_vector_pairs(hn::ScalableTag<float>(), static_cast<size_t>(count), [=](auto d, size_t x, auto n) HWY_ATTR {
      hn::Vec<decltype(d)> v[n.value];
      HEED_UNROLL for (int j = 0; j < n.value; ++j) {
        const size_t at = x + j * hn::Lanes(d);
        const auto xhat = hn::Mul(Storage::load(d, s + at), hn::Set(d, factor));
        v[j] = hn::Mul(xhat, Storage::load(d, weight + at));
      }
      store_group<Storage>(v, d, out + x);
    });
    writer.end(row, count);
  }

  const Plan& plan_;
  bool is_streaming_;
  Stored* held_;  // [hidden]: x + residual of the row, or null
  std::array<Stored*, Plan::kNumTensors> rows_{};
  Stored in_[kChunk], other_[kChunk], out_[kChunk];
};

void rms_norm_run(const RmsNormPlan& plan) {
  const int64_t num_rows = plan.walk.num_rows();
  const int64_t rows = std::max<int64_t>(1, kItemBytes / plan.row_bytes);
  const int64_t count = (num_rows + rows - 1) / rows;
  const int threads = num_threads();
  with_storage(plan.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    parallel_for(count, num_rows * plan.row_bytes < kSmallBytes, [&](int64_t index) {
      RmsNormRow<Storage> row(plan);
      const int64_t first = spread_item(index, count, threads) * rows;
      RmsNormPlan::Walk::Cursor cursor(plan.walk, first);
      for (int64_t r = first; r < std::min(first + rows, num_rows); ++r, cursor.next()) row.run(cursor.offsets());
      if (plan.is_streaming) hwy::FlushStream();
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward.

constexpr int kRowsAtOnce = 4;
// Columns of a step over several rows: their results, if they are written past the caches, stay in L1.
constexpr int64_t kBackwardColumns = kChunk / kRowsAtOnce;
// Rows this short are computed in double: a row of one element has a gradient that cancels down to what eps leaves.
constexpr int64_t kShortRow = 16;

// Pieces of kRows rows, as adjacent elements.
template <class Stored, int kRows>
struct BackwardPieces {
  const Stored* x[kRows];
  const Stored* dout[kRows];
  const Stored* dsum[kRows];  // null if absent
  const Stored* weight;
  Stored* dx[kRows];
};

// With r = 1 / sqrt(mean(x^2) + eps): dx = dout * weight * r - x * pull, pull = r^3 * mean(dout * weight * x).
struct RowFactors {
  double rstd = 0.0, pull = 0.0;
};

template <class Storage, int kRows, bool kHasDsum, class Stored = typename Storage::Stored>
HWY_NOINLINE void rms_norm_bwd_piece(const BackwardPieces<Stored, kRows>& rows, const RowFactors* factors,
                                     int64_t count, float* HWY_RESTRICT dweight) {
  float rstd[kRows];
  float pull[kRows];
  for (int r = 0; r < kRows; ++r) {
    rstd[r] = static_cast<float>(factors[r].rstd);
    pull[r] = static_cast<float>(factors[r].pull);
  }
  for_vectors_once(hn::ScalableTag<float>(), static_cast<size_t>(count), [&](auto d, size_t i) HWY_ATTR {
    const auto weight = Storage::load(d, rows.weight + i);
    auto share = hn::Zero(d);
    HEED_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto x = Storage::load(d, rows.x[r] + i);
      const auto dout = Storage::load(d, rows.dout[r] + i);
      const auto scale = hn::Set(d, rstd[r]);
      share = hn::MulAdd(dout, hn::Mul(x, scale), share);
      auto dx = hn::MulSub(hn::Mul(dout, weight), scale, hn::Mul(x, hn::Set(d, pull[r])));
      if (kHasDsum) dx = hn::Add(dx, Storage::load(d, rows.dsum[r] + i));
      Storage::store(dx, d, rows.dx[r] + i);
    }
    hn::StoreU(hn::Add(hn::LoadU(d, dweight + i), share), d, dweight + i);
  });
}

template <class Storage, int kRows, class Stored = typename Storage::Stored>
HWY_NOINLINE void rms_norm_bwd_short(const BackwardPieces<Stored, kRows>& rows, const RowFactors* factors,
                                     int64_t count, bool has_dsum, float* HWY_RESTRICT dweight) {
  const hn::CappedTag<float, 1> d;
  const auto load = [&](const Stored* at) HWY_ATTR { return static_cast<double>(hn::GetLane(Storage::load(d, at))); };
  for (int64_t i = 0; i < count; ++i) {
    const double weight = load(rows.weight + i);
    double share = 0.0;
    for (int r = 0; r < kRows; ++r) {
      const double x = load(rows.x[r] + i);
      const double dout = load(rows.dout[r] + i);
      share += dout * x * factors[r].rstd;
      double dx = dout * weight * factors[r].rstd - x * factors[r].pull;
      if (has_dsum) dx += load(rows.dsum[r] + i);
      Storage::store(hn::Set(d, static_cast<float>(dx)), d, rows.dx[r] + i);
    }
    dweight[i] += static_cast<float>(share);
  }
}

template <class Storage>
class RmsNormBackwardRows {
 public:
  using Stored = typename Storage::Stored;
  using Plan = RmsNormBackwardPlan;

  explicit RmsNormBackwardRows(const Plan& plan)
      : plan_(plan), is_adjacent_(std::all_of(plan.tensors.begin(), plan.tensors.end(), [](const NormTensor& tensor) {
          return tensor.is_adjacent();
        })) {}

  // Rows [begin, end); their shares of the gradient of the weight are added to `dweight` [hidden].
  void run(int64_t begin, int64_t end, float* dweight) {
    Plan::Walk::Cursor cursor(plan_.walk, begin);
    int64_t row = begin;
    if (is_adjacent_) {
      for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) run_rows<kRowsAtOnce>(cursor, dweight);
    }
    for (; row < end; ++row) run_rows<1>(cursor, dweight);
  }

 private:
  bool has_dsum() const { return plan_.tensors[Plan::kDsum].data != nullptr; }

  Stored* place(Plan::Tensor tensor, const Plan::Walk::Offsets& offsets, int64_t first) const {
    const NormTensor& at = plan_.tensors[tensor];
    return static_cast<Stored*>(at.data) + offsets[tensor] + first * at.stride;
  }
  const Stored* piece(Plan::Tensor tensor, const Plan::Walk::Offsets& offsets, int64_t first, int64_t count) {
    return gathered<Stored>(place(tensor, offsets, first), plan_.tensors[tensor].stride, count, buffers_[tensor]);
  }

  RowFactors reduce(const Plan::Walk::Offsets& offsets) {
    double squares = 0.0;
    double products = 0.0;
    if (plan_.hidden < kShortRow) {
      const hn::CappedTag<float, 1> d;
      const auto load = [&](Plan::Tensor tensor, int64_t i) HWY_ATTR {
        return static_cast<double>(hn::GetLane(Storage::load(d, place(tensor, offsets, i))));
      };
      for (int64_t i = 0; i < plan_.hidden; ++i) {
        const double x = load(Plan::kX, i);
        squares += x * x;
        products += load(Plan::kDout, i) * load(Plan::kWeight, i) * x;
      }
      return factors(squares, products);
    }
    for (int64_t first = 0; first < plan_.hidden; first += kChunk) {
      const int64_t count = std::min(kChunk, plan_.hidden - first);
      const Stored* HWY_RESTRICT x = piece(Plan::kX, offsets, first, count);
      const Stored* HWY_RESTRICT dout = piece(Plan::kDout, offsets, first, count);
      const Stored* HWY_RESTRICT weight = piece(Plan::kWeight, offsets, first, count);
      squares += sum_of(
          count,
          [=](auto d, int64_t i) HWY_ATTR {
            const auto value = Storage::load(d, x + i);
            return hn::Mul(value, value);
          },
          [=](int64_t i) HWY_ATTR { prefetch_ahead<kStepBytes<Stored>>(x + i); });
      products += sum_of(
          count,
          [=](auto d, int64_t i) HWY_ATTR {
            return hn::Mul(hn::Mul(Storage::load(d, dout + i), Storage::load(d, weight + i)), Storage::load(d, x + i));
          },
          [=](int64_t i) HWY_ATTR { prefetch_ahead<kStepBytes<Stored>>(dout + i); });
    }
    return factors(squares, products);
  }
  RowFactors factors(double squares, double products) const {
    const auto hidden = static_cast<double>(plan_.hidden);
    const double rstd = 1.0 / std::sqrt(squares / hidden + plan_.eps);
    return {rstd, rstd * rstd * rstd * products / hidden};
  }

  // The cursor's row and the kRows - 1 after it.
  template <int kRows>
  void run_rows(Plan::Walk::Cursor& cursor, float* dweight) {
    Plan::Walk::Offsets offsets[kRows];
    RowFactors factors[kRows];
    for (int r = 0; r < kRows; ++r, cursor.next()) {
      offsets[r] = cursor.offsets();
      factors[r] = reduce(offsets[r]);
    }
    const int64_t step = kRows == 1 || !plan_.is_streaming ? kChunk : kBackwardColumns;
    for (int64_t first = 0; first < plan_.hidden; first += step) {
      const int64_t count = std::min(step, plan_.hidden - first);
      BackwardPieces<Stored, kRows> rows;
      rows.weight = piece(Plan::kWeight, offsets[0], first, count);
      for (int r = 0; r < kRows; ++r) {
        rows.x[r] = piece(Plan::kX, offsets[r], first, count);
        rows.dout[r] = piece(Plan::kDout, offsets[r], first, count);
        rows.dsum[r] = has_dsum() ? piece(Plan::kDsum, offsets[r], first, count) : nullptr;
        rows.dx[r] = writer(r).begin(place(Plan::kDx, offsets[r], first));
      }
      if (plan_.hidden < kShortRow) {
        rms_norm_bwd_short<Storage, kRows>(rows, factors, count, has_dsum(), dweight + first);
      } else if (has_dsum()) {
        rms_norm_bwd_piece<Storage, kRows, true>(rows, factors, count, dweight + first);
      } else {
        rms_norm_bwd_piece<Storage, kRows, false>(rows, factors, count, dweight + first);
      }
      for (int r = 0; r < kRows; ++r) writer(r).end(place(Plan::kDx, offsets[r], first), count);
    }
  }
  RowWriter<Stored> writer(int row) {
    return RowWriter<Stored>(plan_.tensors[Plan::kDx].stride, plan_.is_streaming,
                             buffers_[Plan::kDx] + row * kBackwardColumns);
  }

  const Plan& plan_;
  bool is_adjacent_;
  Stored buffers_[Plan::kNumTensors][kChunk];
};

// The sum of the problem's blocks, in their order: columns [begin, end).
inline void add_blocks(const RmsNormBackwardPlan& plan, int64_t problem, int64_t begin, int64_t end) {
  const RmsNormBackwardPlan::DweightWalk::Cursor cursor(plan.dweight_walk, problem);
  float* const dweight = static_cast<float*>(plan.dweight.data) + cursor.offsets()[0];
  const float* const blocks = plan.workspace + problem * plan.blocks_per_problem * plan.hidden;
  for (int64_t x = begin; x < end; ++x) {
    double sum = 0.0;
    for (int64_t block = 0; block < plan.blocks_per_problem; ++block) sum += blocks[block * plan.hidden + x];
    dweight[x * plan.dweight.stride] = static_cast<float>(sum);
  }
}

template <class Storage>
void rms_norm_bwd_block(const RmsNormBackwardPlan& plan, int64_t index) {
  RmsNormBackwardRows<Storage> rows(plan);
  const int64_t problem = index / plan.blocks_per_problem;
  const int64_t block = index % plan.blocks_per_problem;
  const int64_t first = block * plan.rows_per_block;
  const int64_t last = std::min(first + plan.rows_per_block, plan.rows_per_problem);
  const RmsNormBackwardPlan::DweightWalk::Cursor cursor(plan.dweight_walk, problem);
  float* const dweight = static_cast<float*>(plan.dweight.data) + cursor.offsets()[0];
  const bool is_only_block = plan.blocks_per_problem == 1;
  const bool sums_in_place = is_only_block && plan.dweight.stride == 1;
  const auto size = static_cast<size_t>(plan.hidden);
  float* const sums = sums_in_place   ? dweight
                      : is_only_block ? static_cast<float*>(thread_scratch(size * sizeof(float)))
                                      : plan.workspace + index * plan.hidden;
  std::fill_n(sums, size, 0.0f);
  rows.run(problem * plan.rows_per_problem + first, problem * plan.rows_per_problem + last, sums);
  if (is_only_block && !sums_in_place) {
    for (int64_t x = 0; x < plan.hidden; ++x) dweight[x * plan.dweight.stride] = sums[x];
  }
  if (plan.is_streaming) hwy::FlushStream();
}

void rms_norm_bwd_run(const RmsNormBackwardPlan& plan) {
  const bool is_small = plan.walk.num_rows() * plan.row_bytes < kSmallBytes;
  with_storage(plan.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const int64_t count = plan.num_problems * plan.blocks_per_problem;
    const int threads = num_threads();
    parallel_for(count, is_small,
                 [&](int64_t index) { rms_norm_bwd_block<Storage>(plan, spread_item(index, count, threads)); });
  });
  if (plan.blocks_per_problem == 1) return;  // without rows there is no block, and a sum of nothing
  const int64_t pieces = (plan.hidden + kChunk - 1) / kChunk;
  parallel_for(plan.num_problems * pieces, is_small, [&](int64_t index) {
    const int64_t first = index % pieces * kChunk;
    add_blocks(plan, index / pieces, first, std::min(first + kChunk, plan.hidden));
  });
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_RMS_NORM_INL_H_
