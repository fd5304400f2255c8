// Requests that together need every kernel which calls of one module of heed.jit can need, as long as rows start at
// multiples of 16 bytes: what is loaded before such calls.
#pragma once

#include <cstdint>
#include <vector>

#include "core/small_problems.h"

namespace heed {

HEED_API std::vector<ActAndMulRequest> requests_of_every_kernel(Activation activation);
HEED_API std::vector<RopeRequest> rope_requests_of_every_kernel();
// Of the dtype and the head dims. For rows that are not aligned if the head dims make no aligned ones.
HEED_API std::vector<AttentionDecodeRequest> decode_requests_of_every_kernel(DType dtype, int64_t head_dim_qk,
                                                                             int64_t head_dim_v, bool has_rope);

}  // namespace heed
