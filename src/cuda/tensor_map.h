// A tensor map: what the tensor memory accelerator of sm_90 and newer needs to know of an operand to copy boxes of it.
// The driver encodes it (tensor_map_host.h); kernels get it as a parameter. Includes nothing: NVRTC compiles it too.
#pragma once

namespace heed::cuda {

struct alignas(64) TensorMap {
  unsigned long long words[16];
};

// Where the rows of packed sequences lie in their tensor map, whose boxes must end with the sequence. The map has two
// axes over rows, kRaggedLimit - (end of the sequence) being the coordinate at which the first one is out of bounds:
// row r of a sequence of n rows that starts at row s has the coordinates (kRaggedRows - n + r, .., s + n, kRaggedRows).
// The second and the third one cancel what the first one adds, modulo 2^64 bytes.
inline constexpr int kRaggedRows = 1 << 30;

}  // namespace heed::cuda
