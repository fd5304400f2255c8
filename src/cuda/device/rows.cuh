// Rows of operands: where they lie, and chunks of them in registers.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/memory.cuh"
#include "cuda/row_spec.h"

namespace heed::cuda {

using uint64 = unsigned long long;

// Below 2^31.
__device__ __forceinline__ uint32 divide(uint32 number, const Divisor& by) {
  return (__umulhi(number, by.multiplier) + number) >> by.shift;
}
// Any number.
__device__ __forceinline__ uint64 divide(uint64 number, const Divisor& by) {
  return number >> 31 == 0 ? divide(static_cast<uint32>(number), by) : number / by.divisor;
}

// Adds to each operand's offset that of index `index`, below 2^31, over the axes.
template <int kNumOperands>
__device__ __forceinline__ void add_offsets(const RowAxes<kNumOperands>& axes, uint32 index,
                                            long long (&offsets)[kNumOperands]) {
#pragma unroll 1
  for (int axis = axes.count - 1; axis > 0; --axis) {
    const uint32 rest = divide(index, axes.sizes[axis]);
    const long long place = index - rest * axes.sizes[axis].divisor;
#pragma unroll
    for (int i = 0; i < kNumOperands; ++i) offsets[i] += place * axes.strides[i][axis];
    index = rest;
  }
#pragma unroll
  for (int i = 0; i < kNumOperands; ++i) offsets[i] += static_cast<long long>(index) * axes.strides[i][0];
}

// Where a column of a row is. The elements of aligned rows are neighbours.
template <bool kIsAligned>
__device__ __forceinline__ long long column_offset(long long column, long long element_stride) {
  return kIsAligned ? column : column * element_stride;
}

// Whether the kernel writes what is read: never, or the same thread may, afterwards.
enum class Read : unsigned char { kReadOnly, kMayBeResult };

// kWidth neighbours of one row, as they are stored and as floats.
template <Element kElement, int kWidth>
struct RowChunk {
  static constexpr int kBytes = bytes_of(kElement);
  static constexpr bool kIsVector = kWidth * kBytes == 16;
  static_assert(kIsVector || kWidth == 1, "kWidth: expected 16 bytes of elements, or 1");

  uint32 words[kIsVector ? 4 : 1];

  // `offset` counts elements from the tensor's first.
  static __device__ __forceinline__ const char* at(const void* data, long long offset) {
    return static_cast<const char*>(data) + offset * kBytes;
  }
  static __device__ __forceinline__ char* at(void* data, long long offset) {
    return static_cast<char*>(data) + offset * kBytes;
  }

  template <Read kRead = Read::kReadOnly>
  static __device__ __forceinline__ RowChunk load(const void* data, long long offset) {
    RowChunk chunk;
    const char* from = at(data, offset);
    if constexpr (kIsVector) {
      const uint4 value = kRead == Read::kMayBeResult ? ptx::load_own_16(from) : ptx::load_read_only_16(from);
      chunk.words[0] = value.x;
      chunk.words[1] = value.y;
      chunk.words[2] = value.z;
      chunk.words[3] = value.w;
    } else if constexpr (kBytes == 4) {
      chunk.words[0] = *reinterpret_cast<const uint32*>(from);
    } else {
      chunk.words[0] = *reinterpret_cast<const unsigned short*>(from);
    }
    return chunk;
  }
  __device__ __forceinline__ void store(void* data, long long offset) const {
    char* to = at(data, offset);
    if constexpr (kIsVector) {
      ptx::store_streaming_16(to, {words[0], words[1], words[2], words[3]});
    } else if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32*>(to) = words[0];
    } else {
      *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(words[0]);
    }
  }

  __device__ __forceinline__ void to_floats(float (&values)[kWidth]) const {
    if constexpr (kBytes == 4) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] = __uint_as_float(words[i]);
    } else if constexpr (kWidth == 1) {
      values[0] = MathOf<kElement>::to_float(words[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[i] = MathOf<kElement>::to_float(i % 2 == 0 ? words[i / 2] & 0xffffu : words[i / 2] >> 16);
      }
    }
  }
  static __device__ __forceinline__ RowChunk of_floats(const float (&values)[kWidth]) {
    RowChunk chunk;
    if constexpr (kBytes == 4) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) chunk.words[i] = __float_as_uint(values[i]);
    } else if constexpr (kWidth == 1) {
      chunk.words[0] = MathOf<kElement>::pack(values[0], 0.0f);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) chunk.words[i] = MathOf<kElement>::pack(values[2 * i], values[2 * i + 1]);
    }
    return chunk;
  }
};

}  // namespace heed::cuda
