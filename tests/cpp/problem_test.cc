// The problem's text, the checks that all faces share, and resolve().
#include "core/problem.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/target.h"
#include "core/text_table.h"
#include "ops/attention_fwd.h"

namespace heed {
namespace {

AttentionRequest simple_request() {
  AttentionRequest request;
  request.operands[kQ] = {"float32", {2, 16, 8, 64}, true};
  request.operands[kK] = {"float32", {2, 20, 2, 64}, true};
  request.operands[kV] = {"float32", {2, 20, 2, 32}, true};
  return request;
}

AttentionRequest varlen_request() {
  AttentionRequest request;
  request.operands[kQ] = {"float32", {100, 8, 64}, true};
  request.operands[kK] = {"float32", {120, 2, 64}, true};
  request.operands[kV] = {"float32", {120, 2, 32}, true};
  request.operands[kCuSeqlensQ] = {"int32", {5}, true};
  return request;
}

template <class Error>
std::string message_of(const AttentionRequest& request) {
  try {
    validate(request);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(ProblemText, RoundTripsEveryField) {
  AttentionRequest request = simple_request();
  request.operands[kSinks] = {"float32", {8}, true};
  request.operands[kAlibiSlopes] = {"float32", {8}, true};
  request.operands[kQSegmentIds] = {"int32", {2, 16}, true};
  request.operands[kKvSegmentIds] = {"int32", {2, 20}, true};
  request.options.softmax_scale = -0.1;
  request.options.is_causal = true;
  request.options.causal_align = CausalAlign::kTopLeft;
  request.options.window_left = 7;
  request.options.window_right = 0;
  request.options.softcap = 30.5;
  request.options.deterministic = true;
  request.options.backend = Backend::kSm90;
  request.wants_lse = true;
  const std::string text = to_text(request);
  EXPECT_EQ(to_text(parse_attention_request(text)), text);
  const AttentionRequest parsed = parse_attention_request(text);
  EXPECT_EQ(*parsed.options.softmax_scale, -0.1);  // exactly: the text is hexadecimal
  EXPECT_EQ(parsed.operands[kKvSegmentIds].shape, (std::vector<int64_t>{2, 20}));
  EXPECT_EQ(parsed.options.backend, Backend::kSm90);
}

TEST(ProblemText, RoundTripsVariableLengths) {
  AttentionRequest request = varlen_request();
  EXPECT_NE(to_text(request).find(";window=-1,-1;max_seqlen=-1,-1;softcap="), std::string::npos);
  request.operands[kCuSeqlensK] = {"int32", {5}, true};
  request.operands[kSequsedK] = {"int32", {4}, true};
  request.options.max_seqlen_q = 17;
  request.options.max_seqlen_k = 0;
  const std::string text = to_text(request);
  const AttentionRequest parsed = parse_attention_request(text);
  EXPECT_EQ(to_text(parsed), text);
  EXPECT_EQ(parsed.options.max_seqlen_q, 17);
  EXPECT_EQ(parsed.options.max_seqlen_k, 0);
  EXPECT_EQ(parsed.operands[kCuSeqlensK].shape, (std::vector<int64_t>{5}));
  EXPECT_EQ(parsed.operands[kSequsedK].shape, (std::vector<int64_t>{4}));
  // The field is there if and only if cu_seqlens_q is.
  const std::string field = ";max_seqlen=17,0";
  const std::string without = std::string(text).erase(text.find(field), field.size());
  EXPECT_THROW(parse_attention_request(without), ValueError);
  const std::string dense = to_text(simple_request());
  EXPECT_EQ(dense.find("max_seqlen"), std::string::npos);
  EXPECT_THROW(parse_attention_request(std::string(dense).insert(dense.find(";softcap"), field)), ValueError);
}

TEST(ProblemText, ReadsTheFloatsThatPythonWrites) {
  const std::string text = to_text(simple_request());
  const std::string with_scale =
      std::string(text).replace(text.find("scale=default"), 13, "scale=0x1.999999999999ap-4");
  EXPECT_EQ(*parse_attention_request(with_scale).options.softmax_scale, 0.1);
  const std::string with_nan = std::string(text).replace(text.find("scale=default"), 13, "scale=nan");
  EXPECT_TRUE(std::isnan(*parse_attention_request(with_nan).options.softmax_scale));
}

void refuses_or_parses_what_resembles(const std::string& text) {
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_THROW(parse_attention_request(text.substr(0, length)), ValueError) << length;
  }
  for (size_t at = 0; at < text.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = text;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << bit));
      try {
        validate(parse_attention_request(flipped));
      } catch (const ValueError&) {
      } catch (const TypeError&) {
      }
    }
  }
}

