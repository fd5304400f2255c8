// Attention of one query over a KV cache: validate -> resolve -> plan -> launch, in call_op().
#include "ops/attention_decode.h"

#include "cpu/attention_decode.h"
#include "cuda/sm80_attention_decode.h"

namespace heed {
namespace {

void run_on_cpu(const AttentionDecodeProblem& problem, const SingleDecodeArgs& args, void* /*prepared*/) {
  cpu::attention_decode(problem, args);
}

constexpr AttentionDecodeOp::KernelType kKernels[] = {
    {"sm80_attention_decode", Backend::kSm80, "sm80", cuda::sm80_attention_decode_declines, cuda::sm80_attention_decode,
     cuda::prepare_sm80_attention_decode, cuda::load_sm80_attention_decode, cuda::sm80_attention_decode_workspace},
    {"cpu_attention_decode", Backend::kCpu, "cpu", cpu::attention_decode_declines, run_on_cpu, nullptr, nullptr,
     cpu::attention_decode_workspace},
};

AttentionDecodeRequest make_request(const SingleDecodeArgs& args, const SingleDecodeOptions& options) {
  AttentionDecodeRequest request{.options = options, .wants_lse = args.lse.defined()};
  set_operands<AttentionDecodeOp>(request, args);
  return request;
}

}  // namespace

std::array<TensorSpec, 3> AttentionDecodeOp::result_specs(const Problem& problem, int64_t workspace_floats) {
  return {TensorSpec{std::string(info(problem.dtype).name), problem.out_shape(), true},
          problem.wants_lse ? TensorSpec{"float32", problem.lse_shape(), true} : TensorSpec{},
          TensorSpec{"float32", problem.workspace_shape(workspace_floats), true}};
}

Resolution<AttentionDecodeOp::KernelType> AttentionDecodeOp::resolve(const Problem& problem, const Target& target) {
  return resolve_in(kKernels, problem, target);
}

ResolvedOp<AttentionDecodeOp> AttentionDecodeOp::resolve_text(std::string_view text, const Target& target) {
  return resolve_request<AttentionDecodeOp>(parse_attention_decode_request(text), target);
}

std::shared_ptr<const PreparedOp<AttentionDecodeOp>> AttentionDecodeOp::prepare(std::string_view text,
                                                                                const Target& target) {
  static auto* const tables = new PreparedTables<PreparedOp<AttentionDecodeOp>>;
  return tables->find_or_make(
      text, target, [&] { return prepare_request<AttentionDecodeOp>(parse_attention_decode_request(text), target); });
}

void AttentionDecodeOp::load(const PreparedOp<AttentionDecodeOp>& prepared, int device) { load_op(prepared, device); }
void AttentionDecodeOp::run(const PreparedOp<AttentionDecodeOp>& prepared, const Args& args) { run_op(prepared, args); }

void single_decode(const SingleDecodeArgs& args, const SingleDecodeOptions& options) {
  call_op<AttentionDecodeOp>(make_request(args, options), args);
}

int64_t single_decode_workspace_bytes(const SingleDecodeArgs& args, const SingleDecodeOptions& options) {
  return workspace_bytes_of<AttentionDecodeOp>(make_request(args, options), args);
}

}  // namespace heed
