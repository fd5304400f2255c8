// Segment ids: query i keeps key j where both carry the same id (packed sequences, padding).
#pragma once

#include "variants/band.h"

namespace heed::variants {

HEED_HOST_DEVICE constexpr bool same_segment(int q_id, int kv_id) { return q_id == kv_id; }

// The keys of a range that queries with ids in [q_min, q_max] may see, and whether every query sees all of them.
struct SegmentKeys {
  Range keys;
  bool needs_mask;
};

// The mask owns its loop bounds here too: keys at either end whose id no query carries are dropped. Where segments lie
// one after the other this leaves exactly the keys of the queries' own segments. `kv_id(j)` reads an id.
template <class KvId>
HEED_HOST_DEVICE constexpr SegmentKeys segment_keys(Range keys, int q_min, int q_max, KvId kv_id) {
  while (keys.begin < keys.end && (kv_id(keys.begin) < q_min || kv_id(keys.begin) > q_max)) ++keys.begin;
  while (keys.begin < keys.end && (kv_id(keys.end - 1) < q_min || kv_id(keys.end - 1) > q_max)) --keys.end;
  bool needs_mask = q_min != q_max;
  for (Index j = keys.begin; j < keys.end && !needs_mask; ++j) needs_mask = !same_segment(q_min, kv_id(j));
  return {keys, needs_mask};
}

}  // namespace heed::variants