TEST(ProblemText, EveryTruncationAndFlippedByteIsRefusedOrParsed) {
  refuses_or_parses_what_resembles(to_text(simple_request()));
  AttentionRequest request = varlen_request();
  request.operands[kCuSeqlensK] = {"int32", {5}, true};
  request.operands[kSequsedK] = {"int32", {4}, true};
  refuses_or_parses_what_resembles(to_text(request));
}

TEST(Validate, BindsSizesAndDefaults) {
  AttentionRequest request = simple_request();
  request.options.is_causal = true;
  request.options.window_right = 5;
  const AttentionProblem problem = validate(request);
  EXPECT_EQ(problem.kv_len, 20);
  EXPECT_EQ(problem.head_dim_v, 32);
  EXPECT_EQ(problem.window_right, 0);  // causal overrides the right side
  EXPECT_DOUBLE_EQ(problem.softmax_scale, 0.125);
  EXPECT_EQ(problem.out_shape(), (std::vector<int64_t>{2, 16, 8, 32}));
  EXPECT_EQ(problem.lse_shape(), (std::vector<int64_t>{2, 8, 16}));
}

TEST(Validate, LeadingAxesBroadcast) {
  AttentionRequest request = simple_request();
  request.operands[kQ].shape = {3, 1, 2, 16, 8, 64};
  request.operands[kK].shape = {1, 5, 2, 20, 2, 64};
  request.operands[kV].shape = {1, 1, 2, 20, 2, 32};
  EXPECT_EQ(validate(request).lead, (std::vector<int64_t>{3, 5}));
  request.operands[kV].shape = {1, 4, 2, 20, 2, 32};
  EXPECT_NE(message_of<ValueError>(request).find("leading axis 1 of size 4, expected size 5 or 1"), std::string::npos);
}

TEST(Validate, NamesTensorGotAndExpected) {
  AttentionRequest request = simple_request();
  request.operands[kV].shape = {2, 21, 2, 32};
  EXPECT_EQ(message_of<ValueError>(request), "v: got shape [2, 21, 2, 32] with kv_len 21, expected kv_len 20 as in k");
  request = simple_request();
  request.operands[kQ].shape = {2, 16, 7, 64};
  EXPECT_EQ(message_of<ValueError>(request), "q: got num_q_heads 7, expected a multiple of num_kv_heads 2 of k");
  request = simple_request();
  request.operands[kK].dtype = "bfloat16";
  EXPECT_EQ(message_of<TypeError>(request), "k: got dtype bfloat16, expected float32 (the dtype of q)");
  request = simple_request();
  request.operands[kV].shape = {2, 20, 2, 257};
  EXPECT_EQ(message_of<ValueError>(request), "v: got head_dim_v 257, expected 1 to 256");
}

TEST(Validate, RefusesSizesWhoseProductOverflows) {
  AttentionRequest request = simple_request();
  request.operands[kQ].shape = {int64_t{1} << 40, int64_t{1} << 20, 8, 64};
  request.operands[kK].shape = {int64_t{1} << 40, 20, 2, 64};
  request.operands[kV].shape = {int64_t{1} << 40, 20, 2, 32};
  EXPECT_NE(message_of<ValueError>(request), "");
}

