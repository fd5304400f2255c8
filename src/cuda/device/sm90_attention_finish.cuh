// Attention forward for Hopper: what becomes of a tile's sums. Rows are divided by theirs and written, or left to the
// warps that mend; parts of tiles pass through memory and are merged. Also what a thread has of a tile.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/ptx_sm90.cuh"
#include "cuda/device/score_math.cuh"
#include "cuda/device/sm90_attention_load.cuh"
#include "cuda/sm90_attention_fwd_spec.h"
#include "variants/sinks.h"

namespace heed::cuda {

template <Sm90AttentionFwdSpec kSpec>
struct Sm90AttentionFinish {
  using Params = Sm90AttentionFwdParams;
  static constexpr Sm90AttentionFwdTile kTile = sm90_attention_fwd_tile(kSpec);
  static constexpr Sm90AttentionFwdLayout kLayout = sm90_attention_fwd_layout(kSpec);
  using Math = MathOf<kSpec.element>;
  static constexpr bool kIsBf16 = kSpec.element == Element::kBFloat16;
  static constexpr int kNumConsumers = kTile.num_consumers;
  static constexpr int kKvRows = kTile.kv_rows;
  static constexpr int kKeyTiles = kKvRows / 8;  // of a step, 8 keys each
  static constexpr int kDimTiles = kSpec.head_dim_v / 8;
  static constexpr int kQkSteps = kSpec.head_dim_qk / 16;
  static constexpr int kPvSteps = kKvRows / 16;
  static constexpr int kKvPartBytes = kKvRows * kPartRowBytes;
  static constexpr int kWarpOutBytes = kLayout.out_bytes / 4;
  static constexpr int kWarpPartBytes = 16 * kPartRowBytes;
  static constexpr int kSlotWarpBytes = sm90_attention_fwd_slot_warp_bytes(kSpec);
  static constexpr int kSlotBytes = sm90_attention_fwd_slot_bytes(kSpec);
  static_assert(!kSpec.splits_steps || (!kSpec.is_varlen && !kSpec.has_segment_ids && kTile.has_q_in_registers));

  // Sums of a step's probabilities from which on its references are too old: float32 holds more, but fp16 has to hold
  // each probability.
  static constexpr float kLargestSum = kIsBf16 ? 0x1p60f : 0x1p15f;
  // Exponents as large as that are rounded by too much.
  static constexpr float kSteep = 0x1p26f;
  // The reference of a row that has seen no key: a score then overflows, and the step is redone.
  static constexpr float kUnseen = -0x1p100f;
  // References are the largest scores seen at any time, and no step is redone: a redo would have to transform scores
  // again, and where there are segments, rows often see nothing of a step.
  static constexpr bool kIsUpToDate = kSpec.has_score_transform() || kSpec.has_segment_ids;

  // A warp's 16 rows of a step, each thread's rows being lane / 4 and 8 more (element.cuh).
  using Scores = float[kKeyTiles * 4];
  using Output = float[kDimTiles * 4];
  static constexpr bool kHasQInRegisters = kTile.has_q_in_registers;
  static constexpr bool kHasOutInShared = kTile.has_out_in_shared;
  using QFragments = uint32[kHasQInRegisters ? kQkSteps : 1][4];
  using Probabilities = uint32[kPvSteps][4];
  using OutWords = uint32[kDimTiles / 2][4];

  using Load = Sm90AttentionLoad<kSpec>;
  using Steps = typename Load::Steps;
  using Task = typename Load::Task;
  using Part = typename Load::Part;
  using Ring = typename Load::Ring;

  struct Lane {
    int lane, warp;
    int row, column;  // in its half row tile; the first of its two in an 8-column tile
    int tile_row;     // of the first of its two rows
    __device__ __forceinline__ Lane() : Lane(ptx::thread_index()) {}
    __device__ __forceinline__ explicit Lane(int thread)
        : lane(thread & 31), warp(thread >> 5), row(lane >> 2), column((lane & 3) * 2), tile_row(warp * 16 + row) {}
    __device__ __forceinline__ int warpgroup() const { return warp >> 2; }
  };

  struct Rows {
    float reference[2];  // the exponent of 2 that probabilities refer to: of a score seen earlier, rounded
    float sum[2];        // this thread's columns only, until the end
  };

