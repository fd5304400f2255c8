// Attention forward for Hopper: what the warps that compute get. One warp plans: it takes tiles and writes down what
// the others need to know of them. Another one has them copied to shared memory. Two mend: they compute rows once more
// whose output was not finite.
#pragma once

#include "cuda/device/attend_row_by_row.cuh"
#include "cuda/device/attention_work.cuh"
#include "cuda/device/ptx_sm90.cuh"
#include "cuda/device/score_math.cuh"
#include "cuda/device/segment_steps.cuh"
#include "cuda/sm90_attention_fwd_spec.h"
#include "variants/band.h"

namespace heed::cuda {

template <Sm90AttentionFwdSpec kSpec>
struct Sm90AttentionLoad {
  using Params = Sm90AttentionFwdParams;
  static constexpr Sm90AttentionFwdTile kTile = sm90_attention_fwd_tile(kSpec);
  static constexpr Sm90AttentionFwdLayout kLayout = sm90_attention_fwd_layout(kSpec);
  static constexpr int kNumConsumers = kTile.num_consumers;
  static constexpr int kQRows = kTile.q_rows();
  static constexpr int kKvRows = kTile.kv_rows;
  static constexpr int kKvPartBytes = kKvRows * kPartRowBytes;

  using Steps = StepsOf<kKvRows>;

  static_assert(!kSpec.packs_heads || (!kSpec.is_varlen && !kSpec.has_segment_ids && !kSpec.has_alibi));

  // Where a tile's rows are: without packed heads each is one token further on, of the same head.
  static __device__ __forceinline__ int head_shift(const Params& params) {
    return kSpec.packs_heads ? params.head_shift : 0;
  }
  static __device__ __forceinline__ int token_of(const Params& params, int row) { return row >> head_shift(params); }
  static __device__ __forceinline__ int head_of(const Params& params, int row) {
    return row & ((1 << head_shift(params)) - 1);
  }
  static __device__ __forceinline__ long long offset_of_row(const Params& params, const DeviceOperand& operand,
                                                            int row) {
    return token_of(params, row) * operand.token + head_of(params, row) * operand.head;
  }

  // The first row of a head, or of a pack of them, of a sequence in a tensor map.
  struct alignas(16) Place {
    int row, head, sequence;
  };

  struct alignas(16) Task {
    Steps steps;                        // of the keys that the tile's rows see; empty: there is no tile any more
    Steps seen_in_full[kNumConsumers];  // by all rows of a warpgroup
    int keys_begin, keys_end;           // that the tile's first row sees; each further token sees one further on
    int kv_len;
    int rows_left;             // of the head or pack in the sequence, from the tile's first on
    void* out;                 // its first row, where tensor copies do not write it
    float* lse;                // of its first row; null: not wanted
    float sink, slope;         // of the head, if it is one
    const int* q_segment_ids;  // from its first row on
    const int* kv_segment_ids;
    AttentionWork work;
    bool is_left[kNumConsumers * 4];  // the rows of these warps are left to attend_row
    Place q;                          // of its first row, in the maps of Q and the output
    Place kv;                         // of the sequence's first key
  };
  // Which part of a tile a task is.
  struct alignas(16) Part {
    int slot, first_slot, num_slots;  // its own; those of all parts, in their order; 1: the task is the whole tile
    __device__ __forceinline__ bool is_whole() const { return num_slots == 1; }
  };
  // One is being planned, one loaded, one computed and one stored.
  static constexpr int kNumTasks = 4;
  static constexpr int kNumMenders = 2;  // warps that do what was left
  // Long rows are a half for either.
  static constexpr bool kMendersSplitRows = kSpec.head_dim_v > kColumnsAtOnce<kSpec>;
  static_assert(kSpec.head_dim_v <= kNumMenders * kColumnsAtOnce<kSpec>);

  struct alignas(16) Control {
    uint64 slot_full[kTile.num_slots], slot_free[kTile.num_slots];
    uint64 q_full, q_free;
    uint64 task_full, task_free;
    uint64 task_stored[kNumTasks], task_done[kNumTasks];
    Task tasks[kNumTasks];
    Part parts[kSpec.splits_steps ? kNumTasks : 1];  // of kernels that split
  };
  static_assert(sizeof(Control) <= kSm90ControlBytes);