TEST(Validate, BindsVariableLengths) {
  AttentionRequest request = varlen_request();
  AttentionProblem problem = validate(request);
  EXPECT_TRUE(problem.is_varlen);
  EXPECT_FALSE(problem.has_cu_seqlens_k || problem.has_seqused_k);
  EXPECT_EQ(problem.batch, 4);
  EXPECT_EQ(problem.q_len, 100);
  EXPECT_EQ(problem.kv_len, 120);
  EXPECT_EQ(problem.max_q_len, 100);
  EXPECT_EQ(problem.max_kv_len, 120);
  EXPECT_EQ(problem.out_shape(), (std::vector<int64_t>{100, 8, 32}));
  EXPECT_EQ(problem.lse_shape(), (std::vector<int64_t>{8, 100}));
  EXPECT_EQ(problem.num_inputs(), 4);
  request.operands[kCuSeqlensK] = {"int32", {5}, true};
  request.operands[kSequsedK] = {"int32", {4}, true};
  request.options.max_seqlen_q = 33;
  request.options.max_seqlen_k = 1000;  // of 120 rows
  problem = validate(request);
  EXPECT_TRUE(problem.has_cu_seqlens_k && problem.has_seqused_k);
  EXPECT_EQ(problem.max_q_len, 33);
  EXPECT_EQ(problem.max_kv_len, 120);
  request.operands[kCuSeqlensQ].shape = {1};  // no sequence at all
  request.operands[kCuSeqlensK].shape = {1};
  request.operands[kSequsedK].shape = {0};
  EXPECT_EQ(validate(request).batch, 0);
  const AttentionProblem dense = validate(simple_request());
  EXPECT_FALSE(dense.is_varlen);
  EXPECT_EQ(dense.max_q_len, 16);
  EXPECT_EQ(dense.max_kv_len, 20);
}

TEST(Validate, LeadingAxesOfVariableLengthsBroadcast) {
  AttentionRequest request = varlen_request();
  request.operands[kQ].shape = {3, 1, 100, 8, 64};
  request.operands[kK].shape = {1, 5, 120, 2, 64};
  request.operands[kV].shape = {1, 1, 120, 2, 32};
  request.operands[kCuSeqlensQ].shape = {3, 5, 5};
  EXPECT_EQ(validate(request).out_shape(), (std::vector<int64_t>{3, 5, 100, 8, 32}));
  request.operands[kCuSeqlensQ].shape = {5};
  EXPECT_EQ(message_of<ValueError>(request),
            "cu_seqlens_q: got shape [5] of rank 1, expected rank 3: [2 leading axes, batch_plus_1]");
  request = varlen_request();
  request.operands[kQ].shape = {1, 1, 1, 1, 1, 1, 1, 1, 1, 100, 8, 64};
  EXPECT_EQ(message_of<ValueError>(request), "q: got rank 12, expected at most 8 leading axes");
}

