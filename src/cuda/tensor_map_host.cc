// See tensor_map_host.h.
#include "cuda/tensor_map_host.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <stdexcept>

#include "cuda/jit/driver_api.h"
#include "cuda/jit/jit.h"

namespace heed::cuda {
namespace {

constexpr int64_t kElementBytes = 2;
constexpr int64_t kAlignment = 16;                          // of memory and of strides, in bytes
constexpr int64_t kStrideLimit = int64_t{1} << 40;          // in bytes
constexpr int64_t kRaggedStrideLimit = int64_t{1} << 34;    // of a ragged map's rows
constexpr int64_t kUnbounded = (int64_t{1} << 31) - 65536;  // a size that no coordinate reaches

constexpr Misfit kFits{};
constexpr Misfit kBadRow{"elements of a row that are not adjacent", "a last stride of 1"};
constexpr Misfit kBadStart{"rows that do not start at multiples of 16 bytes",
                           "strides and a first element that are multiples of 16 bytes"};
constexpr Misfit kBadStride{"strides that are negative or of 2^40 bytes and more", "strides from 0 to 2^40 bytes"};
constexpr Misfit kBadRaggedStride{"a token stride of 2^34 bytes and more", "one below 2^34 bytes"};
constexpr Misfit kBadBatch{"a batch and leading axes that do not lie evenly in memory",
                           "leading axes and a batch that can be viewed as one axis"};

// What the driver takes: sizes in elements from the fastest axis on, the strides of all axes but that, in bytes.
template <int kRank>
struct Layout {
  std::array<uint64_t, kRank> sizes;
  std::array<uint64_t, kRank - 1> strides;
};

template <int kRank>
void encode(TensorMap& map, const MappedOperand& mapped, const Layout<kRank>& layout) {
  const DriverApi* api = driver();
  if (api == nullptr) throw std::runtime_error("heed cannot use a GPU: " + why_no_driver());
  std::array<uint32_t, kRank> box{}, steps{};
  box.fill(1);
  steps.fill(1);
  box[0] = kTensorMapColumns;
  box[1] = static_cast<uint32_t>(mapped.packed_heads > 1 ? mapped.packed_heads : mapped.box_rows);
  if (mapped.packed_heads > 1) box[2] = static_cast<uint32_t>(mapped.box_rows / mapped.packed_heads);
  const int element = mapped.element == Element::kFloat16 ? kTensorMapFloat16 : kTensorMapBFloat16;
  check(api->tensor_map_encode_tiled(&map, element, kRank, mapped.operand.data, layout.sizes.data(),
                                     layout.strides.data(), box.data(), steps.data(), kTensorMapInterleaveNone,
                                     kTensorMapSwizzle128Bytes, kTensorMapPromoteToL2128Bytes, kTensorMapFillWithZeros),
        "cuTensorMapEncodeTiled");
}

// The stride of an axis in bytes. One of size 1 has none that matters, but the map has to have one.
int64_t stride_bytes(int64_t elements, int64_t size, const MappedOperand& mapped) {
  const int64_t bytes = std::clamp(elements, -kStrideLimit, kStrideLimit) * kElementBytes;  // beyond, all are misfits
  return size > 1 ? bytes : (mapped.head_dim * kElementBytes + kAlignment - 1) / kAlignment * kAlignment;
}

// What concerns any map. The strides are those of tokens, heads and, if it is dense, problems.
Misfit misfit_of(const MappedOperand& mapped, std::initializer_list<int64_t> strides) {
  if (mapped.operand.dim != 1 && mapped.head_dim > 1) return kBadRow;
  if (reinterpret_cast<uintptr_t>(mapped.operand.data) % kAlignment != 0) return kBadStart;
  for (const int64_t stride : strides) {
    if (stride % kAlignment != 0) return kBadStart;
    if (stride < 0 || stride >= kStrideLimit) return kBadStride;
  }
  return kFits;
}

// The leading axes and the batch as one axis.
struct Problems {
  bool are_even = true;
  int64_t count = 1, stride = 0;  // in elements
};

Problems problems_of(const DeviceOperand& operand, const AttentionParams& params) {
  Problems problems;
  const auto add = [&](int64_t size, int64_t stride) {
    if (size == 1) return;
    if (problems.count == 1) problems.stride = stride;
    int64_t expected = 0;
    const bool overflows = __builtin_mul_overflow(problems.stride, problems.count, &expected);
    problems.are_even = problems.are_even && !overflows && stride == expected;
    problems.count *= size;
  };
  add(params.batch, operand.batch);
  for (int axis = params.num_lead_axes - 1; axis >= 0; --axis) add(params.lead_sizes[axis], operand.lead[axis]);
  return problems;
}

}  // namespace

Misfit make_dense_map(TensorMap& map, const MappedOperand& mapped, const AttentionParams& params) {
  const Problems problems = problems_of(mapped.operand, params);
  if (!problems.are_even) return kBadBatch;
  const int64_t token = stride_bytes(mapped.operand.token, mapped.num_tokens, mapped);
  const int64_t head = stride_bytes(mapped.operand.head, mapped.num_heads, mapped);
  const int64_t problem = stride_bytes(problems.stride, problems.count, mapped);
  const Misfit misfit = misfit_of(mapped, {token, head, problem});
  if (misfit.exists()) return misfit;
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  if (mapped.packed_heads > 1) {
    const int64_t num_packs = mapped.num_heads / mapped.packed_heads;
    const int64_t pack = stride_bytes(mapped.operand.head * mapped.packed_heads, num_packs, mapped);
    if (pack >= kStrideLimit) return kBadStride;
    encode<5>(map, mapped,
              {{size(mapped.head_dim), size(mapped.packed_heads), size(mapped.num_tokens), size(num_packs),
                size(problems.count)},
               {size(head), size(token), size(pack), size(problem)}});
    return kFits;
  }
  encode<4>(map, mapped,
            {{size(mapped.head_dim), size(mapped.num_tokens), size(mapped.num_heads), size(problems.count)},
             {size(token), size(head), size(problem)}});
  return kFits;
}

Misfit make_ragged_map(TensorMap& map, const MappedOperand& mapped) {
  const int64_t token = stride_bytes(mapped.operand.token, mapped.num_tokens, mapped);
  const int64_t head = stride_bytes(mapped.operand.head, mapped.num_heads, mapped);
  const Misfit misfit = misfit_of(mapped, {token, head});
  if (misfit.exists()) return misfit;
  if (token >= kRaggedStrideLimit) return kBadRaggedStride;
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  encode<5>(map, mapped,
            {{size(mapped.head_dim), size(kRaggedRows), size(mapped.num_heads), size(kUnbounded), size(kUnbounded)},
             {size(token), size(head), size(token), size(kRaggedStrideLimit - token)}});
  return kFits;
}

}  // namespace heed::cuda
