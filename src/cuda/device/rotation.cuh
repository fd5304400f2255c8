// Sines and cosines of angles that are fractions of a turn, for rotary embeddings: a position times the turn from one
// position to the next, in 64 bits, loses whole turns and nothing else.
#pragma once

#include "cuda/device/ptx.cuh"

namespace heed::cuda {

// Of an angle in turns, as a fraction of 2^64. Absolute error below 1e-7.
__device__ __forceinline__ void sine_and_cosine(unsigned long long turns, float& sine, float& cosine) {
  const uint32 turn = static_cast<uint32>(turns >> 32);
  const uint32 quarter = (turn + 0x20000000u) >> 30;  // the nearest
  const float y =
      static_cast<float>(static_cast<int>(turn - (quarter << 30))) * 1.4629180792671596e-09f;  // 2 pi / 2^32
  const float z = y * y;
  const float s = y + y * z * (-0.16666655f + z * (0.00833218f + z * -0.00019517f));
  const float c = 1.0f + z * (-0.5f + z * (4.16666468e-02f + z * (-1.38873644e-03f + z * 2.44380858e-05f)));
  const float low = (quarter & 1u) != 0 ? c : s;
  const float high = (quarter & 1u) != 0 ? s : c;
  sine = (quarter & 2u) != 0 ? -low : low;
  cosine = ((quarter + 1u) & 2u) != 0 ? -high : high;
}

}  // namespace heed::cuda