TEST(Validate, NamesWhatIsWrongWithVariableLengths) {
  const auto refused = [](const auto& change) {
    AttentionRequest request = varlen_request();
    change(request);
    return message_of<ValueError>(request);
  };
  EXPECT_EQ(refused([](auto& r) { r.operands[kCuSeqlensQ].shape = {0}; }),
            "cu_seqlens_q: got shape [0], expected batch + 1 entries, at least 1");
  EXPECT_EQ(refused([](auto& r) {
              r.operands[kCuSeqlensK] = {"int32", {4}, true};
            }),
            "cu_seqlens_k: got shape [4] with batch_plus_1 4, expected batch_plus_1 5 as in cu_seqlens_q");
  EXPECT_EQ(refused([](auto& r) {
              r.operands[kSequsedK] = {"int32", {5}, true};
            }),
            "seqused_k: got shape [5] with batch 5, expected batch 4 as in cu_seqlens_q");
  EXPECT_EQ(refused([](auto& r) {
              r.operands[kV].shape = {121, 2, 32};
            }),
            "v: got shape [121, 2, 32] with total_k 121, expected total_k 120 as in k");
  EXPECT_EQ(refused([](auto& r) {
              r.operands[kKvSegmentIds] = {"int32", {120}, true};
            }),
            "kv_segment_ids: got a tensor beside cu_seqlens_q, expected segment ids or cu_seqlens, not both");
  EXPECT_EQ(refused([](auto& r) { r.options.max_seqlen_q = -2; }),
            "max_seqlen_q: got -2, expected -1 (the total number of rows) or an upper bound");
  AttentionRequest request = varlen_request();
  request.operands[kCuSeqlensQ].dtype = "int64";
  EXPECT_EQ(message_of<TypeError>(request), "cu_seqlens_q: got dtype int64, expected int32");
  request = simple_request();
  request.operands[kSequsedK] = {"int32", {2}, true};
  EXPECT_EQ(message_of<ValueError>(request),
            "seqused_k: got a tensor without cu_seqlens_q, expected it only beside cu_seqlens_q");
  request = simple_request();
  request.options.max_seqlen_k = 5;
  EXPECT_EQ(message_of<ValueError>(request), "max_seqlen_k: got 5, expected -1 without cu_seqlens_q");
  request = varlen_request();
  request.operands[kQ].shape[0] = request.operands[kK].shape[0] = request.operands[kV].shape[0] = int64_t{1} << 58;
  EXPECT_NE(message_of<ValueError>(request), "");
}

TEST(Resolve, NamesEveryCandidate) {
  AttentionProblem problem = validate(simple_request());
  const AttentionFwdResolution on_cpu = resolve(problem, parse_target("cpu"));
  ASSERT_NE(on_cpu.chosen, nullptr);
  EXPECT_EQ(on_cpu.chosen->name, "cpu_attention_fwd");
  const AttentionFwdResolution on_gpu = resolve(problem, parse_target("sm_80"));
  ASSERT_NE(on_gpu.chosen, nullptr);
  EXPECT_EQ(on_gpu.chosen->name, "sm80_attention_fwd");
  for (const Candidate& candidate : on_gpu.candidates) {
    EXPECT_EQ(candidate.reason.empty(), candidate.name == "sm80_attention_fwd") << candidate.name;
  }
  const AttentionFwdResolution on_old_gpu = resolve(problem, parse_target("sm_75"));
  EXPECT_EQ(on_old_gpu.chosen, nullptr);
  for (const Candidate& candidate : on_old_gpu.candidates) EXPECT_NE(candidate.reason, "") << candidate.name;
  problem.backend = Backend::kSm80;
  EXPECT_EQ(resolve(problem, parse_target("cpu")).chosen, nullptr);
}

TEST(Target, ParsesArchitecturesOnly) {
  EXPECT_EQ(parse_target("sm_90a").sm, 90);
  EXPECT_EQ(parse_target("sm_120").sm, 120);
  EXPECT_TRUE(parse_target("cpu").is_cpu);
  for (const char* name : {"", "gpu", "sm_", "sm_x", "sm_90b", "sm90"}) EXPECT_THROW(parse_target(name), ValueError);
}

TEST(TextTable, FindsWhatWasInsertedAndStopsGrowing) {
  TextTable<int, 2> table;
  EXPECT_EQ(table.find("a"), nullptr);
  EXPECT_EQ(*table.insert("a", std::make_shared<const int>(1)), 1);
  EXPECT_EQ(*table.insert("a", std::make_shared<const int>(2)), 1);  // the first one stays
  table.insert("b", std::make_shared<const int>(3));
  EXPECT_EQ(*table.insert("c", std::make_shared<const int>(4)), 4);  // full: usable, not stored
  EXPECT_EQ(table.find("c"), nullptr);
  EXPECT_EQ(*table.find("b"), 3);
}

}  // namespace
}  // namespace heed
