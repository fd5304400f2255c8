// Attention forward for Hopper, in 16 bits: warpgroup products, tensor copies, barriers that count bytes.
//
// Where the time and the bytes go
// -------------------------------
// One block a multiprocessor takes tiles of 128 query rows of a head until there are none left. Two warpgroups compute,
// 64 rows each: S = Q K^T, softmax, O += P V, in steps of up to 128 keys. The warps of a third one plan, copy and mend
// (sm90_attention_load.cuh), and leave most of their registers to the others. All figures are of head dim 128.
//
// Tensor cores. A step takes them 2048 cycles, and everything else has to hide there. The products are asynchronous:
// S of the next step is started, then O += P V of this one, and under the latter the next step's softmax begins; the
// other warpgroup fills the rest. Nothing holds them in turn: barriers for that were no gain. The steps of all tiles
// are one stream: a tile's first product runs with the last one of the tile before, which is stored under its softmax.
//
// Shared memory. Q and P are operands in registers, so that each of the step's products reads 4 KiB of K or V in 64
// cycles: half of what shared memory can deliver. Above head dim 192, and at 192 with as many columns of V, registers
// do not suffice for Q, and products read it from shared memory too.
//
// Softmax. 16384 exponentials a step take 1024 cycles, half of the time. The largest score of a row, which would take
// as many instructions once more, is looked for in a tile's first step only: later steps keep it as their reference,
// and as long as their sums stay below 2^60 (fp16: 2^15, which P must hold) nothing is lost, since sums and outputs
// are float32 and refer to the same. Otherwise the warp computes the step's scores once more, finds new references and
// scales its output down: rare, and in registers that are free at that point. Masks take instructions at the ends of
// the rows' keys only. A step is about 345 instructions a warp, 360 with masks, a third of what can be issued.
//
// Tall tiles. Up to head dim 64 exponentials are most of the time, and three warpgroups hide more of them than two: 192
// rows, and Q in shared memory for want of registers. Faster where sequences are long, which the host decides.
//
// Copies. K and V take turns in one ring of slots, each 128 keys of one of them, 32 KiB; a slot is free when all warps
// have released it. That of K is released after the check of the sums, since a redo reads it. Q of the next tile is on
// its way once this tile's first product, which has Q in registers, has been issued; keys that can be loaded before
// are not held up by it. The output has shared memory of its own, from which each warp has its 16 rows copied while the
// next tile is computed. Tensor maps swizzle rows of 128 bytes, give zeros where a sequence ends (0 * NaN is NaN) and
// write nothing beyond.
//
// Order. Tiles are taken from a counter: fixed shares drift apart under a causal mask. A tile's first steps do not
// depend on the tile before, so that outputs have the same bits whichever block computes it.
//
// Few rows. Where heads have few rows and share their keys, a tile has those of several heads of a group: K and V are
// read once for all of them, and fewer rows of products are empty (packs_heads).
//
// Parts of tiles. Without masks, and where heads have one tile each, all tiles take as long. Where they do not fill the
// last round of blocks, the steps of the last ones are shared out evenly (plan_part). Outputs of parts, 64 KiB each,
// pass through L2. Rows that see nothing of a part leave a sum of 0 and a reference below all others.
//
// What is not finite. A NaN or an infinity in V reaches all rows of a product, also those that do not see the key. Rows
// whose output is not finite are therefore left to warps that have nothing else to do, key by key.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/ptx_sm90.cuh"
#include "cuda/device/score_transform.cuh"
#include "cuda/device/segment_steps.cuh"
#include "cuda/device/sm90_attention_finish.cuh"
#include "cuda/device/sm90_attention_load.cuh"
#include "cuda/sm90_attention_fwd_spec.h"

