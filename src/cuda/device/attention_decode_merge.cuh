// The second kernel of attention of one query, where its keys were divided into pieces: merges the pieces of a query
// head, in their order. What it reads was written just before and lies in L2.
#pragma once

#include "cuda/device/decode_parts.cuh"

namespace heed::cuda {

template <AttentionDecodeMergeSpec kSpec>
struct AttentionDecodeMerge {
  using Params = Sm80AttentionDecodeParams;
  static constexpr int kNumThreads = 64;  // one for every four columns: up to 256
  static constexpr int kMinBlocksPerSm = 1;
  static constexpr int kSharedBytes = 0;

  static __device__ __forceinline__ void run(const Params& params) {
    ptx::wait_for_previous_kernel();
    const uint32 num_q_heads = params.num_kv_heads.divisor * static_cast<uint32>(params.group);
    const uint32 problem = blockIdx.x / num_q_heads;
    const int head = static_cast<int>(blockIdx.x % num_q_heads);
    const int column = ptx::thread_index() * 4;
    const DecodePieces pieces(params, problem, head);
    if (column >= pieces.row) return;
    const Parts parts = {static_cast<int>(params.num_pieces.divisor), pieces.outs + column, pieces.row, pieces.rows, 1};
    finish_part<kSpec.element, false>(params, problem, head, column, merge_parts<kSpec.element>(parts));
  }
};

}  // namespace heed::cuda
