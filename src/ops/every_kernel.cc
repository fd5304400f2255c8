// Which sizes choose among the kernels of an op.
#include "ops/every_kernel.h"

#include <string>
#include <string_view>
#include <utility>

#include "core/dtype.h"

namespace heed {
namespace {

TensorSpec spec(std::string_view dtype, std::vector<int64_t> shape) {
  return {std::string(dtype), std::move(shape), true};
}

}  // namespace

std::vector<ActAndMulRequest> requests_of_every_kernel(Activation activation) {
  std::vector<ActAndMulRequest> all;
  for (const DTypeInfo& dtype : kDTypes) {
    if (!dtype.is_float) continue;
    // Rows that are aligned, and rows that are not.
    for (const int64_t width : {8192, 2}) {
      ActAndMulRequest request{.activation = activation};
      request.operands[ActAndMulProblem::kX] = spec(dtype.name, {1, width});
      all.push_back(std::move(request));
    }
  }
  return all;
}

std::vector<RopeRequest> rope_requests_of_every_kernel() {
  std::vector<RopeRequest> all;
  for (const DTypeInfo& dtype : kDTypes) {
    if (!dtype.is_float) continue;
    for (const bool interleave : {false, true}) {
      // A thread takes one head of a small call, and several of a large one.
      for (const int64_t num_tokens : {1, 1 << 20}) {
        RopeRequest request{.options = {.interleave = interleave}};
        request.operands[RopeProblem::kQ] = spec(dtype.name, {num_tokens, 8, 64});
        request.operands[RopeProblem::kK] = spec(dtype.name, {num_tokens, 8, 64});
        RopeRequest with_ids = request;
        request.operands[RopeProblem::kIndptr] = spec("int32", {2});
        request.operands[RopeProblem::kOffsets] = spec("int32", {1});
        all.push_back(std::move(request));
        with_ids.operands[RopeProblem::kPosIds] = spec("int32", {num_tokens});
        all.push_back(with_ids);
        with_ids.operands[RopeProblem::kCosSinCache] = spec("float32", {64, 64});
        all.push_back(std::move(with_ids));
      }
    }
  }
  return all;
}

std::vector<AttentionDecodeRequest> decode_requests_of_every_kernel(DType dtype, int64_t head_dim_qk,
                                                                    int64_t head_dim_v, bool has_rope) {
  std::vector<AttentionDecodeRequest> all;
  const std::string_view name = info(dtype).name;
  // Few query heads for each KV head and many, of short caches and of ones that take more than one launch.
  for (const int64_t group : {1, 16}) {
    for (const int64_t kv_len : {1024, 1 << 20}) {
      AttentionDecodeRequest request;
      if (has_rope) request.options.rope_scale = kDefaultRopeScale;
      request.operands[AttentionDecodeProblem::kQ] = spec(name, {group, head_dim_qk});
      request.operands[AttentionDecodeProblem::kK] = spec(name, {kv_len, 1, head_dim_qk});
      request.operands[AttentionDecodeProblem::kV] = spec(name, {kv_len, 1, head_dim_v});
      all.push_back(std::move(request));
    }
  }
  return all;
}

}  // namespace heed
