// The problem of attention's backward pass: its text, its checks, what it says of results, and resolve().
#include "core/attention_bwd_problem.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/target.h"
#include "ops/attention_bwd.h"

namespace heed {
namespace {

using Shape = std::vector<int64_t>;

AttentionBwdRequest simple_request() {
  AttentionBwdRequest request;
  request.operand(kQ) = {"bfloat16", {2, 16, 8, 64}, true};
  request.operand(kK) = {"bfloat16", {2, 20, 2, 64}, true};
  request.operand(kV) = {"bfloat16", {2, 20, 2, 32}, true};
  request.operand(kOut) = {"bfloat16", {2, 16, 8, 32}, true};
  request.operand(kLse) = {"float32", {2, 8, 16}, true};
  request.operand(kDout) = {"bfloat16", {2, 16, 8, 32}, true};
  return request;
}

AttentionBwdRequest varlen_request() {
  AttentionBwdRequest request;
  request.operand(kQ) = {"float32", {100, 8, 64}, true};
  request.operand(kK) = {"float32", {120, 2, 64}, true};
  request.operand(kV) = {"float32", {120, 2, 32}, true};
  request.operand(kCuSeqlensQ) = {"int32", {5}, true};
  request.operand(kOut) = {"float32", {100, 8, 32}, true};
  request.operand(kLse) = {"float32", {8, 100}, true};
  request.operand(kDout) = {"float32", {100, 8, 32}, true};
  return request;
}

void add_every_dense_operand(AttentionBwdRequest& request) {
  request.operand(kSinks) = {"float32", {8}, true};
  request.operand(kAlibiSlopes) = {"float32", {8}, true};
  request.operand(kQSegmentIds) = {"int32", {2, 16}, true};
  request.operand(kKvSegmentIds) = {"int32", {2, 20}, true};
  request.operand(kDlse) = {"float32", {2, 8, 16}, true};
}

// What validate() says after a change; "" if it says nothing.
template <class Error = ValueError, class Change>
std::string refused(AttentionBwdRequest request, const Change& change) {
  change(request);
  try {
    validate(request);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// ---------------------------------------------------------------------------------------------------------------------
// Text.

TEST(BwdProblemText, IsTheSchemaOfTheHeader) {
  EXPECT_EQ(to_text(simple_request()),
            "attention_bwd.v1;q=bfloat16[2,16,8,64];k=bfloat16[2,20,2,64];v=bfloat16[2,20,2,32];"
            "out=bfloat16[2,16,8,32];lse=float32[2,8,16];dout=bfloat16[2,16,8,32];"
            "scale=default;causal=0;align=bottom_right;window=-1,-1;softcap=0x0p+0;deterministic=0;backend=auto");
  AttentionBwdRequest request = varlen_request();
  request.operand(kDlse) = {"float32", {8, 100}, true};
  request.forward.options.max_seqlen_q = 40;
  request.forward.options.deterministic = true;
  EXPECT_EQ(to_text(request),
            "attention_bwd.v1;q=float32[100,8,64];k=float32[120,2,64];v=float32[120,2,32];cu_seqlens_q=int32[5];"
            "out=float32[100,8,32];lse=float32[8,100];dout=float32[100,8,32];dlse=float32[8,100];"
            "scale=default;causal=0;align=bottom_right;window=-1,-1;max_seqlen=40,-1;softcap=0x0p+0;"
            "deterministic=1;backend=auto");
}

bool is_same(double x, double y) { return std::bit_cast<uint64_t>(x) == std::bit_cast<uint64_t>(y); }

void expect_same(AttentionBwdRequest& x, AttentionBwdRequest& y) {
  for (int i = 0; i < kNumAttentionBwdInputs; ++i) {
    const TensorSpec &one = x.operand(i), &other = y.operand(i);
    EXPECT_EQ(one.present, other.present) << attention_bwd_operand_name(i);
    EXPECT_EQ(one.dtype, other.dtype);
    EXPECT_EQ(one.shape, other.shape);
  }
  const AttentionOptions &one = x.forward.options, &other = y.forward.options;
  ASSERT_EQ(one.softmax_scale.has_value(), other.softmax_scale.has_value());
  if (one.softmax_scale) {
    EXPECT_TRUE(is_same(*one.softmax_scale, *other.softmax_scale));
  }
  EXPECT_EQ(one.is_causal, other.is_causal);
  EXPECT_EQ(one.causal_align, other.causal_align);
  EXPECT_EQ(one.window_left, other.window_left);
  EXPECT_EQ(one.window_right, other.window_right);
  EXPECT_TRUE(is_same(one.softcap, other.softcap));
  EXPECT_EQ(one.max_seqlen_q, other.max_seqlen_q);
  EXPECT_EQ(one.max_seqlen_k, other.max_seqlen_k);
  EXPECT_EQ(one.deterministic, other.deterministic);
  EXPECT_EQ(one.backend, other.backend);
}

// Any request, whether it makes sense or not.
class RandomRequests {
 public:
  AttentionBwdRequest next() {
    AttentionBwdRequest request;
    for (int i = 0; i < kNumAttentionBwdInputs; ++i) {
      if (chance(4)) continue;
      TensorSpec& spec = request.operand(i);
      constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "int32", "int64", "float8_e4m3fn", ""};
      spec = {kNames[random_() % std::size(kNames)], {}, true};
      for (uint64_t axes = random_() % 14; axes > 0; --axes) spec.shape.push_back(integer());
    }
    AttentionOptions& options = request.forward.options;
    if (chance(2)) options.softmax_scale = real();
    options.is_causal = chance(2);
    options.causal_align = chance(2) ? CausalAlign::kBottomRight : CausalAlign::kTopLeft;
    options.window_left = integer();
    options.window_right = integer();
    options.softcap = real();
    options.deterministic = chance(2);
    options.backend = static_cast<Backend>(random_() % 4);
    if (request.operand(kCuSeqlensQ).present) {
      options.max_seqlen_q = integer();
      options.max_seqlen_k = integer();
    }
    return request;
  }

 private:
  bool chance(uint64_t n) { return random_() % n == 0; }
  int64_t integer() { return static_cast<int64_t>(random_() >> random_() % 64) * (chance(4) ? -1 : 1); }
  double real() {
    const auto value = std::bit_cast<double>(random_());
    return std::isnan(value) ? std::numeric_limits<double>::quiet_NaN() : value;  // a text has one NaN
  }

  std::mt19937_64 random_{2024};
};

TEST(BwdProblemText, RoundTripsWhateverIsAsked) {
  RandomRequests requests;
  for (int i = 0; i < 3000; ++i) {
    AttentionBwdRequest request = requests.next();
    const std::string text = to_text(request);
    SCOPED_TRACE(text);
    AttentionBwdRequest parsed = parse_attention_bwd_request(text);
    expect_same(parsed, request);
    EXPECT_EQ(to_text(parsed), text);
    if (HasFailure()) break;
  }
}

TEST(BwdProblemText, OpsDoNotReadEachOther) {
  EXPECT_THROW(parse_attention_request(to_text(simple_request())), ValueError);
  AttentionRequest forward = simple_request().forward;
  EXPECT_THROW(parse_attention_bwd_request(to_text(forward)), ValueError);
  // The forward pass's field, which the backward pass does not have.
  std::string text = to_text(simple_request());
  text.insert(text.find(";deterministic"), ";lse=1");
  EXPECT_THROW(parse_attention_bwd_request(text), ValueError);
}

TEST(BwdProblemText, OperandsOutOfOrderAreRefused) {
  const std::string text = to_text(simple_request());
  const std::string lse = ";lse=float32[2,8,16]";
  std::string moved = std::string(text).erase(text.find(lse), lse.size());
  moved.insert(moved.find(";scale"), lse);
  EXPECT_THROW(parse_attention_bwd_request(moved), ValueError);
  std::string doubled = text;
  doubled.insert(doubled.find(lse), lse);
  EXPECT_THROW(parse_attention_bwd_request(doubled), ValueError);
}

TEST(BwdProblemText, EveryTruncationAndFlippedByteIsRefusedOrParsed) {
  AttentionBwdRequest dense = simple_request();
  add_every_dense_operand(dense);
  for (const std::string& text : {to_text(dense), to_text(varlen_request())}) {
    for (size_t length = 0; length < text.size(); ++length) {
      EXPECT_THROW(parse_attention_bwd_request(text.substr(0, length)), ValueError) << length;
    }
    for (size_t bit = 0; bit < 8 * text.size(); ++bit) {
      std::string flipped = text;
      flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
      try {
        validate(parse_attention_bwd_request(flipped));
      } catch (const ValueError&) {
      } catch (const TypeError&) {
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Validation.

Shape shape_of(const AttentionBwdProblem& problem, int gradient) { return problem.gradients[gradient].shape; }

TEST(BwdValidate, SaysWhatComesOut) {
  AttentionBwdRequest request = simple_request();
  request.forward.options.is_causal = true;
  AttentionBwdProblem problem = validate(request);
  EXPECT_EQ(problem.forward.kv_len, 20);
  EXPECT_EQ(problem.forward.window_right, 0);
  EXPECT_FALSE(problem.has_dlse);
  EXPECT_EQ(problem.num_inputs(), 6);
  EXPECT_EQ(problem.num_outputs(), 4);
  EXPECT_EQ(problem.num_heads_in_all(), 16);
  EXPECT_EQ(shape_of(problem, kDq), (Shape{2, 16, 8, 64}));
  EXPECT_EQ(shape_of(problem, kDk), (Shape{2, 20, 2, 64}));
  EXPECT_EQ(shape_of(problem, kDv), (Shape{2, 20, 2, 32}));
  for (int i : {kDq, kDk, kDv}) EXPECT_EQ(problem.gradients[i].dtype, "bfloat16");
  EXPECT_FALSE(problem.gradients[kDsinks].present || problem.gradients[kDalibiSlopes].present);
  EXPECT_EQ(problem.workspace_shape(7), (Shape{2, 8, 7}));
  add_every_dense_operand(request);
  problem = validate(request);
  EXPECT_TRUE(problem.has_dlse);
  EXPECT_EQ(problem.num_inputs(), 11);
  EXPECT_EQ(problem.num_outputs(), 6);
  for (int i : {kDsinks, kDalibiSlopes}) {
    EXPECT_EQ(shape_of(problem, i), (Shape{2, 8}));
    EXPECT_EQ(problem.gradients[i].dtype, "float32");
  }
}

TEST(BwdValidate, SaysWhatComesOutOfVariableLengths) {
  AttentionBwdRequest request = varlen_request();
  request.operand(kSinks) = {"float32", {8}, true};
  const AttentionBwdProblem problem = validate(request);
  EXPECT_EQ(problem.forward.batch, 4);
  EXPECT_EQ(problem.num_heads_in_all(), 8);  // sequences share one row
  EXPECT_EQ(shape_of(problem, kDq), (Shape{100, 8, 64}));
  EXPECT_EQ(shape_of(problem, kDk), (Shape{120, 2, 64}));
  EXPECT_EQ(shape_of(problem, kDv), (Shape{120, 2, 32}));
  EXPECT_EQ(shape_of(problem, kDsinks), (Shape{8}));
  EXPECT_EQ(problem.workspace_shape(0), (Shape{8, 0}));
}

// As under vmap and jacobian: any subset is mapped, and every gradient has all leading indices.
TEST(BwdValidate, AnyInputMayHaveTheFullLeadingAxes) {
  for (int mapped = 0; mapped < kNumAttentionBwdInputs; ++mapped) {
    AttentionBwdRequest request = simple_request();
    add_every_dense_operand(request);
    if (!request.operand(mapped).present) continue;
    for (int i = 0; i < kNumAttentionBwdInputs; ++i) {
      TensorSpec& spec = request.operand(i);
      if (spec.present) spec.shape.insert(spec.shape.begin(), {1, i == mapped ? 5 : 1});
    }
    SCOPED_TRACE(attention_bwd_operand_name(mapped));
    const AttentionBwdProblem problem = validate(request);
    EXPECT_EQ(problem.forward.lead, (Shape{1, 5}));
    EXPECT_EQ(shape_of(problem, kDq), (Shape{1, 5, 2, 16, 8, 64}));
    EXPECT_EQ(shape_of(problem, kDk), (Shape{1, 5, 2, 20, 2, 64}));
    EXPECT_EQ(shape_of(problem, kDalibiSlopes), (Shape{1, 5, 2, 8}));
    EXPECT_EQ(problem.workspace_shape(3), (Shape{1, 5, 2, 8, 3}));
    EXPECT_EQ(problem.num_heads_in_all(), 80);
    EXPECT_EQ(problem.operand(mapped).shape[1], 5);  // as it was given
  }
}

TEST(BwdValidate, NamesWhatIsWrongWithWhatItAdds) {
  const auto with_shape = [](int index, const Shape& shape) {
    return refused(simple_request(), [&](auto& r) { r.operand(index).shape = shape; });
  };
  EXPECT_EQ(with_shape(kOut, {2, 16, 8, 64}),
            "out: got shape [2, 16, 8, 64] with head_dim_v 64, expected head_dim_v 32 as in v");
  EXPECT_EQ(with_shape(kDout, {2, 17, 8, 32}),
            "dout: got shape [2, 17, 8, 32] with q_len 17, expected q_len 16 as in q");
  EXPECT_EQ(with_shape(kDout, {2, 16, 2, 32}),
            "dout: got shape [2, 16, 2, 32] with num_q_heads 2, expected num_q_heads 8 as in q");
  EXPECT_EQ(with_shape(kLse, {2, 16, 8}),
            "lse: got shape [2, 16, 8] with num_q_heads 16, expected num_q_heads 8 as in q");
  EXPECT_EQ(with_shape(kLse, {2, 8, 16, 1}),
            "lse: got shape [2, 8, 16, 1] of rank 4, expected rank 3: [batch, num_q_heads, q_len]");
  EXPECT_EQ(with_shape(kOut, {3, 2, 16, 8, 32}),
            "out: got shape [3, 2, 16, 8, 32] of rank 5, expected rank 4: [batch, q_len, num_q_heads, head_dim_v]");
  EXPECT_EQ(with_shape(kOut, {2, 16, 8, -32}), "out: got shape [2, 16, 8, -32], expected sizes of 0 or more");
  for (int index : {kOut, kLse, kDout}) {
    EXPECT_EQ(refused(simple_request(), [&](auto& r) { r.operand(index) = {}; }),
              std::string(attention_bwd_operand_name(index)) + ": got nothing, expected a tensor");
  }
  EXPECT_EQ(refused<TypeError>(simple_request(), [](auto& r) { r.operand(kDout).dtype = "float32"; }),
            "dout: got dtype float32, expected bfloat16 (the dtype of q)");
  EXPECT_EQ(refused<TypeError>(simple_request(), [](auto& r) { r.operand(kOut).dtype = "float16"; }),
            "out: got dtype float16, expected bfloat16 (the dtype of q)");
  EXPECT_EQ(refused<TypeError>(simple_request(), [](auto& r) { r.operand(kLse).dtype = "bfloat16"; }),
            "lse: got dtype bfloat16, expected float32");
  const TensorSpec wrong_dtype{"float64", {2, 8, 16}, true}, wrong_shape{"float32", {2, 8, 1}, true};
  EXPECT_EQ(refused<TypeError>(simple_request(), [&](auto& r) { r.operand(kDlse) = wrong_dtype; }),
            "dlse: got dtype float64, expected float32");
  EXPECT_EQ(refused(simple_request(), [&](auto& r) { r.operand(kDlse) = wrong_shape; }),
            "dlse: got shape [2, 8, 1] with q_len 1, expected q_len 16 as in q");
}

TEST(BwdValidate, NamesWhatIsWrongInVariableLengths) {
  EXPECT_EQ(refused(varlen_request(),
                    [](auto& r) {
                      r.operand(kLse).shape = {100, 8};
                    }),
            "lse: got shape [100, 8] with num_q_heads 100, expected num_q_heads 8 as in q");
  const Shape too_long = {101, 8, 32};
  EXPECT_EQ(refused(varlen_request(), [&](auto& r) { r.operand(kDout).shape = too_long; }),
            "dout: got shape [101, 8, 32] with total_q 101, expected total_q 100 as in q");
}

TEST(BwdValidate, NamesWhatIsWrongWithLeadingAxes) {
  const auto with_lead = [](const Shape& lead_of_k, const Shape& lead_of_dout) {
    return refused(simple_request(), [&](AttentionBwdRequest& r) {
      for (int i = 0; i < kNumAttentionBwdInputs; ++i) {
        TensorSpec& spec = r.operand(i);
        const Shape lead = i == kK ? lead_of_k : i == kDout ? lead_of_dout : Shape(lead_of_k.size(), 1);
        if (spec.present) spec.shape.insert(spec.shape.begin(), lead.begin(), lead.end());
      }
    });
  };
  EXPECT_EQ(with_lead({3, 1}, {1, 4}), "");
  EXPECT_EQ(with_lead({3, 1}, {2, 4}),
            "dout: got shape [2, 4, 2, 16, 8, 32]: leading axis 0 of size 2, expected size 3 or 1");
  EXPECT_EQ(with_lead({3, 1}, {3}),
            "dout: got shape [3, 2, 16, 8, 32] of rank 5, expected rank 6: [2 leading axes, batch, q_len, num_q_heads, "
            "head_dim_v]");
  EXPECT_EQ(with_lead({0, 1}, {1, 4}), "");  // nothing to do
  EXPECT_EQ(with_lead(Shape(9, 1), Shape(9, 1)), "q: got rank 13, expected at most 8 leading axes");
}

TEST(BwdValidate, ChecksTheForwardPassToo) {
  EXPECT_EQ(refused(simple_request(), [](auto& r) { r.operand(kK).shape[2] = 3, r.operand(kV).shape[2] = 3; }),
            "q: got num_q_heads 8, expected a multiple of num_kv_heads 3 of k");
  EXPECT_EQ(refused(simple_request(), [](auto& r) { r.forward.options.softcap = -1; }),
            "softcap: got -1.000000, expected 0 (off) or a positive number");
}

// Sizes that fit 64 bits in the forward pass, but not with the leading axis that only dout has.
TEST(BwdValidate, RefusesGradientsWhoseSizesOverflow) {
  const auto with_lead = [](int64_t lead_of_dout) {
    return refused(simple_request(), [&](AttentionBwdRequest& r) {
      for (int i = 0; i < kNumAttentionBwdInputs; ++i) {
        TensorSpec& spec = r.operand(i);
        if (spec.present) spec.shape.insert(spec.shape.begin(), i == kDout ? lead_of_dout : 1);
      }
    });
  };
  EXPECT_EQ(with_lead(int64_t{1} << 43), "");  // 2^43 x 2 x 16 x 8 x 256 = 2^59 elements
  EXPECT_EQ(with_lead(int64_t{1} << 45),
            "q: got shape [35184372088832, 2, 16, 8, 256], expected at most 2^60 elements");
}

// ---------------------------------------------------------------------------------------------------------------------
// Resolution.

TEST(BwdResolve, NamesEveryCandidate) {
  AttentionBwdProblem problem = validate(simple_request());
  for (const char* target : {"cpu", "sm_75", "sm_80", "sm_90a", "cuda"}) {
    const AttentionBwdResolution resolution = resolve(problem, parse_target(target));
    ASSERT_EQ(resolution.candidates.size(), 3U);
    EXPECT_EQ(resolution.candidates[0].name, "sm90_attention_bwd");
    EXPECT_EQ(resolution.candidates[1].name, "sm80_attention_bwd");
    EXPECT_EQ(resolution.candidates[2].name, "cpu_attention_bwd");
    for (const Candidate& candidate : resolution.candidates) {
      const bool is_chosen = resolution.chosen != nullptr && candidate.name == resolution.chosen->name;
      EXPECT_EQ(candidate.reason.empty(), is_chosen) << target << ": " << candidate.name;
    }
  }
  problem.forward.backend = Backend::kSm80;
  const AttentionBwdResolution forced = resolve(problem, parse_target("cpu"));
  EXPECT_EQ(forced.chosen, nullptr);
  EXPECT_EQ(forced.workspace_bytes, 0);
  EXPECT_EQ(forced.candidates[2].reason, "not the backend that was asked for");
}

// A program's workspace is divided over devices along leading axes, batch and query heads: what a head needs must not
// depend on how many of them a device has.
TEST(BwdResolve, TheWorkspaceOfAHeadDoesNotDependOnHowManyThereAre) {
  const auto per_head = [](int64_t lead, int64_t batch, int64_t q_heads, int64_t kv_heads, const char* target,
                           bool is_deterministic) {
    AttentionBwdRequest request;
    request.operand(kQ) = request.operand(kDout) =
        request.operand(kOut) = {"float32", {lead, batch, 700, q_heads, 64}, true};
    request.operand(kK) = request.operand(kV) = {"float32", {lead, batch, 900, kv_heads, 64}, true};
    request.operand(kLse) = {"float32", {lead, batch, q_heads, 700}, true};
    request.operand(kSinks) = request.operand(kAlibiSlopes) = {"float32", {lead, q_heads}, true};
    request.forward.options.deterministic = is_deterministic;
    const AttentionBwdProblem problem = validate(request);
    const AttentionBwdResolution resolution = resolve(problem, parse_target(target));
    EXPECT_NE(resolution.chosen, nullptr);
    EXPECT_EQ(resolution.workspace_bytes, 4 * resolution.workspace_per_head * lead * batch * q_heads);
    return resolution.workspace_per_head;
  };
  for (const char* target : {"cpu", "sm_80", "sm_90a"}) {
    for (bool is_deterministic : {false, true}) {
      const int64_t alone = per_head(1, 1, 1, 1, target, is_deterministic);
      EXPECT_EQ(per_head(1, 1, 8, 1, target, is_deterministic), alone);
      EXPECT_EQ(per_head(1, 1, 8, 8, target, is_deterministic), alone);
      EXPECT_EQ(per_head(1, 6, 8, 2, target, is_deterministic), alone);
      EXPECT_EQ(per_head(3, 2, 4, 2, target, is_deterministic), alone);
    }
  }
}

TEST(BwdResolve, UnpreparedTextsAreRefusedWithTheirProblem) {
  AttentionBwdRequest request = simple_request();
  request.forward.options.backend = Backend::kSm90;
  try {
    prepare_attention_bwd(to_text(request), parse_target("cpu"));
    FAIL() << "expected UnsupportedError";
  } catch (const UnsupportedError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("no kernel serves this attention backward on target cpu"), std::string::npos) << message;
    EXPECT_NE(message.find(to_text(request)), std::string::npos) << message;
    EXPECT_EQ(error.candidates().size(), 3U);
  }
}

}  // namespace
}  // namespace heed