  static __device__ __forceinline__ Control& control() {
    return *reinterpret_cast<Control*>(shared_memory + kLayout.control);
  }
  static __device__ __forceinline__ Task& task(uint32 number) { return control().tasks[number % kNumTasks]; }
  static __device__ __forceinline__ Part& part(uint32 number) { return control().parts[number % kNumTasks]; }
  static __device__ __forceinline__ uint32 memory_at(int offset) { return ptx::shared_address(shared_memory) + offset; }

  // Where producer and consumers are in the ring of slots.
  struct Ring {
    int slot = 0;
    uint32 phase = 0;
    __device__ __forceinline__ void advance() {
      if (++slot == kTile.num_slots) {
        slot = 0;
        phase ^= 1;
      }
    }
    __device__ __forceinline__ uint32 full() const { return barrier(0); }
    __device__ __forceinline__ uint32 free() const { return barrier(kTile.num_slots); }
    __device__ __forceinline__ uint32 tile() const { return memory_at(slot * kLayout.slot_bytes); }

   private:
    __device__ __forceinline__ uint32 barrier(int first) const {
      return memory_at(kLayout.control) + (first + slot) * 8;
    }
  };
  static __device__ __forceinline__ uint32 q_full() { return memory_at(kLayout.control + kTile.num_slots * 16); }
  static __device__ __forceinline__ uint32 q_free() { return q_full() + 8; }
  static __device__ __forceinline__ uint32 task_full() { return q_full() + 16; }
  static __device__ __forceinline__ uint32 task_free() { return q_full() + 24; }

  // Of one record: all warps have stored its tile's rows, or left them; rows that were left are done.
  static __device__ __forceinline__ uint32 task_stored(uint32 number) { return q_full() + 32 + number % kNumTasks * 8; }
  static __device__ __forceinline__ uint32 task_done(uint32 number) { return task_stored(number) + kNumTasks * 8; }

  static __device__ __forceinline__ void make_barriers() {
    Ring ring;
    for (int i = 0; i < kTile.num_slots; ++i) {
      ptx::mbarrier_init(ring.full(), 1);
      ptx::mbarrier_init(ring.free(), kNumConsumers * 4);
      ring.advance();
    }
    ptx::mbarrier_init(q_full(), 1);
    ptx::mbarrier_init(q_free(), kNumConsumers * 4);
    ptx::mbarrier_init(task_full(), 1);
    ptx::mbarrier_init(task_free(), 1);
    for (uint32 i = 0; i < kNumTasks; ++i) {
      ptx::mbarrier_init(task_stored(i), kNumConsumers * 4);
      ptx::mbarrier_init(task_done(i), kNumMenders);
    }
    ptx::fence_mbarrier_init();
  }

