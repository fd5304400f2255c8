// Tensor maps without a driver: cuTensorMapEncodeTiled with the checks of its documentation, and where in memory the
// rows of a box lie. What a map holds is this file's own matter, as it is the driver's. Includes nothing of the
// emulation, so that the made-up driver of the tests encodes with it too.
#pragma once

#include <cstdint>
#include <cstring>

namespace heed::device_emulation {

inline constexpr int kTensorMapBytes = 128;
inline constexpr int kMaxTensorRank = 5;
inline constexpr unsigned kTensorMapFloat16 = 6, kTensorMapBFloat16 = 9;  // CU_TENSOR_MAP_DATA_TYPE_..
inline constexpr unsigned kTensorMapSwizzleNone = 0, kTensorMapSwizzle128 = 3;

struct TensorMapContents {
  static constexpr uint64_t kMark = 0x70616D726F736E74;
  uint64_t mark;
  uint64_t address;
  uint64_t strides[kMaxTensorRank];     // in bytes; of dimension 0: of an element
  uint32_t last_index[kMaxTensorRank];  // size - 1: sizes go up to 2^32
  uint16_t box[kMaxTensorRank];
  uint8_t rank, swizzle;
};
static_assert(sizeof(TensorMapContents) <= kTensorMapBytes);

// Bytes of an element of a CUtensorMapDataType; 0: packed types, which nobody uses here.
inline unsigned tensor_map_element_bytes(unsigned type) {
  constexpr unsigned kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return type < sizeof kBytes / sizeof *kBytes ? kBytes[type] : 0;
}

// What the arguments of cuTensorMapEncodeTiled break; null: nothing.
inline const char* tensor_map_error(const void* map, unsigned type, unsigned rank, const void* address,
                                    const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                                    const uint32_t* element_strides, unsigned interleave, unsigned swizzle,
                                    unsigned l2_promotion, unsigned oob_fill) {
  const unsigned element_bytes = tensor_map_element_bytes(type);
  if (map == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0) return "the map is not aligned to 64 bytes";
  if (element_bytes == 0) return "an element type that is not known";
  if (rank < 1 || rank > kMaxTensorRank) return "the rank is not in 1..5";
  if (address == nullptr || reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    return "the address is not aligned to 16 bytes";
  }
  for (unsigned i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) return "a size is not in 1..2^32";
    if (box[i] == 0 || box[i] > 256) return "a size of the box is not in 1..256";
    if (element_strides[i] == 0 || element_strides[i] > 8) return "an element stride is not in 1..8";
  }
  for (unsigned i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return "a stride is no multiple of 16 below 2^40";
  }
  if (box[0] * element_bytes % 16 != 0) return "the inner rows of the box are no multiple of 16 bytes";
  if (interleave != 0) return "interleaved layouts are not emulated";
  if (swizzle != kTensorMapSwizzleNone && swizzle != kTensorMapSwizzle128) return "this swizzle is not emulated";
  if (swizzle == kTensorMapSwizzle128 && box[0] * element_bytes > 128) return "the box is wider than the swizzle";
  if (l2_promotion > 3) return "not an L2 promotion";
  if (oob_fill != 0) return "only zeros are emulated outside of the bounds";
  return nullptr;
}

// As cuTensorMapEncodeTiled: 0, or 1 (CUDA_ERROR_INVALID_VALUE).
inline int encode_tensor_map(void* map, unsigned type, unsigned rank, const void* address, const uint64_t* sizes,
                             const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                             unsigned interleave, unsigned swizzle, unsigned l2_promotion, unsigned oob_fill) {
  if (tensor_map_error(map, type, rank, address, sizes, strides, box, element_strides, interleave, swizzle,
                       l2_promotion, oob_fill) != nullptr) {
    return 1;
  }
  for (unsigned i = 0; i < rank; ++i) {
    if (element_strides[i] != 1) return 1;  // allowed, and not emulated
  }
  TensorMapContents contents{};
  contents.mark = TensorMapContents::kMark;
  contents.address = reinterpret_cast<uintptr_t>(address);
  contents.rank = static_cast<uint8_t>(rank);
  contents.swizzle = static_cast<uint8_t>(swizzle);
  for (unsigned i = 0; i < rank; ++i) {
    contents.last_index[i] = static_cast<uint32_t>(sizes[i] - 1);
    contents.strides[i] = i == 0 ? tensor_map_element_bytes(type) : strides[i - 1];
    contents.box[i] = static_cast<uint16_t>(box[i]);
  }
  std::memset(map, 0, kTensorMapBytes);
  std::memcpy(map, &contents, sizeof contents);
  return 0;
}

// Returns false if the bytes are no map.
inline bool decode_tensor_map(const void* map, TensorMapContents& contents) {
  std::memcpy(&contents, map, sizeof contents);
  return contents.mark == TensorMapContents::kMark;
}

inline int tensor_map_box_row_bytes(const TensorMapContents& map) {
  return static_cast<int>(map.box[0] * map.strides[0]);
}
inline int tensor_map_box_rows(const TensorMapContents& map) {
  int rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  return rows;
}

// Calls f(row of the box, its first byte inside the bounds, how many bytes there, their address); rows outside have 0
// bytes. Addresses wrap around at 2^64, coordinates are compared as they are.
template <class F>
void for_box_rows(const TensorMapContents& map, const int* coordinates, const F& f) {
  const int rows = tensor_map_box_rows(map);
  const auto element_bytes = static_cast<int64_t>(map.strides[0]);
  int64_t begin = -static_cast<int64_t>(coordinates[0]);
  int64_t end = begin + map.last_index[0] + 1;
  begin = begin < 0 ? 0 : begin;
  end = end > map.box[0] ? map.box[0] : end;
  for (int row = 0; row < rows; ++row) {
    bool is_inside = begin < end;
    uint64_t address = map.address + static_cast<uint64_t>((coordinates[0] + begin) * element_bytes);
    int rest = row;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = static_cast<int64_t>(coordinates[i]) + rest % map.box[i];
      rest /= map.box[i];
      is_inside = is_inside && index >= 0 && index <= static_cast<int64_t>(map.last_index[i]);
      address += static_cast<uint64_t>(index) * map.strides[i];
    }
    f(row, static_cast<int>(begin * element_bytes), is_inside ? static_cast<int>((end - begin) * element_bytes) : 0,
      reinterpret_cast<char*>(static_cast<uintptr_t>(address)));
  }
}

}  // namespace heed::device_emulation
