// How the Hopper attention forward kernel divides a problem: its specialisation, which heads share tiles, the order of
// tiles, and which of them blocks share by steps. Chosen on the host, from the problem alone.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "cuda/sm90_attention_fwd_spec.h"

namespace heed::cuda {

// What tiles of equal length are like, for the choice of how to cut them.
struct Sm90Tiles {
  double num_tiles = 0;   // in all; more than 64 bits hold, maybe
  int64_t num_steps = 0;  // of a tile, at most
  int64_t num_alike = 1;  // tiles one after the other that read the same keys
  double kv_bytes = 0;    // that such tiles read
  double head_dims = 256;
};

struct Sm90Cut {
  int64_t num_whole_tiles = 0, num_parts = 0;  // no parts: all tiles are whole
  double time = 0.0;                           // in steps whose keys need not come from memory
};

// The cut of at most 2^31 tiles for so many blocks that takes least time.
Sm90Cut cut_tiles(const Sm90Tiles& tiles, int64_t num_blocks);

// Slots of the workspace that the cut has a use for.
int64_t num_slots_of(const Sm90Cut& cut, int64_t num_tiles);

struct Sm90Plan {
  Sm90AttentionFwdSpec spec;
  int head_shift = 0;  // how many heads of a group share a tile, as an exponent of 2
  Sm90Tiles tiles;
  int64_t num_slots = 0;  // for the planned number of blocks; 0: the kernel does not split
};

Sm90Plan plan_sm90_attention_fwd(const AttentionProblem& problem);

// Whether a kernel can share out steps.
bool may_split(const Sm90AttentionFwdSpec& spec);

// The order of dense tiles under a mask: heads of a section, and of the section at the end.
struct TileOrder {
  int64_t section_heads = 1, tail_heads = 0;
};
TileOrder order_of(const AttentionProblem& problem, int64_t num_heads, int q_rows);

}  // namespace heed::cuda
