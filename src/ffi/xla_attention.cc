// The XLA custom calls "heed.attention_fwd.v1" and "heed.attention_bwd.v1".
#include "ffi/xla_call.h"
#include "ops/attention_bwd.h"
#include "ops/attention_fwd.h"

namespace {

namespace xla = heed::xla;

struct AttentionFwd {
  static constexpr bool kMayHaveWorkspace = true;
  static constexpr auto& prepare = heed::prepare_attention_fwd;
  static constexpr auto& load = heed::load_attention_fwd;
  static constexpr auto& run = heed::run_attention_fwd;

  static heed::AttentionForwardArgs args(const heed::PreparedAttentionFwd& prepared, const xla::CallFrame& frame,
                                         heed::Device device) {
    const heed::AttentionProblem& problem = prepared.problem;
    heed::AttentionForwardArgs args;
    xla::TensorReader operands(frame.args, device), results(frame.rets, device);
    const heed::AttentionInputs inputs = heed::inputs_of(args);
    for (int i = 0; i < heed::kNumAttentionInputs; ++i) {
      if (problem.operands[i].present) *inputs[i] = operands.next();
    }
    args.out = results.next();
    if (problem.wants_lse) args.lse = results.next();
    if (results.has_next()) args.workspace = results.next();
    return args;
  }
};

struct AttentionBwd {
  static constexpr auto& prepare = heed::prepare_attention_bwd;
  static constexpr auto& load = heed::load_attention_bwd;
  static constexpr auto& run = heed::run_attention_bwd;

  static heed::AttentionBackwardArgs args(const heed::PreparedAttentionBwd& prepared, const xla::CallFrame& frame,
                                          heed::Device device) {
    const heed::AttentionBwdProblem& problem = prepared.problem;
    heed::AttentionBackwardArgs args;
    xla::TensorReader operands(frame.args, device), results(frame.rets, device);
    const heed::AttentionBwdInputs inputs = heed::bwd_inputs_of(args);
    for (int i = 0; i < heed::kNumAttentionBwdInputs; ++i) {
      if (problem.operand(i).present) *inputs[i] = operands.next();
    }
    const heed::AttentionGradients gradients = heed::gradients_of(args);
    for (int i = 0; i < heed::kNumAttentionGradients; ++i) {
      if (problem.gradients[i].present) *gradients[i] = results.next();
    }
    args.workspace = results.next();
    return args;
  }
};

}  // namespace

extern "C" HEED_API xla::Error* heed_xla_attention_fwd(xla::CallFrame* frame) {
  return xla::handle(frame, xla::run_on_cpu<AttentionFwd>);
}

extern "C" HEED_API xla::Error* heed_xla_attention_bwd(xla::CallFrame* frame) {
  return xla::handle(frame, xla::run_on_cpu<AttentionBwd>);
}

// For both stages.
extern "C" HEED_API xla::Error* heed_xla_attention_fwd_cuda(xla::CallFrame* frame) {
  return xla::handle(frame, xla::run_on_cuda<AttentionFwd>);
}

extern "C" HEED_API xla::Error* heed_xla_attention_bwd_cuda(xla::CallFrame* frame) {
  return xla::handle(frame, xla::run_on_cuda<AttentionBwd>);
}