  static __device__ __forceinline__ void reset(Rows& rows) {
    rows.reference[0] = rows.reference[1] = kUnseen;
    rows.sum[0] = rows.sum[1] = 0.0f;
  }

  static __device__ __forceinline__ float exponent_scale(const Params& params) {
    return kSpec.has_score_transform() ? kLog2E : params.scale_log2;
  }

  template <int kSize>
  static __device__ __forceinline__ void pack(const float (&scores)[kSize], uint32 (&p)[kSize / 8][4]) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) p[i / 4][i % 4] = Math::pack(scores[2 * i], scores[2 * i + 1]);
  }

  static __device__ __forceinline__ void scale_out(const float (&factor)[2], Output& out) {
#pragma unroll
    for (int i = 0; i < kDimTiles * 4; ++i) out[i] *= factor[i / 2 % 2];
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Finish.

  // What the output is multiplied with, and the LSE of the row that this thread writes.
  static __device__ __forceinline__ void close_rows(const Lane& lane, const Params& params, const Task& task,
                                                    const Rows& rows, float (&factor)[2], float& lse) {
    // From exponents of 2 to natural units, as the sum of two floats.
    const float scale = exponent_scale(params), natural_scale = kSpec.has_score_transform() ? 1.0f : params.scale;
    const float unit = natural_scale * ptx::reciprocal_approx(scale);
    const float unit_rest = fmaf(-unit, scale, natural_scale) * ptx::reciprocal_approx(scale);
    variants::RowEnd<float> ends[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float top = rows.reference[half] * unit;
      const float rest = fmaf(rows.reference[half], unit_rest, fmaf(rows.reference[half], unit, -top));
      const bool is_empty = sum == 0.0f;
      ends[half] = {is_empty ? 1.0f : sum, is_empty ? -kInfinity : top, is_empty ? 0.0f : rest, is_empty ? 1.0f : sum};
    }
    if (params.sinks.data != nullptr) {
      const auto sink_of = [&](int row) {
        if constexpr (!kSpec.packs_heads) return task.sink;
        const int head = task.work.head + Load::head_of(params, row);
        return *pointer_to<float>(params, params.sinks, task.work, head);
      };
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const variants::RowEnd<float> end = half == 0 ? ends[0] : ends[1];
        const variants::RowEnd<float> with_sink =
            variants::finish_row(end.top, end.rest, end.top == -kInfinity ? 0.0f : end.total, true,
                                 sink_of(lane.tile_row + half * 8), [](float x) { return exp_accurate(x); });
        if (half == 0) {
          ends[0] = with_sink;
        } else {
          ends[1] = with_sink;
        }
      }
    }
    factor[0] = ptx::reciprocal_approx(ends[0].divisor);
    factor[1] = ptx::reciprocal_approx(ends[1].divisor);
    const bool is_second = (lane.lane & 1) != 0;
    const float total = is_second ? ends[1].total : ends[0].total;
    const float rest = is_second ? ends[1].rest : ends[0].rest;
    lse = (is_second ? ends[1].top : ends[0].top) + (rest + logf(total));
  }
  // A row's four lanes know the same: the first two of them write a row each. After the output, whose fence would wait
  // for it.
  static __device__ __forceinline__ void write_lse(const Lane& lane, const Params& params, const Task& task,
                                                   float lse) {
    const int row = lane.tile_row + (lane.lane & 1) * 8;
    if (task.lse != nullptr && lane.column < 4 && row < task.rows_left) {
      task.lse[Load::offset_of_row(params, params.lse, row)] = lse;
    }
  }

  template <int kSize>
  static __device__ __forceinline__ bool are_finite(const uint32 (&words)[kSize][4]) {
    uint32 zeros[4] = {0, 0, 0, 0};  // NaN from the first infinity or NaN on
#pragma unroll
    for (int i = 0; i < kSize * 4; ++i) {
      uint32& zero = zeros[i % 4];
      zero = kIsBf16 ? ptx::multiply_add_bf16(words[i / 4][i % 4], 0, zero)
                     : ptx::multiply_add_f16(words[i / 4][i % 4], 0, zero);
    }
    return ((zeros[0] | zeros[1] | zeros[2] | zeros[3]) & 0x7fff7fffu) == 0;
  }

  // By way of shared memory: there, when the copy before has read it, ...
  static __device__ __forceinline__ void stage_out(const Lane& lane, const OutWords& words) {
    const uint32 base = Load::memory_at(kLayout.out) + lane.warp * kWarpOutBytes;
    if (lane.lane == 0) ptx::bulk_wait_read<0>();
    __syncwarp();
    const int row = lane.lane & 15;
#pragma unroll
    for (int i = 0; i < kDimTiles; i += 2) {
      const int chunk = i % 8 + (lane.lane >> 4);
      ptx::stmatrix_x4(base + i / 8 * kWarpPartBytes + row * kPartRowBytes + ((chunk ^ (row & 7)) << 4),
                       words[i / 2][0], words[i / 2][1], words[i / 2][2], words[i / 2][3]);
    }
    ptx::fence_async_shared();
  }
  // ... and from there.
  static __device__ __forceinline__ void copy_out(const Lane& lane, const Params& params,
                                                  const typename Load::Place& place) {
    const uint32 base = Load::memory_at(kLayout.out) + lane.warp * kWarpOutBytes;
    __syncwarp();
    if (lane.lane == 0) {
#pragma unroll
      for (int part = 0; part < parts_of(kSpec.head_dim_v); ++part) {
        if constexpr (kSpec.is_varlen) {
          ptx::tma_store(params.out_map, base + part * kWarpPartBytes, part * kPartColumns, place.row + lane.warp * 16,
                         place.head, place.sequence, kRaggedRows);
        } else if constexpr (kSpec.packs_heads) {
          ptx::tma_store(params.out_map, base + part * kWarpPartBytes, part * kPartColumns, 0,
                         place.row + Load::token_of(params, lane.warp * 16), place.head, place.sequence);
        } else {
          ptx::tma_store(params.out_map, base + part * kWarpPartBytes, part * kPartColumns, place.row + lane.warp * 16,
                         place.head, place.sequence);
        }
      }
      ptx::bulk_commit();
    }
  }

  // Straight to memory. A row's four lanes have two columns each of a tile of 8: two of them exchange what they have of
  // two tiles for 8 bytes of one, and the four write 32 bytes in a row, a sector. The head dim is a multiple of 8.
  static __device__ __forceinline__ void write_out(const Lane& lane, const Params& params, const Task& task,
                                                   const OutWords& words) {
    const bool is_odd = (lane.lane & 1) != 0;
    const int column = (is_odd ? 8 : 0) + (lane.lane & 2) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane.tile_row + half * 8;
      const bool has_row = row < task.rows_left;
      unsigned short* to =
          static_cast<unsigned short*>(task.out) + Load::offset_of_row(params, params.out, row) + column;
#pragma unroll
      for (int i = 0; i < kDimTiles / 2; ++i) {
        const uint32 left = words[i][half], right = words[i][2 + half];
        const uint32 got = __shfl_xor_sync(0xffffffffu, is_odd ? left : right, 1);
        if (has_row && column + i * 16 < params.head_dim_v) {
          *reinterpret_cast<uint2*>(to + i * 16) = {is_odd ? got : left, is_odd ? right : got};
        }
      }
    }
  }

  // Rows of a warp are left to others if one of their outputs is not finite.
  static __device__ __forceinline__ void store_out(const Lane& lane, const Params& params, Task& task,
                                                   const float (&factor)[2], float lse, Output& out) {
    scale_out(factor, out);
    OutWords words;
    pack(out, words);
    // What it waits for passes under the test. (With segments, registers would be spilled.)
    constexpr bool kStagesFirst = kHasOutInShared && !kSpec.has_segment_ids;
    if constexpr (kStagesFirst) stage_out(lane, words);
    if (__any_sync(0xffffffffu, !are_finite(words))) {
      ptx::store_byte_of_lane_0(lane.lane, ptx::shared_address(task.is_left + lane.warp),
                                1);  // lane 0 also tells readers
      return;
    }
    if constexpr (kHasOutInShared) {
      if constexpr (!kStagesFirst) stage_out(lane, words);
      copy_out(lane, params, task.q);
    } else {
      write_out(lane, params, task, words);
    }
    write_lse(lane, params, task, lse);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Tiles whose steps several blocks share. Each leaves what it has summed up in memory and then looks whether the
  // others have: whoever finds all parts merges them, in their order. Nobody waits, somebody is last, and if two find
  // all of them, they write the same.

  using PartRow = float4[32];  // a lane has 16 bytes of each
  static __device__ __forceinline__ PartRow* part_rows(const Lane& lane, const Params& params, int slot) {
    return reinterpret_cast<PartRow*>(params.slots + slot * static_cast<long long>(kSlotBytes) +
                                      lane.warp * kSlotWarpBytes);
  }
  static __device__ __forceinline__ uint64* part_flag(const Lane& lane, const Params& params, int slot) {
    return reinterpret_cast<uint64*>(params.slots + slot * static_cast<long long>(kSlotBytes) +
                                     kNumConsumers * 4 * kSlotWarpBytes) +
           lane.warp;
  }

  static __device__ __forceinline__ void leave_rows(const Lane& lane, const Params& params, const Part& part,
                                                    const Rows& rows) {
    if (part.is_whole()) return;
    part_rows(lane, params, part.slot)[kDimTiles][lane.lane] = {rows.reference[0], rows.reference[1], rows.sum[0],
                                                                rows.sum[1]};
  }
  static __device__ __forceinline__ void leave_out(const Lane& lane, const Params& params, const Part& part,
                                                   const Output& out) {
    PartRow* to = part_rows(lane, params, part.slot);
#pragma unroll
    for (int i = 0; i < kDimTiles; ++i) {
      to[i][lane.lane] = {out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]};
    }
  }

  static __device__ __forceinline__ float4 load_part_row(const PartRow* row, int lane) {
    const uint4 bits = ptx::load_own_16(&(*row)[lane]);
    return {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
  }

  // A reference that is NaN makes its row NaN.
  static __device__ __forceinline__ void merge(const Lane& lane, const Params& params, const Part& part, Rows& rows,
                                               Output& out) {
    reset(rows);
#pragma unroll
    for (float& sum : out) sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < part.num_slots; ++i) {
      const PartRow* from = part_rows(lane, params, part.first_slot + i);
      const float4 more_rows = load_part_row(from + kDimTiles, lane.lane);
      float4 more[kDimTiles];
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile) more[tile] = load_part_row(from + tile, lane.lane);
      const float references[2] = {more_rows.x, more_rows.y}, sums[2] = {more_rows.z, more_rows.w};
      float keep[2], factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float reference = fmaxf(rows.reference[half], references[half]);
        keep[half] = ptx::exp2_approx(rows.reference[half] - reference);
        factor[half] = ptx::exp2_approx(references[half] - reference);
        rows.reference[half] = reference;
        rows.sum[half] = fmaf(sums[half], factor[half], rows.sum[half] * keep[half]);
      }
      scale_out(keep, out);
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile) {
        out[4 * tile] = fmaf(more[tile].x, factor[0], out[4 * tile]);
        out[4 * tile + 1] = fmaf(more[tile].y, factor[0], out[4 * tile + 1]);
        out[4 * tile + 2] = fmaf(more[tile].z, factor[1], out[4 * tile + 2]);
        out[4 * tile + 3] = fmaf(more[tile].w, factor[1], out[4 * tile + 3]);
      }
    }
  }

  // A block's last three tiles may be parts.
  static __device__ __forceinline__ void merge_parts(const Params& params, uint32 last) {
    const Lane lane;
    const uint64 mark = params.nonce[0] | static_cast<uint64>(params.nonce[1]) << 32;
    const uint32 first = last - min(last, 2u);
    __syncwarp();
    for (uint32 number = first; number != last + 1; ++number) {
      const Part part = Load::part(number);
      if (!part.is_whole() && lane.lane == 0) ptx::store_release(part_flag(lane, params, part.slot), mark);
    }
    __syncwarp();
    __threadfence();  // of two that look for each other's flag, one finds it
#pragma unroll 1
    for (uint32 number = first; number != last + 1; ++number) {
      const Part part = Load::part(number);
      if (part.is_whole()) continue;
      uint64* flag = part_flag(lane, params, part.first_slot + min(lane.lane, part.num_slots - 1));
      if (__any_sync(0xffffffffu, ptx::load_acquire(flag) != mark)) continue;
      __syncwarp();  // each lane has looked at one flag, and reads what all of them stand for
      Rows rows;
      Output out;
      float factor[2], lse;
      merge(lane, params, part, rows, out);
      close_rows(lane, params, Load::task(number), rows, factor, lse);
      store_out(lane, params, Load::task(number), factor, lse, out);
      ptx::store_release(flag, 0);  // a launch that is repeated has the same mark
    }
  }
};

}  // namespace heed::cuda
