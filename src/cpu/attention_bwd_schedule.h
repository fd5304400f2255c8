// How an attention backward call is cut into work items, whatever the instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention_bwd_plan.h"
#include "cpu/sequences.h"
#include "variants/band.h"

namespace heed::cpu {

// Queries and keys of one sequence, and how they are cut: its rows into blocks, its keys into chunks.
struct BackwardPart {
  int64_t problem = 0;
  Sequence sequence{};
  int64_t chunk_keys = kChunkStep;  // of every chunk but the last, which may have fewer
  int64_t num_chunks = 0;
  int64_t num_blocks = 0;
  int64_t first_chunk_item = 0, first_block_item = 0;
  double cost = 0.0;

  int64_t q_len() const { return sequence.queries.end - sequence.queries.begin; }
  int64_t kv_len() const { return sequence.keys.end - sequence.keys.begin; }
};

// Rows and keys count from the sequence's first.
struct RowBlock {
  variants::Range rows{};     // row r: head r % group of the KV head's group at query r / group
  variants::Range queries{};  //
  variants::Range chunks{};   // that hold keys in the band of at least one of the rows
};

// A chunk of keys of one KV head, or one of its row blocks.
struct BackwardItem {
  const BackwardPart* part = nullptr;
  int64_t problem = 0;
  int64_t kv_head = 0;
  int64_t index = 0;  // of the chunk or of the block
};

// Keys of no sequence, whose gradient is 0.
struct KeyGap {
  int64_t problem = 0;
  variants::Range keys{};
};

class BackwardSchedule {
 public:
  explicit BackwardSchedule(const BackwardPlan& plan);

  // Row blocks, in any order.
  int64_t num_block_items() const { return num_block_items_; }
  BackwardItem block_item(int64_t index) const;
  // Chunks, in the order in which threads are to take them: one of a KV head after those with lower keys.
  int64_t num_chunk_items() const { return num_chunk_items_; }
  BackwardItem chunk_item(int64_t index) const;

  const std::vector<KeyGap>& key_gaps() const { return key_gaps_; }
  double num_products() const { return num_products_; }  // multiply-adds of the call, about

  RowBlock row_block(const BackwardPart& part, int64_t block) const;
  variants::Range chunk_keys(const BackwardPart& part, int64_t chunk) const;
  // Row blocks that have the chunk among theirs.
  variants::Range blocks_of_chunk(const BackwardPart& part, int64_t chunk) const;

 private:
  void add_sequences(int64_t problem);
  void cut(BackwardPart& part);

  const BackwardPlan& plan_;
  std::vector<BackwardPart> parts_;  // by first_chunk_item; one for all problems, where all are equally long
  std::vector<KeyGap> key_gaps_;
  int64_t repeats_ = 0;  // KV heads (and problems) that each part stands for
  int64_t num_block_items_ = 0, num_chunk_items_ = 0;
  double num_products_ = 0.0;
};

}  // namespace heed::cpu