namespace heed::cuda {

template <Sm90AttentionFwdSpec kSpec>
struct Sm90AttentionFwd : Sm90AttentionFinish<kSpec> {
  using Base = Sm90AttentionFinish<kSpec>;
  using Base::close_rows;
  using Base::exponent_scale;
  using Base::kHasQInRegisters;
  using Base::kIsBf16;
  using Base::kIsUpToDate;
  using Base::kKeyTiles;
  using Base::kKvPartBytes;
  using Base::kKvRows;
  using Base::kLargestSum;
  using Base::kLayout;
  using Base::kNumConsumers;
  using Base::kPvSteps;
  using Base::kQkSteps;
  using Base::kSteep;
  using Base::kTile;
  using Base::kUnseen;
  using Base::leave_out;
  using Base::leave_rows;
  using Base::merge_parts;
  using Base::pack;
  using Base::reset;
  using Base::scale_out;
  using Base::store_out;
  using typename Base::Lane;
  using typename Base::Load;
  using typename Base::Math;
  using typename Base::Output;
  using typename Base::Params;
  using typename Base::Part;
  using typename Base::Probabilities;
  using typename Base::QFragments;
  using typename Base::Ring;
  using typename Base::Rows;
  using typename Base::Scores;
  using typename Base::Steps;
  using typename Base::Task;

  static constexpr int kNumThreads = kTile.num_threads();
  static constexpr int kMinBlocksPerSm = 1;
  static constexpr int kSharedBytes = kLayout.bytes;

  // -------------------------------------------------------------------------------------------------------------------
  // Compute: warpgroups of 64 rows.

  // Where a lane reads its share of its warp's rows of Q: 16-byte chunk lane / 16 of row lane % 16, which the swizzle
  // moves; the next steps' chunks are an exclusive or away.
  static __device__ __forceinline__ uint32 q_chunk(const Lane& lane) {
    const int row = (lane.warp & 3) * 16 + (lane.lane & 15);
    return Load::memory_at(kLayout.q + lane.warpgroup() * kLayout.q_bytes) + row * kPartRowBytes +
           (((lane.lane >> 4) ^ (row & 7)) << 4);
  }
  static __device__ __forceinline__ void load_q_step(uint32 chunk, int step, uint32 (&q)[4]) {
    ptx::ldmatrix_x4(q, (chunk ^ step % 4 * 32) + step / 4 * 64 * kPartRowBytes);
  }
  static __device__ __forceinline__ void load_q(uint32 chunk, QFragments& q) {
    if constexpr (kHasQInRegisters) {
#pragma unroll
      for (int step = 0; step < kQkSteps; ++step) load_q_step(chunk, step, q[step]);
    }
  }

  static __device__ __forceinline__ void multiply_qk(const QFragments& q, uint32 q_tile, uint32 k, Scores& scores) {
    const uint64 keys = ptx::wgmma_k_major(k);
    [[maybe_unused]] const uint64 queries = ptx::wgmma_k_major(q_tile);
#pragma unroll
    for (int step = 0; step < kQkSteps; ++step) {
      const uint64 keys_here = ptx::wgmma_advance(keys, step / 4 * kKvPartBytes + step % 4 * 32);
      if constexpr (kHasQInRegisters) {
        ptx::wgmma_rs<kIsBf16, false>(scores, q[step], keys_here, step > 0);
      } else {
        ptx::wgmma_ss<kIsBf16>(scores, ptx::wgmma_advance(queries, step / 4 * 64 * kPartRowBytes + step % 4 * 32),
                               keys_here, step > 0);
      }
    }
  }

  static __device__ __forceinline__ void multiply_pv(const Probabilities& p, uint32 v, bool accumulates, Output& out) {
    const uint64 values = ptx::wgmma_n_major(v, kKvPartBytes);
#pragma unroll
    for (int step = 0; step < kPvSteps; ++step) {
      ptx::wgmma_rs<kIsBf16, true>(out, p[step], ptx::wgmma_advance(values, step * 16 * kPartRowBytes),
                                   step > 0 || accumulates);
    }
  }