  static __device__ __forceinline__ void prefetch_maps(const Params& params) {
    ptx::prefetch_tensor_map(params.q_map);
    ptx::prefetch_tensor_map(params.k_map);
    ptx::prefetch_tensor_map(params.v_map);
    if constexpr (kTile.has_out_in_shared) ptx::prefetch_tensor_map(params.out_map);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Plan: one warp.

  // Tiles beyond a block's first one. All blocks of a launch count in 16 bytes, {nonce, count}: whoever comes first
  // finds another launch's nonce, or zeros, and puts this one's there; each block's last take finds no tile, and the
  // last take of all leaves zeros, so that the same launch can be repeated (CUDA graphs). Kernels that split: a block
  // takes one part and then no more, so that there are as many takes as there are whole tiles.
  struct Turns {
    bool is_counting = false;

    __device__ __forceinline__ uint32 take(const Params& params, uint32 index) {
      if (params.next_tile == nullptr) return index + gridDim.x;
      if (!is_counting) {
        is_counting = true;
        const uint4 fresh = {params.nonce[0], params.nonce[1], params.nonce[2], 0};
        const uint4 found = ptx::compare_and_swap_16(params.next_tile, {0, 0, 0, 0}, fresh);
        const bool is_zero = (found.x | found.y | found.z | found.w) == 0;
        const bool is_mine = found.x == fresh.x && found.y == fresh.y && found.z == fresh.z;
        if (!is_zero && !is_mine) ptx::compare_and_swap_16(params.next_tile, found, fresh);
      }
      const uint32 number = ptx::take_tile(params.next_tile + 3);
      const uint32 num_takes = kSpec.splits_steps ? params.num_whole_tiles : params.num_tiles_in_all;
      if (number == num_takes - 1) ptx::store_streaming_16(params.next_tile, {0, 0, 0, 0});
      return gridDim.x + number;
    }
  };

  static __device__ __forceinline__ Place place_of(const Params& params, const AttentionWork& work, int head, int token,
                                                   int length) {
    if constexpr (kSpec.is_varlen) return {kRaggedRows - length, head, token + length};
    return {0, head, static_cast<int>(work.problem) * params.batch + work.batch};
  }

  static __device__ __forceinline__ AttentionWork dense_tile(const Params& params, uint32 index) {
    const uint32 num_tiles = static_cast<uint32>(params.num_tiles);
    const uint32 tail_head = params.num_heads - params.num_tail_heads;
    const bool is_tail = index >= tail_head * num_tiles;
    const uint32 section_heads = is_tail ? params.num_tail_heads : static_cast<uint32>(params.section_heads);
    const uint32 end_head = is_tail ? params.num_heads : tail_head;
    index -= is_tail ? tail_head * num_tiles : 0;
    const uint32 section = index / (num_tiles * section_heads);
    const uint32 first_head = (is_tail ? tail_head : 0) + section * section_heads;
    const uint32 heads_here = min(section_heads, end_head - first_head);
    const uint32 inside = index - section * section_heads * num_tiles;
    AttentionWork work;
    const uint32 head = first_head + inside % heads_here;
    const uint32 packs = static_cast<uint32>(params.num_q_heads) >> head_shift(params);
    const uint32 sequence = head / packs;
    work.head = static_cast<int>(head % packs) << head_shift(params);
    work.kv_head = work.head / params.group;
    work.batch = static_cast<int>(sequence % static_cast<uint32>(params.batch));
    work.problem = sequence / static_cast<uint32>(params.batch);
    work.q_begin = static_cast<int>(num_tiles - 1 - inside / heads_here) * (kQRows >> head_shift(params));
    work.q_len = params.q_len;
    work.kv_len = params.kv_len;
    return work;
  }

  static __device__ __forceinline__ variants::Band band_of(const Params& params, const AttentionWork& work) {
    return variants::make_band(work.q_len, work.kv_len, params.window_left, params.window_right,
                               params.is_bottom_right);
  }

  static __device__ __forceinline__ void fill_task(const Params& params, const AttentionWork& work, Steps steps,
                                                   Task& task) {
    const variants::Band band = band_of(params, work);
    constexpr variants::Index kFar = 1 << 30;
    task.steps = steps;
    const int q_end = min(work.q_begin + token_of(params, kQRows), work.q_len);
#pragma unroll
    for (int i = 0; i < kNumConsumers; ++i) {
      const int begin = work.q_begin + token_of(params, i * 64);
      const variants::Range rows = {begin, min(begin + token_of(params, 64), q_end)};
      variants::Range keys = {0, work.kv_len};
      if (kSpec.has_mask && !rows.empty()) keys = variants::intersect(band.keys_of_all(rows), keys);
      task.seen_in_full[i] = keys.empty() ? Steps{steps.end, 0} : Steps::inside(keys);
    }
    const variants::Range keys = band.keys_of_any({work.q_begin, work.q_begin + 1});
    task.keys_begin = static_cast<int>(min(max(keys.begin, -kFar), kFar));
    task.keys_end = static_cast<int>(min(max(keys.end, -kFar), kFar));
    task.kv_len = work.kv_len;
    task.rows_left = (work.q_len - work.q_begin) << head_shift(params);
    task.q = place_of(params, work, work.head >> head_shift(params), work.q_token, work.q_len);
    task.q.row += work.q_begin;
    task.kv = place_of(params, work, work.kv_head, work.k_token, work.kv_len);
    task.sink = params.sinks.data == nullptr ? 0.0f : *pointer_to<float>(params, params.sinks, work, work.head);
    if constexpr (!kTile.has_out_in_shared) {
      task.out = const_cast<unsigned short*>(pointer_to<unsigned short>(params, params.out, work, work.head)) +
                 (work.q_token + work.q_begin) * params.out.token;
    }
    task.work = work;
    for (bool& is_left : task.is_left) is_left = false;
    if constexpr (kSpec.has_alibi) task.slope = *pointer_to<float>(params, params.alibi_slopes, work, work.head);
    if constexpr (kSpec.has_segment_ids) {
      task.q_segment_ids =
          pointer_to<int>(params, params.q_segment_ids, work, 0) + work.q_begin * params.q_segment_ids.token;
      task.kv_segment_ids = pointer_to<int>(params, params.kv_segment_ids, work, 0);
    }
    task.lse = params.lse.data == nullptr ? nullptr
                                          : const_cast<float*>(pointer_to<float>(params, params.lse, work, work.head)) +
                                                (work.q_token + work.q_begin) * params.lse.token;
  }

  // 8 elements of a row of the output, or as many as it has.
  static __device__ __forceinline__ void write_chunk(unsigned short* row, int column, int head_dim, uint4 chunk) {
    if (column + 8 <= head_dim) {
      *reinterpret_cast<uint4*>(row + column) = chunk;
      return;
    }
    const uint32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < head_dim) row[column + i] = static_cast<unsigned short>(words[i / 2] >> i % 2 * 16);
    }
  }

