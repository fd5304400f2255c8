// The problems of rotary embeddings and of attention of one query: their texts, their checks, and what follows from
// their sizes.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>

#include "core/small_problems.h"
#include "small_problem_checks.h"

namespace heed {
namespace {

using test::message_of;
using test::refuses_or_parses_what_resembles;
using test::Shape;
using test::spec;
using test::typed_message_of;

// ---------------------------------------------------------------------------------------------------------------------
// Rotary embeddings.

RopeRequest rope_request() {
  RopeRequest request;
  request.operands[RopeProblem::kQ] = spec("float16", {10, 6, 64});
  request.operands[RopeProblem::kK] = spec("float16", {10, 4, 64});
  request.operands[RopeProblem::kIndptr] = spec("int32", {4});
  request.operands[RopeProblem::kOffsets] = spec("int32", {3});
  return request;
}

RopeRequest pos_ids_request(bool has_cache) {
  RopeRequest request = rope_request();
  request.operands[RopeProblem::kIndptr] = request.operands[RopeProblem::kOffsets] = {};
  request.operands[RopeProblem::kPosIds] = spec("int32", {10});
  if (has_cache) request.operands[RopeProblem::kCosSinCache] = spec("float32", {100, 32});
  return request;
}

TEST(RopeText, IsTheSchemaAndRoundTrips) {
  RopeRequest request = rope_request();
  EXPECT_EQ(to_text(request),
            "rope.v1;q=float16[10,6,64];k=float16[10,4,64];indptr=int32[4];offsets=int32[3];rotary_dim=0;interleave=0;"
            "scale=0x1p+0;theta=0x1.388p+13;llama31=0;inverse=0;backend=auto");
  refuses_or_parses_what_resembles(to_text(request), parse_rope_request);
  request = pos_ids_request(true);
  request.options = {.rotary_dim = 32, .interleave = true, .scale = 8, .theta = 5e5, .is_llama31 = true};
  request.options.inverse = true;
  request.options.backend = Backend::kCpu;
  EXPECT_EQ(to_text(request),
            "rope.v1;q=float16[10,6,64];k=float16[10,4,64];pos_ids=int32[10];cos_sin_cache=float32[100,32];"
            "rotary_dim=32;interleave=1;scale=0x1p+3;theta=0x1.e848p+18;llama31=1;low=0x1p+0;high=0x1p+2;"
            "context=0x1p+13;inverse=1;backend=cpu");
  refuses_or_parses_what_resembles(to_text(request), parse_rope_request);
}

TEST(RopeProblem, BindsSizes) {
  const RopeProblem problem = validate(rope_request());
  EXPECT_EQ(problem.num_tokens, 10);
  EXPECT_EQ(problem.num_q_heads, 6);
  EXPECT_EQ(problem.num_kv_heads, 4);  // no group: 6 is no multiple of 4
  EXPECT_EQ(problem.num_sequences, 3);
  EXPECT_EQ(problem.rotary_dim, 64);
  EXPECT_EQ(problem.options.rotary_dim, 64);
  EXPECT_EQ(problem.num_inputs(), 4);
  EXPECT_FALSE(problem.has_pos_ids);
  const RopeProblem with_ids = validate(pos_ids_request(false));
  EXPECT_EQ(with_ids.num_inputs(), 3);
  EXPECT_TRUE(with_ids.has_pos_ids);
  const RopeProblem with_cache = validate(pos_ids_request(true));
  EXPECT_EQ(with_cache.num_inputs(), 4);
  EXPECT_EQ(with_cache.rotary_dim, 32);  // as the cache has it
  EXPECT_EQ(with_cache.max_position, 100);
}

TEST(RopeProblem, LeadingAxesBroadcast) {
  RopeRequest request = rope_request();
  request.operands[RopeProblem::kQ].shape = {5, 1, 10, 6, 64};
  request.operands[RopeProblem::kK].shape = {1, 1, 10, 4, 64};
  request.operands[RopeProblem::kIndptr].shape = {1, 2, 4};
  request.operands[RopeProblem::kOffsets].shape = {1, 1, 3};
  const RopeProblem problem = validate(request);
  EXPECT_EQ(problem.q_shape(), (Shape{5, 2, 10, 6, 64}));
  EXPECT_EQ(problem.k_shape(), (Shape{5, 2, 10, 4, 64}));
}

TEST(RopeProblem, AcceptsNoTokensAndNoSequences) {
  RopeRequest request = rope_request();
  request.operands[RopeProblem::kQ].shape[0] = request.operands[RopeProblem::kK].shape[0] = 0;
  request.operands[RopeProblem::kIndptr].shape = {1};
  request.operands[RopeProblem::kOffsets].shape = {0};
  EXPECT_EQ(validate(request).num_tokens, 0);
  EXPECT_EQ(validate(request).num_sequences, 0);
}

TEST(RopeProblem, NamesWrongTensors) {
  const auto refused = [](int operand, TensorSpec wrong) {
    RopeRequest request = rope_request();
    request.operands[operand] = std::move(wrong);
    return typed_message_of(request);
  };
  EXPECT_EQ(refused(RopeProblem::kK, spec("float16", {9, 4, 64})),
            "ValueError: k: got shape [9, 4, 64] with num_tokens 9, expected num_tokens 10 as in q");
  EXPECT_EQ(refused(RopeProblem::kK, spec("float16", {10, 4, 32})),
            "ValueError: k: got shape [10, 4, 32] with head_dim 32, expected head_dim 64 as in q");
  EXPECT_EQ(refused(RopeProblem::kK, spec("float32", {10, 4, 64})),
            "TypeError: k: got dtype float32, expected float16 (the dtype of q)");
  EXPECT_EQ(refused(RopeProblem::kQ, spec("float16", {10, 0, 64})),
            "ValueError: q: got num_q_heads 0, expected 1 or more");
  EXPECT_EQ(refused(RopeProblem::kK, spec("float16", {10, 0, 64})),
            "ValueError: k: got num_kv_heads 0, expected 1 or more");
  EXPECT_EQ(refused(RopeProblem::kIndptr, spec("int64", {4})), "TypeError: indptr: got dtype int64, expected int32");
  EXPECT_EQ(refused(RopeProblem::kIndptr, spec("int32", {0})),
            "ValueError: indptr: got shape [0], expected batch + 1 entries, at least 1");
  EXPECT_EQ(refused(RopeProblem::kIndptr, {}), "ValueError: indptr: got nothing, expected a tensor");
  EXPECT_EQ(refused(RopeProblem::kOffsets, {}), "ValueError: offsets: got nothing, expected a tensor");
  EXPECT_EQ(refused(RopeProblem::kOffsets, spec("int32", {4})),
            "ValueError: offsets: got shape [4] with batch 4, expected batch 3 as in indptr");
  EXPECT_EQ(refused(RopeProblem::kPosIds, spec("int32", {10})),
            "ValueError: indptr: got a tensor, expected pos_ids, or indptr and offsets, not both");
  EXPECT_EQ(refused(RopeProblem::kCosSinCache, spec("float32", {10, 64})),
            "ValueError: cos_sin_cache: got a tensor, expected it only beside pos_ids");
}

TEST(RopeProblem, NamesWrongPositions) {
  RopeRequest request = pos_ids_request(true);
  TensorSpec& cache = request.operands[RopeProblem::kCosSinCache];
  request.operands[RopeProblem::kPosIds].shape = {11};
  EXPECT_EQ(message_of<ValueError>(request),
            "pos_ids: got shape [11] with num_tokens 11, expected num_tokens 10 as in q");
  request.operands[RopeProblem::kPosIds].shape = {10};
  cache.shape = {0, 32};
  EXPECT_EQ(message_of<ValueError>(request), "cos_sin_cache: got shape [0, 32], expected at least 1 position");
  for (const int64_t rotary_dim : {0, 31, 66}) {
    cache.shape = {9, rotary_dim};
    EXPECT_EQ(message_of<ValueError>(request), "cos_sin_cache: got shape [9, " + std::to_string(rotary_dim) +
                                                   "] with a last axis of " + std::to_string(rotary_dim) +
                                                   ", expected an even rotary_dim from 2 to head_dim 64");
  }
  cache.shape = {9, 32};
  request.options.rotary_dim = 64;
  EXPECT_EQ(message_of<ValueError>(request),
            "rotary_dim: got 64, expected 32, the size of the last axis of cos_sin_cache");
  request.options.rotary_dim = 32;
  EXPECT_EQ(message_of<ValueError>(request), "");
  cache.dtype = "float16";
  EXPECT_EQ(message_of<TypeError>(request), "cos_sin_cache: got dtype float16, expected float32");
}

TEST(RopeProblem, NamesWrongOptions) {
  const auto refused = [](const RopeOptions& options) {
    RopeRequest request = rope_request();
    request.options = options;
    return message_of<ValueError>(request);
  };
  for (const int64_t rotary_dim : {-2, 1, 63, 66}) {
    EXPECT_EQ(refused({.rotary_dim = rotary_dim}),
              "rotary_dim: got " + std::to_string(rotary_dim) + ", expected an even number from 2 to head_dim 64");
  }
  EXPECT_EQ(refused({.rotary_dim = 2}), "");
  EXPECT_EQ(refused({.scale = 0}), "rope_scale: got 0.000000, expected a positive number");
  EXPECT_EQ(refused({.scale = NAN}), "rope_scale: got nan, expected a finite number");
  EXPECT_EQ(refused({.theta = -1}), "rope_theta: got -1.000000, expected a positive number");
  EXPECT_EQ(refused({.theta = INFINITY}), "rope_theta: got inf, expected a finite number");
  RopeOptions options;
  options.high_freq_factor = 0.5;
  EXPECT_EQ(refused(options), "");  // means nothing here
  options.is_llama31 = true;
  EXPECT_EQ(refused(options), "high_freq_factor: got 0.500000, expected a number above low_freq_factor 1.000000");
  options = {.is_llama31 = true, .old_context_len = 0};
  EXPECT_EQ(refused(options), "old_context_len: got 0.000000, expected a positive number");
  options = {.is_llama31 = true, .low_freq_factor = -1};
  EXPECT_EQ(refused(options), "low_freq_factor: got -1.000000, expected a positive number");

  RopeRequest request = rope_request();
  request.operands[RopeProblem::kQ].shape[2] = request.operands[RopeProblem::kK].shape[2] = 7;
  EXPECT_EQ(message_of<ValueError>(request),
            "rotary_dim: got 7 (the whole head), expected an even number from 2 to head_dim 7");
  request.options.rotary_dim = 6;
  EXPECT_EQ(message_of<ValueError>(request), "");
  request.operands[RopeProblem::kQ].shape[2] = request.operands[RopeProblem::kK].shape[2] = 258;
  EXPECT_EQ(message_of<ValueError>(request), "q: got head_dim 258, expected 1 to 256");
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one query.

AttentionDecodeRequest decode_request() {
  AttentionDecodeRequest request;
  request.operands[AttentionDecodeProblem::kQ] = spec("float16", {8, 64});
  request.operands[AttentionDecodeProblem::kK] = spec("float16", {100, 2, 64});
  request.operands[AttentionDecodeProblem::kV] = spec("float16", {100, 2, 48});
  return request;
}

TEST(AttentionDecodeText, IsTheSchemaAndRoundTrips) {
  AttentionDecodeRequest request = decode_request();
  EXPECT_EQ(to_text(request),
            "attention_decode.v1;q=float16[8,64];k=float16[100,2,64];v=float16[100,2,48];layout=NHD;window=-1;"
            "softcap=0x0p+0;scale=default;rope=none;lse=0;batch_invariant=0;backend=auto");
  refuses_or_parses_what_resembles(to_text(request), parse_attention_decode_request);
  request.operands[AttentionDecodeProblem::kSinks] = spec("float32", {8});
  request.operands[AttentionDecodeProblem::kAlibiSlopes] = spec("float32", {8});
  request.options = {.kv_layout = KvLayout::kHND, .window_left = 7, .softcap = 30, .sm_scale = -0.5};
  request.options.rope_theta = 5e5;
  request.options.batch_invariant = true;
  request.options.backend = Backend::kSm90;
  request.wants_lse = true;
  EXPECT_EQ(to_text(request),
            "attention_decode.v1;q=float16[8,64];k=float16[100,2,64];v=float16[100,2,48];sinks=float32[8];"
            "alibi_slopes=float32[8];layout=HND;window=7;softcap=0x1.ep+4;scale=-0x1p-1;rope=0x1p+0,0x1.e848p+18;"
            "lse=1;batch_invariant=1;backend=sm90");
  refuses_or_parses_what_resembles(to_text(request), parse_attention_decode_request);
}

TEST(AttentionDecodeProblem, BindsSizesAndDefaults) {
  AttentionDecodeProblem problem = validate(decode_request());
  EXPECT_EQ(problem.kv_len, 100);
  EXPECT_EQ(problem.num_kv_heads, 2);
  EXPECT_EQ(problem.head_dim_v, 48);
  EXPECT_DOUBLE_EQ(problem.softmax_scale, 0.125);
  EXPECT_FALSE(problem.has_rope);
  EXPECT_EQ(problem.out_shape(), (Shape{8, 48}));
  EXPECT_EQ(problem.num_inputs(), 3);
  EXPECT_EQ(problem.num_outputs(), 2);
  EXPECT_EQ(problem.workspace_shape(7), (Shape{8, 7}));
  AttentionDecodeRequest request = decode_request();
  request.options.kv_layout = KvLayout::kHND;
  request.options.rope_scale = 4.0;
  request.wants_lse = true;
  request.operands[AttentionDecodeProblem::kQ].shape = {3, 1, 8, 64};
  request.operands[AttentionDecodeProblem::kK].shape = {1, 5, 2, 100, 64};
  request.operands[AttentionDecodeProblem::kV].shape = {1, 1, 2, 100, 48};
  request.operands[AttentionDecodeProblem::kSinks] = spec("float32", {3, 1, 8});
  problem = validate(request);
  EXPECT_EQ(problem.kv_len, 100);
  EXPECT_EQ(problem.lead, (Shape{3, 5}));
  EXPECT_EQ(problem.lse_shape(), (Shape{3, 5, 8}));
  EXPECT_EQ(problem.num_heads_in_all(), 120);
  EXPECT_EQ(problem.num_inputs(), 4);
  EXPECT_EQ(problem.num_outputs(), 3);
  EXPECT_TRUE(problem.has_rope);
  EXPECT_EQ(problem.rope_scale, 4.0);
  EXPECT_EQ(problem.rope_theta, 1e4);
}

TEST(AttentionDecodeProblem, AcceptsAnEmptyCache) {
  AttentionDecodeRequest request = decode_request();
  request.operands[AttentionDecodeProblem::kK].shape[0] = request.operands[AttentionDecodeProblem::kV].shape[0] = 0;
  EXPECT_EQ(validate(request).kv_len, 0);
}

TEST(AttentionDecodeProblem, NamesWrongTensors) {
  const auto refused = [](int operand, TensorSpec wrong, KvLayout layout = KvLayout::kNHD) {
    AttentionDecodeRequest request = decode_request();
    request.operands[operand] = std::move(wrong);
    request.options.kv_layout = layout;
    return typed_message_of(request);
  };
  const int q = AttentionDecodeProblem::kQ, k = AttentionDecodeProblem::kK, v = AttentionDecodeProblem::kV;
  EXPECT_EQ(refused(q, spec("float64", {8, 64})),
            "TypeError: q: got dtype float64, expected float32, float16 or bfloat16");
  EXPECT_EQ(refused(q, spec("float16", {7, 64})),
            "ValueError: q: got num_q_heads 7, expected a multiple of num_kv_heads 2 of k");
  EXPECT_EQ(refused(q, spec("float16", {0, 64})), "ValueError: q: got num_q_heads 0, expected 1 or more");
  EXPECT_EQ(refused(q, spec("float16", {64})),
            "ValueError: q: got shape [64] of rank 1, expected rank 2: [num_q_heads, head_dim]");
  EXPECT_EQ(refused(k, spec("float32", {100, 2, 64})),
            "TypeError: k: got dtype float32, expected float16 (the dtype of q)");
  EXPECT_EQ(refused(k, spec("float16", {100, 2, 32})),
            "ValueError: k: got shape [100, 2, 32] with head_dim 32, expected head_dim 64 as in q");
  EXPECT_EQ(refused(v, spec("float16", {99, 2, 48})),
            "ValueError: v: got shape [99, 2, 48] with kv_len 99, expected kv_len 100 as in k");
  EXPECT_EQ(refused(v, spec("float16", {99, 2, 48}), KvLayout::kHND),
            "ValueError: v: got shape [99, 2, 48] with num_kv_heads 99, expected num_kv_heads 100 as in k");
  EXPECT_EQ(refused(v, spec("float16", {100, 2, 257})), "ValueError: v: got head_dim_v 257, expected 1 to 256");
  EXPECT_EQ(refused(AttentionDecodeProblem::kSinks, spec("float32", {2})),
            "ValueError: sinks: got shape [2] with num_q_heads 2, expected num_q_heads 8 as in q");
  EXPECT_EQ(refused(AttentionDecodeProblem::kAlibiSlopes, spec("float16", {8})),
            "TypeError: alibi_slopes: got dtype float16, expected float32");
}

TEST(AttentionDecodeProblem, NamesWrongOptions) {
  const auto refused = [](const SingleDecodeOptions& options) {
    AttentionDecodeRequest request = decode_request();
    request.options = options;
    return message_of<ValueError>(request);
  };
  EXPECT_EQ(refused({.window_left = -2}), "window_left: got -2, expected -1 (unbounded) or more");
  EXPECT_EQ(refused({.softcap = -1}), "softcap: got -1.000000, expected 0 (off) or a positive number");
  EXPECT_EQ(refused({.sm_scale = INFINITY}), "sm_scale: got inf, expected a finite number");
  EXPECT_EQ(refused({.sm_scale = 1e300}).substr(0, 14), "sm_scale: got ");
  EXPECT_EQ(refused({.rope_scale = 0}), "rope_scale: got 0.000000, expected a positive number");
  EXPECT_EQ(refused({.rope_theta = NAN}), "rope_theta: got nan, expected a finite number");
  EXPECT_EQ(refused({.kv_layout = static_cast<KvLayout>(2)}), "kv_layout: got 2, expected one of heed::KvLayout");
  AttentionDecodeRequest request = decode_request();
  request.operands[AttentionDecodeProblem::kQ].shape = {8, 63};
  request.operands[AttentionDecodeProblem::kK].shape = {100, 2, 63};
  EXPECT_EQ(message_of<ValueError>(request), "");
  request.options.rope_theta = 1e4;
  EXPECT_EQ(message_of<ValueError>(request), "q: got head_dim 63 with rope_scale or rope_theta, expected an even one");
}

}  // namespace
}  // namespace heed
