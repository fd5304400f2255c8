// Which keys of which sequence and KV head a block of the backward pass works on: attention_work.cuh's counterpart.
#pragma once

#include "cuda/device/attention_work.cuh"

namespace heed::cuda {

// A tile of keys of one KV head. `head` of the work is the first query head of the group.
struct KeyWork : AttentionWork {
  int k_begin = 0;  // first key of the block, counted from the sequence's first
  int k_rows = 0;   // of the sequence, those that are not used included: their gradients are 0
  int tile = 0;     // of the head: its place in the workspace
};

// Dense: as for tiles of queries. The first keys have the most queries under a causal mask and come first, unless the
// blocks take turns.
template <int kKvRows>
__device__ __forceinline__ KeyWork dense_key_work(const AttentionParams& params, uint32 index, bool is_last_first) {
  const uint32 num_kv_heads = static_cast<uint32>(params.num_q_heads / params.group);
  const uint32 num_tiles = static_cast<uint32>(params.kv_len + kKvRows - 1) / kKvRows;
  const uint32 section_heads = static_cast<uint32>(params.section_heads);
  const uint32 first_head = index / (num_tiles * section_heads) * section_heads;
  const uint32 heads_here = min(section_heads, params.num_heads - first_head);
  const uint32 inside = index - first_head * num_tiles;

  KeyWork work;
  const uint32 head = first_head + inside % heads_here;
  const uint32 sequence = head / num_kv_heads;
  work.kv_head = static_cast<int>(head % num_kv_heads);
  work.batch = static_cast<int>(sequence % static_cast<uint32>(params.batch));
  work.problem = sequence / static_cast<uint32>(params.batch);
  const uint32 tile = inside / heads_here;
  work.tile = static_cast<int>(is_last_first ? num_tiles - 1 - tile : tile);
  work.k_begin = work.tile * kKvRows;
  work.q_len = params.q_len;
  work.kv_len = work.k_rows = params.kv_len;
  return work;
}

// Variable lengths: a tile of keys of one sequence. Returns false past the last tile.
template <int kKvRows>
__device__ __forceinline__ bool varlen_key_work(const AttentionParams& params, uint32 index, bool is_last_first,
                                                KeyWork& work) {
  const int tile = static_cast<int>(index % static_cast<uint32>(params.num_tiles));
  const uint32 num_kv_heads = static_cast<uint32>(params.num_q_heads / params.group);
  const uint32 head = index / static_cast<uint32>(params.num_tiles);
  work.kv_head = static_cast<int>(head % num_kv_heads);
  work.problem = head / num_kv_heads;
  VarlenTile found;
  if (!find_varlen_tile<kKvRows>(pointer_to<int>(params, params.cu_seqlens_k, work, 0), params.cu_seqlens_k.token,
                                 params.batch, params.kv_len, tile, found)) {
    return false;
  }
  const int number = is_last_first ? found.num_tiles - 1 - found.number : found.number;
  work.tile = tile - found.number + number;
  work.k_begin = number * kKvRows;
  work.k_token = found.begin;
  work.k_rows = found.length;
  work.is_outside = found.region == 0 || found.region > params.batch;
  if (work.is_outside) return true;
  work.batch = found.region - 1;
  find_keys(params, work);
  const int* cu_q = pointer_to<int>(params, params.cu_seqlens_q, work, 0);
  const long long stride = params.cu_seqlens_q.token;
  work.q_token = bound(cu_q, stride, work.batch, params.q_len);
  work.q_len = max(bound(cu_q, stride, work.batch + 1, params.q_len) - work.q_token, 0);
  return true;
}

}  // namespace heed::cuda