  // The output of a head's rows that see no key: no other warp gets to know of such tiles.
  static __device__ __forceinline__ void write_empty_rows(const Params& params, const AttentionWork& work) {
    constexpr int kChunks = kSpec.head_dim_v / 8;
    const int lane = ptx::thread_index() & 31;
    const int num_rows = min(token_of(params, kQRows), work.q_len - work.q_begin);
    float lse = -kInfinity;
    if (params.sinks.data != nullptr && !work.is_outside)
      lse = *pointer_to<float>(params, params.sinks, work, work.head);
    const bool is_finite = lse < kInfinity;
    const uint32 bits = is_finite ? 0 : 0xffffffffu;  // NaN in either type
    const long long first_row = work.q_token + work.q_begin;
    unsigned short* out = const_cast<unsigned short*>(pointer_to<unsigned short>(params, params.out, work, work.head)) +
                          first_row * params.out.token;
#pragma unroll 1
    for (int index = lane; index < num_rows * kChunks; index += 32) {
      write_chunk(out + index / kChunks * params.out.token, index % kChunks * 8, params.head_dim_v,
                  {bits, bits, bits, bits});
    }
    if (params.lse.data == nullptr) return;
    float* to =
        const_cast<float*>(pointer_to<float>(params, params.lse, work, work.head)) + first_row * params.lse.token;
    for (int row = lane; row < num_rows; row += 32) to[row * params.lse.token] = is_finite ? lse : kNaN;
  }

  static __device__ __forceinline__ void wait_for_record(uint32 number) {
    ptx::mbarrier_wait(task_done(number), (number / kNumTasks & 1) ^ 1);
    __syncwarp();  // or a lane that comes late would wait for a phase that is long over
  }

  // Of each tile, where all tiles touch the same ones.
  static __device__ __forceinline__ Steps steps_of_all_tiles(const Params& params) {
    variants::Range keys = {0, params.kv_len};
    if constexpr (kSpec.has_mask) {
      keys = sm90_attention_fwd_keys(params.q_len, params.kv_len, params.window_left, params.window_right,
                                     params.is_bottom_right);
    }
    return Steps::touching(keys);
  }

  // The part's steps, tile by tile: no more than three.
  static __device__ __forceinline__ void plan_part(const Params& params, uint32 index, uint32 number, bool is_lane_0) {
    const uint32 num_parts = params.num_tiles_in_all - params.num_whole_tiles;
    const Steps steps = steps_of_all_tiles(params);
    const uint32 num_steps = static_cast<uint32>(steps.end - steps.begin);
    const uint32 num_tiles = static_cast<uint32>(params.num_tiles) * params.num_heads - params.num_whole_tiles;
    const uint32 num_steps_in_all = num_tiles * num_steps;
    const auto part_with = [&](uint32 step) { return ((step + 1) * num_parts - 1) / num_steps_in_all; };
    const uint32 end = (index + 1) * num_steps_in_all / num_parts;
    uint32 begin = index * num_steps_in_all / num_parts;
    ptx::wait_for_previous_kernel();
#pragma unroll 1
    while (begin < end) {
      const uint32 tile = begin / num_steps;
      const uint32 first = tile * num_steps, last = first + num_steps - 1;
      const uint32 next = min(end, last + 1);
      wait_for_record(number);
      if (is_lane_0) {
        fill_task(params, dense_tile(params, params.num_whole_tiles + tile),
                  {steps.begin + static_cast<int>(begin - first), steps.begin + static_cast<int>(next - first)},
                  task(number));
        const uint32 first_part = part_with(first);
        part(number) = {static_cast<int>(index + tile), static_cast<int>(first_part + tile),
                        static_cast<int>(part_with(last) - first_part + 1)};
        ptx::mbarrier_arrive(task_full());
      }
      __syncwarp();
      ptx::mbarrier_wait(task_free(), number & 1);
      __syncwarp();  // or a lane that comes late would wait for a phase that is long over
      ++number;
      begin = next;
    }
    end_plan(number, is_lane_0);
  }

