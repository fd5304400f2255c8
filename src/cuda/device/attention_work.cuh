// Which query rows of which sequence and head a block of threads works on, and where they lie in memory. Dense batches
// and variable-length ones differ here and nowhere else.
#pragma once

#include "cuda/attention_spec.h"
#include "cuda/device/ptx.cuh"
#include "variants/band.h"

namespace heed::cuda {

struct AttentionWork {
  uint32 problem = 0;  // index over the leading axes
  int batch = 0;       // sequence
  int head = 0, kv_head = 0;
  int q_begin = 0;               // first row of the block, counted from the sequence's first
  int q_len = 0, kv_len = 0;     // of the sequence
  int q_token = 0, k_token = 0;  // the sequence's first rows in memory
  bool is_outside = false;       // rows that belong to no sequence: output 0, lse -inf
};

// Offset in elements of one operand's part: its leading axes, batch and head.
__device__ __forceinline__ long long offset_of(const AttentionParams& params, const DeviceOperand& operand,
                                               const AttentionWork& work, int head) {
  long long offset = work.batch * operand.batch + head * operand.head;
  uint32 rest = work.problem;
#pragma unroll 1
  for (int axis = params.num_lead_axes - 1; axis >= 0; --axis) {
    const uint32 size = static_cast<uint32>(params.lead_sizes[axis]);
    offset += rest % size * operand.lead[axis];
    rest /= size;
  }
  return offset;
}

template <class T>
__device__ __forceinline__ const T* pointer_to(const AttentionParams& params, const DeviceOperand& operand,
                                               const AttentionWork& work, int head) {
  return static_cast<const T*>(operand.data) + offset_of(params, operand, work, head);
}

// Dense: heads come in sections whose K and V stay in L2, and inside a section the last query rows, which have the most
// keys under a causal mask, come first.
template <int kQRows>
__device__ __forceinline__ AttentionWork dense_work(const AttentionParams& params, uint32 index) {
  const uint32 num_tiles = static_cast<uint32>(params.q_len + kQRows - 1) / kQRows;
  const uint32 section_heads = static_cast<uint32>(params.section_heads);
  const uint32 first_head = index / (num_tiles * section_heads) * section_heads;
  const uint32 heads_here = min(section_heads, params.num_heads - first_head);
  const uint32 inside = index - first_head * num_tiles;

  AttentionWork work;
  const uint32 head = first_head + inside % heads_here;
  const uint32 sequence = head / static_cast<uint32>(params.num_q_heads);
  work.head = static_cast<int>(head % static_cast<uint32>(params.num_q_heads));
  work.kv_head = work.head / params.group;
  work.batch = static_cast<int>(sequence % static_cast<uint32>(params.batch));
  work.problem = sequence / static_cast<uint32>(params.batch);
  work.q_begin = static_cast<int>(num_tiles - 1 - inside / heads_here) * kQRows;
  work.q_len = params.q_len;
  work.kv_len = params.kv_len;
  return work;
}

// Sequence b of the packed rows is [bound(b), bound(b + 1)); bounds are device data and may hold anything.
__device__ __forceinline__ int bound(const int* cu_seqlens, long long stride, int index, int limit) {
  return min(max(cu_seqlens[index * stride], 0), limit);
}

// Which tile of packed rows a block works on. The rows before the first sequence and after the last one count as
// sequences too: regions 0 and batch + 1.
struct VarlenTile {
  int region;             // sequence + 1
  int begin, length;      // of the region's rows
  int number, num_tiles;  // of the region
};

// Tile number `tile` of the regions laid end to end, each cut into tiles of its own. Every warp searches alike, 32
// regions at a time. Returns false past the last tile.
template <int kRows>
__device__ __forceinline__ bool find_varlen_tile(const int* cu_seqlens, long long stride, int batch, int limit,
                                                 int tile, VarlenTile& found) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int num_regions = batch + 2;
  for (int first = 0; first < num_regions; first += 32) {
    const int region = first + lane;
    int begin = 0, end = 0;
    if (region < num_regions) {
      begin = region == 0 ? 0 : bound(cu_seqlens, stride, region - 1, limit);
      end = region > batch ? limit : bound(cu_seqlens, stride, region, limit);
    }
    const int length = max(end - begin, 0);
    const int num_tiles = (length + kRows - 1) / kRows;
    int tiles_to_here = num_tiles;  // inclusive prefix sum over the lanes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, tiles_to_here, step);
      if (lane >= step) tiles_to_here += before;
    }
    const uint32 reached = __ballot_sync(0xffffffffu, tile < tiles_to_here);
    if (reached != 0) {
      const int owner = __ffs(static_cast<int>(reached)) - 1;
      found.region = first + owner;
      found.begin = __shfl_sync(0xffffffffu, begin, owner);
      found.length = __shfl_sync(0xffffffffu, length, owner);
      found.num_tiles = __shfl_sync(0xffffffffu, num_tiles, owner);
      found.number = tile - __shfl_sync(0xffffffffu, tiles_to_here - num_tiles, owner);
      return true;
    }
    tile -= __shfl_sync(0xffffffffu, tiles_to_here, 31);
  }
  return false;
}

