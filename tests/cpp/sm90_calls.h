// Calls of attention forward that the Hopper kernel serves, with tensors on a made-up GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "device_tensor.h"
#include "heed/heed.h"

namespace heed::test {

inline constexpr int kHopper = 0, kSecondHopper = 1, kAmpere = 2;  // of the made-up devices

// A call of bfloat16 with head dim 128, unless said. Packed: q_len and kv_len are the rows of all `batch` sequences.
struct Call {
  int device = kHopper;
  std::vector<int64_t> lead{};
  bool is_varlen = false;
  int64_t batch = 3, q_len = 1024, kv_len = 1024, num_q_heads = 8, num_kv_heads = 8, head_dim = 128, head_dim_v = 128;
  DType dtype = DType::kBFloat16;
  bool has_lse = true;
  AttentionOptions options{};
};

inline AttentionOptions forced(Backend backend) {
  AttentionOptions options;
  options.backend = backend;
  return options;
}

// Each tensor at an address of its own, `slot` times 64 bytes on.
inline TensorView tensor(const Call& call, DType dtype, std::vector<int64_t> shape, int slot, bool has_lead = true) {
  if (has_lead) shape.insert(shape.begin(), call.lead.begin(), call.lead.end());
  return device_tensor(dtype, shape, call.device, memory() + 64 * slot);
}

inline AttentionForwardArgs args_of(const Call& call) {
  const auto rows = [&](int64_t length, int64_t heads, int64_t dim, int slot) {
    std::vector<int64_t> shape{length, heads, dim};
    if (!call.is_varlen) shape.insert(shape.begin(), call.batch);
    return tensor(call, call.dtype, shape, slot);
  };
  AttentionForwardArgs args;
  args.q = rows(call.q_len, call.num_q_heads, call.head_dim, 0);
  args.k = rows(call.kv_len, call.num_kv_heads, call.head_dim, 1);
  args.v = rows(call.kv_len, call.num_kv_heads, call.head_dim_v, 2);
  args.out = rows(call.q_len, call.num_q_heads, call.head_dim_v, 3);
  if (call.is_varlen) args.cu_seqlens_q = tensor(call, DType::kInt32, {call.batch + 1}, 4);
  if (call.has_lse) {
    std::vector<int64_t> shape{call.num_q_heads, call.q_len};
    if (!call.is_varlen) shape.insert(shape.begin(), call.batch);
    args.lse = tensor(call, DType::kFloat32, shape, 5);
  }
  args.stream = memory() + 1;
  return args;
}

}  // namespace heed::test