  static __device__ __forceinline__ void end_plan(uint32 number, bool is_lane_0) {
    // Its blocks come as those of this launch end: next to one of them there are no registers to speak of.
    ptx::let_next_kernel_start();
    wait_for_record(number);
    if (is_lane_0) {
      task(number).steps = {0, 0};
      ptx::mbarrier_arrive(task_full());
    }
  }

  // It waits for the previous kernel itself: the first time, others take none.
  static __device__ __forceinline__ void plan(const Params& params) {
    const bool is_lane_0 = (ptx::thread_index() & 31) == 0;
    Turns turns;
    uint32 number = 0;  // of the tile
    uint32 index = blockIdx.x;
    while (index < params.num_tiles_in_all) {
      if constexpr (kSpec.splits_steps) {
        if (index >= params.num_whole_tiles)
          return plan_part(params, index - params.num_whole_tiles, number, is_lane_0);
      }
      AttentionWork work;
      bool is_tile = true;
      if constexpr (kSpec.is_varlen) {
        ptx::wait_for_previous_kernel();
        is_tile = varlen_work<kQRows>(params, index, work);
      } else {
        work = dense_tile(params, index);  // of parameters alone
        ptx::wait_for_previous_kernel();
      }
      if (is_tile) {
        variants::Range keys = {0, work.kv_len};
        const variants::Range rows = {work.q_begin, min(work.q_begin + token_of(params, kQRows), work.q_len)};
        if constexpr (kSpec.has_mask) keys = variants::intersect(band_of(params, work).keys_of_any(rows), keys);
        if constexpr (kSpec.has_segment_ids) {
          keys = warp_segment_range(pointer_to<int>(params, params.q_segment_ids, work, 0), params.q_segment_ids.token,
                                    rows, pointer_to<int>(params, params.kv_segment_ids, work, 0),
                                    params.kv_segment_ids.token, keys);
        }
        const Steps steps = Steps::touching(keys);
        if (steps.begin == steps.end) {
          do {
            write_empty_rows(params, work);
          } while (kSpec.packs_heads && head_of(params, ++work.head) != 0);
        } else {
          // Those that compute and load are done with the record, of four tiles ago, when the tile before the previous
          // one has been opened.
          wait_for_record(number);
          if (is_lane_0) {
            fill_task(params, work, steps, task(number));
            if constexpr (kSpec.splits_steps) part(number).num_slots = 1;
            ptx::mbarrier_arrive(task_full());
          }
          __syncwarp();
          ptx::mbarrier_wait(task_free(), number & 1);
          ++number;
        }
      }
      uint32 next = 0;
      if (is_lane_0) next = turns.take(params, index);
      index = __shfl_sync(0xffffffffu, next, 0);
    }
    end_plan(number, is_lane_0);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Load: one thread.

  template <int kParts, int kPartBytes, bool kPacksHeads = false>
  static __device__ __forceinline__ void load_tile(uint32 to, const TensorMap& map, uint32 barrier, const Place& place,
                                                   int row) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if constexpr (kSpec.is_varlen) {
        ptx::tma_load(to + part * kPartBytes, map, barrier, part * kPartColumns, place.row + row, place.head,
                      place.sequence, kRaggedRows);
      } else if constexpr (kPacksHeads) {
        ptx::tma_load(to + part * kPartBytes, map, barrier, part * kPartColumns, 0, place.row + row, place.head,
                      place.sequence);
      } else {
        ptx::tma_load(to + part * kPartBytes, map, barrier, part * kPartColumns, place.row + row, place.head,
                      place.sequence);
      }
    }
  }

  // K or V of a step.
  template <int kParts>
  static __device__ __forceinline__ void load_slot(Ring& ring, const TensorMap& map, const Place& place, int row) {
    ptx::mbarrier_wait(ring.free(), ring.phase ^ 1);
    ptx::mbarrier_arrive_expect(ring.full(), kParts * kKvPartBytes);
    load_tile<kParts, kKvPartBytes>(ring.tile(), map, ring.full(), place, row);
    ring.advance();
  }

  static __device__ __forceinline__ void load(const Params& params) {
    constexpr int kQkParts = parts_of(kSpec.head_dim_qk), kVParts = parts_of(kSpec.head_dim_v);
    Ring ring;
    bool has_v = false;
    int v_row = 0;
    Place v_place = {};
    for (uint32 number = 0;; ++number) {
      ptx::mbarrier_wait(task_full(), number & 1);
      const Steps steps = task(number).steps;
      const Place q = task(number).q, kv = task(number).kv;
      const bool is_tile = steps.begin < steps.end;
      int step = steps.begin;
      const uint32 q_parity = (number & 1) ^ 1;
      if (!ptx::mbarrier_has_ended(q_free(), q_parity)) {
        // The tile before still needs its Q: what can be loaded first, is.
        if (is_tile) load_slot<kQkParts>(ring, params.k_map, kv, step * kKvRows);
        if (has_v) load_slot<kVParts>(ring, params.v_map, v_place, v_row);
        has_v = is_tile;
        v_row = step * kKvRows;
        v_place = kv;
        ++step;
      }
      ptx::mbarrier_wait(q_free(), q_parity);
      if (!is_tile) break;
      ptx::mbarrier_arrive(task_free());
      ptx::mbarrier_arrive_expect(q_full(), kNumConsumers * kLayout.q_bytes);
#pragma unroll
      for (int i = 0; i < kNumConsumers; ++i) {
        load_tile<kQkParts, 64 * kPartRowBytes, kSpec.packs_heads>(memory_at(kLayout.q + i * kLayout.q_bytes),
                                                                   params.q_map, q_full(), q, token_of(params, i * 64));
      }
#pragma unroll 1
      for (; step < steps.end; ++step) {
        load_slot<kQkParts>(ring, params.k_map, kv, step * kKvRows);
        if (has_v) load_slot<kVParts>(ring, params.v_map, v_place, v_row);
        has_v = true;
        v_row = step * kKvRows;
        v_place = kv;
      }
    }
    ptx::mbarrier_arrive(q_full());
    if (has_v) load_slot<kVParts>(ring, params.v_map, v_place, v_row);
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Mend: warps that compute rows again whose output was not finite. Not a branch of the warps that compute: they would
  // keep what addresses their products in registers of each thread, which takes a fifth more instructions.

  // The same where registers are few: one counts rows.
  static __device__ __forceinline__ void mend_in_pairs(const Params& params, const Task& stored) {
    int row = ptx::thread_index() / 32 % kNumMenders * 16;
#pragma unroll 1
    while (row < min(kQRows, stored.rows_left)) {
      if (!stored.is_left[row / 16]) {
        row += kNumMenders * 16;
        continue;
      }
      attend_row_in_pairs<kSpec>(params, stored.work, stored.work.q_begin + row);
      __syncwarp();
      row += row % 16 == 15 ? (kNumMenders - 1) * 16 + 1 : 1;
    }
  }

  // From one counter rather than from loops within loops: a register that lived as long would be spilled.
  static __device__ __forceinline__ void mend_whole_rows(const Params& params, const Task& stored) {
#pragma unroll 1
    for (int row = 0; row < kQRows; ++row) {
      const int warp = row / 16, mender = ptx::thread_index() / 32 % kNumMenders;
      const bool is_mine = kMendersSplitRows || warp % kNumMenders == mender;
      if (!is_mine || !stored.is_left[warp] || row >= stored.rows_left) {
        row |= 15;
        continue;
      }
      attend_row<kSpec>(params, stored.work, (stored.work.q_begin << head_shift(params)) + row,
                        kMendersSplitRows ? mender * kColumnsAtOnce<kSpec> : 0);
    }
  }

  static __device__ __forceinline__ void mend_tile(const Params& params, const Task& stored) {
    if constexpr (kSpec.is_tall) {
      mend_in_pairs(params, stored);
    } else {
      mend_whole_rows(params, stored);
    }
  }

  static __device__ __forceinline__ void mend(const Params& params) {
    for (uint32 number = 0;; ++number) {
      ptx::mbarrier_wait(task_stored(number), number / kNumTasks & 1);
      const Task& stored = task(number);
      if (stored.steps.begin == stored.steps.end) {
        if constexpr (kSpec.splits_steps) {  // tiles whose parts have been merged since
          for (uint32 merged = number - min(number, 3u); merged != number; ++merged) {
            if (!part(merged).is_whole()) mend_tile(params, task(merged));
          }
        }
        return;
      }
      bool is_mended_here = true;
      if constexpr (kSpec.splits_steps) is_mended_here = part(number).is_whole();  // parts: when they have been merged
      if (is_mended_here) mend_tile(params, stored);
      __syncwarp();
      if ((ptx::thread_index() & 31) == 0) ptx::mbarrier_arrive(task_done(number));
    }
  }
};

}  // namespace heed::cuda
