// From products of queries and keys to scores: scale, soft cap, ALiBi.
#pragma once

#include "cuda/attention_spec.h"
#include "cuda/device/score_math.cuh"
#include "variants/alibi.h"
#include "variants/softcap.h"

namespace heed::cuda {

// The score of a product; `distance`: of the key from the query's diagonal. Without a transform it stays a product, and
// takes its scale with the exponential.
template <auto kSpec>
__device__ __forceinline__ float score_of(const AttentionParams& params, float slope, float product, float distance) {
  const ScoreMath math;
  float score = product;
  if constexpr (kSpec.has_softcap) {
    score = variants::soft_capped(math, score, params.scale_over_cap, params.softcap);
  } else if constexpr (kSpec.has_score_transform()) {
    score *= params.scale;
  }
  if constexpr (kSpec.has_alibi) score = variants::alibi_biased(math, score, slope, distance);
  return score;
}

// A thread's part of 16 rows of products, as accumulator tiles lie (element.cuh): its rows are 8 apart, and the first
// one's diagonal is `distance` keys after the thread's first column.
template <auto kSpec, int kSize>
__device__ __forceinline__ void transform_scores(const AttentionParams& params, float slope, int distance,
                                                 float (&scores)[kSize]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float from = static_cast<float>(distance + half * 8);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      float& score = scores[i / 2 * 4 + half * 2 + i % 2];
      score = score_of<kSpec>(params, slope, score, from - static_cast<float>(i / 2 * 8 + i % 2));
    }
  }
}

}  // namespace heed::cuda
