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

TEST(ProblemText, ReadsTheFloatsThatPythonWrites) {
  const std::string text = to_text(simple_request());
  const std::string with_scale =
      std::string(text).replace(text.find("scale=default"), 13, "scale=0x1.999999999999ap-4");
  EXPECT_EQ(*parse_attention_request(with_scale).options.softmax_scale, 0.1);
  const std::string with_nan = std::string(text).replace(text.find("scale=default"), 13, "scale=nan");
  EXPECT_TRUE(std::isnan(*parse_attention_request(with_nan).options.softmax_scale));
}

TEST(ProblemText, EveryTruncationAndFlippedByteIsRefusedOrParsed) {
  const std::string text = to_text(simple_request());
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

TEST(Resolve, NamesEveryCandidate) {
  AttentionProblem problem = validate(simple_request());
  const AttentionFwdResolution on_cpu = resolve(problem, parse_target("cpu"));
  ASSERT_NE(on_cpu.chosen, nullptr);
  EXPECT_EQ(on_cpu.chosen->name, "cpu_attention_fwd");
  const AttentionFwdResolution on_gpu = resolve(problem, parse_target("sm_90a"));
  EXPECT_EQ(on_gpu.chosen, nullptr);
  for (const Candidate& candidate : on_gpu.candidates) EXPECT_NE(candidate.reason, "") << candidate.name;
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
