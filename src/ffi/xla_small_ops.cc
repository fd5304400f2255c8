// The XLA custom calls of the small ops, "heed.<op>.v1".
#include <string_view>

#include "ffi/xla_call.h"
#include "ops/act_and_mul.h"
#include "ops/attention_decode.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"

namespace {

namespace xla = heed::xla;

template <class SmallOp>
struct Call {
  static constexpr auto& prepare = SmallOp::prepare;
  static constexpr auto& load = SmallOp::load;
  static constexpr auto& run = SmallOp::run;

  static typename SmallOp::Args args(const heed::PreparedOp<SmallOp>& prepared, const xla::CallFrame& frame,
                                     heed::Device device) {
    xla::TensorReader operands(frame.args, device), results(frame.rets, device);
    int num_left = prepared.problem.num_inputs();
    return heed::read_views<SmallOp>(prepared, [&](std::string_view /*name*/, const heed::TensorSpec& /*spec*/) {
      return num_left-- > 0 ? operands.next() : results.next();
    });
  }
};

template <class SmallOp>
xla::Error* on_cpu(xla::CallFrame* frame) {
  return xla::handle(frame, xla::run_on_cpu<Call<SmallOp>>);
}

// For both stages.
template <class SmallOp>
xla::Error* on_cuda(xla::CallFrame* frame) {
  return xla::handle(frame, xla::run_on_cuda<Call<SmallOp>>);
}

}  // namespace

extern "C" {

HEED_API xla::Error* heed_xla_act_and_mul(xla::CallFrame* frame) { return on_cpu<heed::ActAndMulOp>(frame); }
HEED_API xla::Error* heed_xla_act_and_mul_cuda(xla::CallFrame* frame) { return on_cuda<heed::ActAndMulOp>(frame); }

HEED_API xla::Error* heed_xla_act_and_mul_bwd(xla::CallFrame* frame) { return on_cpu<heed::ActAndMulBwdOp>(frame); }
HEED_API xla::Error* heed_xla_act_and_mul_bwd_cuda(xla::CallFrame* frame) {
  return on_cuda<heed::ActAndMulBwdOp>(frame);
}

HEED_API xla::Error* heed_xla_rope(xla::CallFrame* frame) { return on_cpu<heed::RopeOp>(frame); }
HEED_API xla::Error* heed_xla_rope_cuda(xla::CallFrame* frame) { return on_cuda<heed::RopeOp>(frame); }

HEED_API xla::Error* heed_xla_rms_norm(xla::CallFrame* frame) { return on_cpu<heed::RmsNormOp>(frame); }
HEED_API xla::Error* heed_xla_rms_norm_cuda(xla::CallFrame* frame) { return on_cuda<heed::RmsNormOp>(frame); }

HEED_API xla::Error* heed_xla_rms_norm_bwd(xla::CallFrame* frame) { return on_cpu<heed::RmsNormBwdOp>(frame); }
HEED_API xla::Error* heed_xla_rms_norm_bwd_cuda(xla::CallFrame* frame) { return on_cuda<heed::RmsNormBwdOp>(frame); }

HEED_API xla::Error* heed_xla_attention_decode(xla::CallFrame* frame) { return on_cpu<heed::AttentionDecodeOp>(frame); }
HEED_API xla::Error* heed_xla_attention_decode_cuda(xla::CallFrame* frame) {
  return on_cuda<heed::AttentionDecodeOp>(frame);
}

}  // extern "C"