  // Scores of keys that a row does not see become -inf. The first key is `first_key`.
  template <bool kHasBegin, bool kHasEnd, int kSize>
  static __device__ __forceinline__ void mask(const Lane& lane, const Params& params, const Task& task, int first_key,
                                              float (&scores)[kSize]) {
    [[maybe_unused]] constexpr int kTiles = kSize / 4;
    const int origin = first_key + lane.column;
    const int first_row = lane.tile_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = Load::token_of(params, first_row + half * 8);
      const int begin = task.keys_begin + token - origin;
      const int end = (kSpec.has_mask ? min(task.keys_end + token, task.kv_len) : task.kv_len) - origin;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // A bit for each tile of 8 keys, whose number e the row sees.
        uint32 seen = 0xffffffffu;
        if (kHasEnd) seen = (1u << min(max(end + 7 - e, 0) >> 3, kTiles)) - 1;
        if (kHasBegin) seen &= 0xffffffffu << min(max(begin + 7 - e, 0) >> 3, kTiles);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if ((seen & 1u << i) == 0) scores[4 * i + half * 2 + e] = -kInfinity;
        }
      }
    }
  }

  // Largest score of each row.
  template <int kSize>
  static __device__ __forceinline__ void find_largest(const float (&scores)[kSize], float (&largest)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float even = scores[2 * half], odd = scores[2 * half + 1];
#pragma unroll
      for (int i = 1; i < kSize / 4; ++i) {
        even = fmaxf(even, scores[4 * i + 2 * half]);
        odd = fmaxf(odd, scores[4 * i + 2 * half + 1]);
      }
      float top = fmaxf(even, odd);
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      largest[half] = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    }
  }

  // Rows without a reference get one: their largest score.
  static __device__ __forceinline__ void find_references(float scale, const Scores& scores, Rows& rows) {
    float largest[2];
    find_largest(scores, largest);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (rows.reference[half] == kUnseen) rows.reference[half] = newer_reference(kUnseen, largest[half] * scale);
    }
  }
  // What was summed up relative to the references before shrinks.
  static __device__ __forceinline__ void move_references(float scale, const float (&largest)[2], Rows& rows,
                                                         float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reference = newer_reference(rows.reference[half], largest[half] * scale);
      shrink[half] = ptx::exp2_approx(rows.reference[half] - reference);
      rows.reference[half] = reference;
      rows.sum[half] *= shrink[half];
    }
  }
  // NaN, which leaves the row to `attend_row`, if it is steep.
  static __device__ __forceinline__ float newer_reference(float reference, float exponent) {
    return fabsf(exponent) < kSteep || exponent == -kInfinity ? fmaxf(reference, exponent) : kNaN;
  }

  // Scores of some columns become probabilities, which are added to the sums of the step.
  template <int kBegin, int kEnd, int kSize>
  static __device__ __forceinline__ void exponentiate(float scale, const float (&reference)[2], float (&sum)[2],
                                                      float (&scores)[kSize]) {
    float parts[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[4 * i + e] = ptx::exp2_approx(fmaf(scores[4 * i + e], scale, -reference[e / 2]));
        parts[e] += scores[4 * i + e];
      }
    }
    sum[0] += parts[0] + parts[1];
    sum[1] += parts[2] + parts[3];
  }

  // The scores of 16 keys of a step once more, by the warp alone.
  static __device__ __forceinline__ void multiply_qk_again(const QFragments& q, uint32 q_from, uint32 k, int pair,
                                                           float (&scores)[8]) {
    const Lane lane;
    const int row = (lane.lane & 7) + (lane.lane >> 4) * 8, chunk = lane.lane >> 3 & 1;
    Accumulator left = {}, right = {};
#pragma unroll
    for (int step = 0; step < kQkSteps; ++step) {
      uint32 bits[4];
      ptx::ldmatrix_x4(bits, k + step / 4 * kKvPartBytes + (pair * 16 + row) * kPartRowBytes +
                                 (((step % 4 * 2 + chunk) ^ (row & 7)) << 4));
      uint32 queries[4];
      if constexpr (kHasQInRegisters) {
#pragma unroll
        for (int word = 0; word < 4; ++word) queries[word] = q[step][word];
      } else {
        load_q_step(q_from, step, queries);
      }
      Math::mma(left, Math::make_a(queries), Math::make_b(bits[0], bits[1]));
      Math::mma(right, Math::make_a(queries), Math::make_b(bits[2], bits[3]));
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[e] = left[e];
      scores[4 + e] = right[e];
    }
  }

  // A row outgrew its reference: the step's probabilities once more, with new references. Rare: small rather than fast.
  static __device__ __forceinline__ void redo(const Params& params, const Task& task, int step, const QFragments& q,
                                              uint32 q_from, uint32 k, Rows& rows, Probabilities& p, float (&sum)[2],
                                              Output& out) {
    const float scale = exponent_scale(params);
    float largest[2] = {-kInfinity, -kInfinity};
#pragma unroll 1
    for (int pair = 0; pair < kPvSteps; ++pair) {
      float scores[8];
      multiply_qk_again(q, q_from, k, pair, scores);
      mask<kSpec.has_mask, true>(Lane(), params, task, step * kKvRows + pair * 16, scores);
      float here[2];
      find_largest(scores, here);
      largest[0] = fmaxf(largest[0], here[0]);
      largest[1] = fmaxf(largest[1], here[1]);
    }
    float shrink[2];
    move_references(scale, largest, rows, shrink);
    scale_out(shrink, out);
    sum[0] = sum[1] = 0.0f;
#pragma unroll 1
    for (int pair = 0; pair < kPvSteps; ++pair) {
      float scores[8];
      multiply_qk_again(q, q_from, k, pair, scores);
      mask<kSpec.has_mask, true>(Lane(), params, task, step * kKvRows + pair * 16, scores);
      exponentiate<0, 2>(scale, rows.reference, sum, scores);
      uint32 packed[1][4];
      pack(scores, packed);
#pragma unroll
      for (int i = 0; i < kPvSteps; ++i) {
#pragma unroll
        for (int word = 0; word < 4; ++word) p[i][word] = i == pair ? packed[0][word] : p[i][word];
      }
    }
  }

  static __device__ __forceinline__ void compute(const Params& params) {
    const bool is_lane_0 = (ptx::thread_index() & 31) == 0;
    const float scale = exponent_scale(params);
    QFragments q;
    Probabilities p;
    Scores scores;
    Output out;
    Rows rows;
    Ring ring;
    uint32 number = 0;  // of the tile
    int step = 0, first_step = 0;
    bool is_last = false;  // step of the tile
    float sum[2] = {0.0f, 0.0f}, shrink[2];
    SegmentIds<kKvRows> ids;

    const uint32 q_from = q_chunk(Lane());
    const int warpgroup = __shfl_sync(0xffffffffu, Lane().warpgroup(), 0);
    const uint32 q_tile = Load::memory_at(kLayout.q + warpgroup * kLayout.q_bytes);
    // What would live through the whole loop, and be spilled, is computed where it is needed.
    constexpr bool kIsShortOfRegisters = kSpec.splits_steps && kSpec.has_mask;
    const auto release = [&](uint32 barrier) {
      if (kIsShortOfRegisters ? Lane().lane == 0 : is_lane_0) ptx::mbarrier_arrive(barrier);
    };
    const auto release_k = [&](const Ring& k) {
      release(k.free());
      if (!kHasQInRegisters && is_last) release(Load::q_free());
    };
    const auto load_ids = [&](bool is_first) {
      if constexpr (kSpec.has_segment_ids) {
        const Task& task = Load::task(number);
        if (is_first) {
          ids.load_rows(task.q_segment_ids, params.q_segment_ids.token, Lane().tile_row, task.rows_left);
        }
        ids.load_keys(task.kv_segment_ids, params.kv_segment_ids.token, step * kKvRows, task.kv_len);
      }
    };
    const auto mask_step = [&](Steps in_full) {
      if constexpr (kSpec.has_score_transform()) {
        const Lane lane;
        const Task& task = Load::task(number);
        const int offset = params.is_bottom_right ? task.work.kv_len - task.work.q_len : 0;
        transform_scores<kSpec>(params, task.slope,
                                task.work.q_begin + lane.tile_row + offset - step * kKvRows - lane.column, scores);
      }
      if constexpr (kSpec.has_segment_ids) ids.mask(scores);
      if (step >= in_full.end) mask<false, true>(Lane(), params, Load::task(number), step * kKvRows, scores);
      if (kSpec.has_mask && step < in_full.begin) {
        mask<true, false>(Lane(), params, Load::task(number), step * kKvRows, scores);
      }
    };
    // The next tile, if there is one: its Q moves to registers.
    const auto open_tile = [&](uint32 n) {
      ptx::mbarrier_wait(Load::q_full(), n & 1);
      const Steps steps = Load::task(n).steps;
      if (steps.begin == steps.end) return false;
      step = first_step = steps.begin;
      load_q(kIsShortOfRegisters ? q_chunk(Lane()) : q_from, q);
      return true;
    };
    // Not before the tile's first product has been issued, which waits for Q's registers. Reads that have only been
    // issued may come later than a copy that overwrites what they are to read: products keep shared memory busy.
    const auto release_q = [&] {
      if constexpr (kHasQInRegisters) release(Load::q_free());
    };
    float factor[2], lse = 0.0f;
    const auto leave_rows_of_part = [&](uint32 n) {
      if constexpr (kSpec.splits_steps) leave_rows(Lane(), params, Load::part(n), rows);
    };
    const auto close_tile = [&](uint32 n) {
      if constexpr (kSpec.splits_steps) {
        const Part part = Load::part(n);
        if (__any_sync(0xffffffffu, !part.is_whole())) {
          leave_out(Lane(), params, part, out);
          release(Load::task_stored(n));
          return;
        }
      }
      store_out(Lane(), params, Load::task(n), factor, lse, out);
      if constexpr (!kHasQInRegisters) {
        // The next product does not read it, which the compiler cannot know: it would keep it beside what is stored.
#pragma unroll
        for (float& sum_here : out) sum_here = 0.0f;
      }
      release(Load::task_stored(n));
    };
    const auto in_full = [&] {
      is_last = step + 1 == Load::task(number).steps.end;
      return Load::task(number).seen_in_full[Lane().warpgroup()];
    };
    constexpr int kEarly = kTile.num_early_columns;
    // With a window to the left, rows may see their first key some steps later than the tile's others.
    const auto find_missing_references = [&](Steps full, bool is_first) {
      if constexpr (kIsUpToDate) {
        float largest[2];
        find_largest(scores, largest);
        move_references(scale, largest, rows, shrink);
      } else if (is_first || (kSpec.has_mask && step <= full.begin)) {
        find_references(scale, scores, rows);
      }
    };
    const auto redo_if_outgrown = [&](const Ring& k, bool has_out) {
      if constexpr (kIsUpToDate) return;
      // Right after the references have been found nothing is above them.
      if (!has_out) return;
      if (__any_sync(0xffffffffu, !(sum[0] + sum[1] < kLargestSum))) {
        redo(params, Load::task(number), step, q, q_from, k.tile(), rows, p, sum, out);
      }
    };

    if (!open_tile(number)) {
      release(Load::task_stored(number));
      return;
    }
    {
      ptx::mbarrier_wait(ring.full(), ring.phase);
      ptx::wgmma_fence();
      const Ring k = ring;
      multiply_qk(q, q_tile, k.tile(), scores);
      ptx::wgmma_commit();
      release_q();
      load_ids(true);
      const Steps full = in_full();
      ring.advance();
      ptx::wgmma_wait<0>(scores);
      mask_step(full);
      reset(rows);
      find_missing_references(full, true);
      if constexpr (!kIsUpToDate) exponentiate<0, kEarly>(scale, rows.reference, sum, scores);
      exponentiate<kIsUpToDate ? 0 : kEarly, kKeyTiles>(scale, rows.reference, sum, scores);
      pack(scores, p);
      release_k(k);
      rows.sum[0] = sum[0];
      rows.sum[1] = sum[1];
    }
    bool has_out = false;

    while (true) {
      if constexpr (kIsShortOfRegisters) has_out = step != first_step;
      const bool is_first = is_last;
      if (is_first) {
        if (!open_tile(number + 1)) break;
        ++number;
      } else {
        ++step;
      }
      ptx::mbarrier_wait(ring.full(), ring.phase);
      ptx::wgmma_fence();
      const Ring k = ring;
      multiply_qk(q, q_tile, k.tile(), scores);
      ptx::wgmma_commit();
      ring.advance();
      Steps full;
      const auto end_rows = [&] {
        full = in_full();
        if (!is_first) return;
        release_q();
        leave_rows_of_part(number - 1);
        close_rows(Lane(), params, Load::task(number - 1), rows, factor, lse);
      };
      // Under that product, for V may not be there yet. (With segments, registers would be spilled.)
      if constexpr (!kSpec.has_segment_ids) end_rows();
      ptx::mbarrier_wait(ring.full(), ring.phase);
      ptx::wgmma_fence();  // of the probabilities: they have changed since the last product that read them
      multiply_pv(p, ring.tile(), has_out, out);
      ptx::wgmma_commit();
      if constexpr (kSpec.has_segment_ids) end_rows();
      load_ids(is_first);
      if constexpr (kIsUpToDate) {
        ptx::wgmma_wait<0>(scores, out);  // what happens to scores takes the registers of the probabilities
      } else {
        ptx::wgmma_wait<1>(scores);
      }
      mask_step(full);
      if (is_first) reset(rows);
      find_missing_references(full, is_first);
      sum[0] = sum[1] = 0.0f;
      if constexpr (!kIsUpToDate) {
        exponentiate<0, kEarly>(scale, rows.reference, sum, scores);
        if (sum[0] + sum[1] < 0.0f) ptx::trap();  // never; but so much is computed here, under the products with V
        ptx::wgmma_wait<0>(scores, out);
      }
      release(ring.free());
      ring.advance();
      if (is_first) close_tile(number - 1);
      has_out = !is_first;
      if constexpr (kIsUpToDate) {
        if (has_out && __any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) scale_out(shrink, out);
      }
      exponentiate<kIsUpToDate ? 0 : kEarly, kKeyTiles>(scale, rows.reference, sum, scores);
      pack(scores, p);
      redo_if_outgrown(k, has_out);
      release_k(k);
      rows.sum[0] += sum[0];
      rows.sum[1] += sum[1];
    }
    ptx::mbarrier_wait(ring.full(), ring.phase);
    ptx::wgmma_fence();
    multiply_pv(p, ring.tile(), has_out, out);
    ptx::wgmma_commit();
    leave_rows_of_part(number);
    close_rows(Lane(), params, Load::task(number), rows, factor, lse);
    ptx::wgmma_wait<0>(out);
    close_tile(number);
    if constexpr (kSpec.splits_steps) merge_parts(params, number);
    release(Load::task_stored(number + 1));  // there is no such tile, and those who wait for it get to know
    if (is_lane_0) ptx::bulk_wait<0>();
  }

  static __device__ __forceinline__ void run(const Params& params) {
    const int warp = __shfl_sync(0xffffffffu, ptx::thread_index() >> 5, 0);
    if (ptx::thread_index() == 0) Load::make_barriers();
    if (ptx::thread_index() == 32) Load::prefetch_maps(params);
    __syncthreads();
    // Up to here the launch overlaps the previous kernel: nobody reads or writes memory before it has ended.
    if (warp != kNumConsumers * 4) ptx::wait_for_previous_kernel();
    if (warp >= kNumConsumers * 4) {
      ptx::decrease_registers<kTile.producer_registers()>();
      if (warp == kNumConsumers * 4) Load::plan(params);
      if (warp == kNumConsumers * 4 + 1 && (ptx::thread_index() & 31) == 0) Load::load(params);
      if (warp >= kNumConsumers * 4 + 2) Load::mend(params);
    } else {
      ptx::increase_registers<kTile.consumer_registers()>();
      compute(params);
    }
  }
};

}  // namespace heed::cuda
