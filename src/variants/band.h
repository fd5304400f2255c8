// Causal masks and sliding windows: query i keeps the keys of a band around its diagonal,
//   diagonal(i) - left <= j <= diagonal(i) + right,   diagonal(i) = i + offset.
// A causal mask is right == 0. The mask owns its loop bounds: what a kernel skips, what it may leave unmasked and what
// it masks all come from the functions below, so they cannot disagree.
#pragma once

#include "variants/host_device.h"

namespace heed::variants {

using Index = long long;  // 64 bit wherever lengths are added

// Half-open; empty if begin >= end.
struct Range {
  Index begin, end;
  HEED_HOST_DEVICE constexpr bool empty() const { return begin >= end; }
};

HEED_HOST_DEVICE constexpr Range intersect(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

struct Band {
  // Farther than any key, with room to add and subtract lengths without overflow.
  static constexpr Index kUnbounded = Index{1} << 61;

  Index offset = 0;
  Index left = kUnbounded;
  Index right = kUnbounded;

  HEED_HOST_DEVICE constexpr bool keep(Index i, Index j) const {
    return j >= i + offset - left && j <= i + offset + right;
  }
  // Keys that at least one query of the non-empty range sees.
  HEED_HOST_DEVICE constexpr Range keys_of_any(Range queries) const {
    return {queries.begin + offset - left, queries.end - 1 + offset + right + 1};
  }
  // Keys that every query of the non-empty range sees: no masking is needed there.
  HEED_HOST_DEVICE constexpr Range keys_of_all(Range queries) const {
    return {queries.end - 1 + offset - left, queries.begin + offset + right + 1};
  }
  // Queries that see key j.
  HEED_HOST_DEVICE constexpr Range queries_of(Index j) const { return {j - offset - right, j - offset + left + 1}; }
  // Queries that see at least one key of the non-empty range, and those that see all of them.
  HEED_HOST_DEVICE constexpr Range queries_of_any(Range keys) const {
    return {keys.begin - offset - right, keys.end - 1 - offset + left + 1};
  }
  HEED_HOST_DEVICE constexpr Range queries_of_all(Range keys) const {
    return {keys.end - 1 - offset - right, keys.begin - offset + left + 1};
  }
};

// A window of -1 is unbounded on that side. `is_bottom_right`: the last query sits on the last key's diagonal.
HEED_HOST_DEVICE constexpr Band make_band(Index q_len, Index kv_len, Index window_left, Index window_right,
                                          bool is_bottom_right) {
  Band band;
  band.offset = is_bottom_right ? kv_len - q_len : 0;
  if (window_left >= 0 && window_left < Band::kUnbounded) band.left = window_left;
  if (window_right >= 0 && window_right < Band::kUnbounded) band.right = window_right;
  return band;
}

}  // namespace heed::variants