// The keys of the work's sequence: where they begin, and how many there are.
__device__ __forceinline__ void find_keys(const AttentionParams& params, AttentionWork& work) {
  const int* cu_k = pointer_to<int>(params, params.cu_seqlens_k, work, 0);
  const long long stride = params.cu_seqlens_k.token;
  work.k_token = bound(cu_k, stride, work.batch, params.kv_len);
  work.kv_len = max(bound(cu_k, stride, work.batch + 1, params.kv_len) - work.k_token, 0);
  if (params.seqused_k.data != nullptr) {
    const int* used = pointer_to<int>(params, params.seqused_k, work, 0);
    work.kv_len = min(max(used[work.batch * params.seqused_k.token], 0), work.kv_len);
  }
}

// Variable lengths: a tile of query rows of one sequence. Returns false past the last tile.
template <int kQRows>
__device__ __forceinline__ bool varlen_work(const AttentionParams& params, uint32 index, AttentionWork& work) {
  const int tile = static_cast<int>(index % static_cast<uint32>(params.num_tiles));
  const uint32 head = index / static_cast<uint32>(params.num_tiles);
  work.head = static_cast<int>(head % static_cast<uint32>(params.num_q_heads));
  work.kv_head = work.head / params.group;
  work.problem = head / static_cast<uint32>(params.num_q_heads);
  VarlenTile found;
  if (!find_varlen_tile<kQRows>(pointer_to<int>(params, params.cu_seqlens_q, work, 0), params.cu_seqlens_q.token,
                                params.batch, params.q_len, tile, found)) {
    return false;
  }
  work.q_token = found.begin;
  work.q_len = found.length;
  work.q_begin = (found.num_tiles - 1 - found.number) * kQRows;  // the longest rows first
  work.is_outside = found.region == 0 || found.region > params.batch;
  if (work.is_outside) return true;
  work.batch = found.region - 1;
  find_keys(params, work);
  return true;
}

// Steps of kKvRows keys, half-open.
template <int kKvRows>
struct StepsOf {
  int begin, end;
  // Those that hold any key of the range.
  static __device__ __forceinline__ StepsOf touching(variants::Range keys) {
    if (keys.empty()) return {0, 0};
    return {static_cast<int>(keys.begin) / kKvRows, (static_cast<int>(keys.end) + kKvRows - 1) / kKvRows};
  }
  // Those that lie in the range (which starts at 0 or later).
  static __device__ __forceinline__ StepsOf inside(variants::Range keys) {
    if (keys.empty()) return {0, 0};
    return {(static_cast<int>(keys.begin) + kKvRows - 1) / kKvRows, static_cast<int>(keys.end) / kKvRows};
  }
  __device__ __forceinline__ bool contains(int step) const { return step >= begin && step < end; }
};

}  // namespace heed::cuda
