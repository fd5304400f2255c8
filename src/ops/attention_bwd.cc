// Attention backward: validate -> resolve -> plan -> launch.
#include "ops/attention_bwd.h"

#include "core/dtype.h"
#include "cpu/attention_bwd.h"
#include "cuda/jit/jit.h"
#include "cuda/sm80_attention_bwd.h"
#include "ops/stages.h"
#include "ops/views.h"

namespace heed {
namespace {

void run_on_cpu(const AttentionBwdProblem& problem, const AttentionBackwardArgs& args, void* /*prepared*/) {
  cpu::attention_bwd(problem, args);
}

constexpr AttentionBwdKernel kKernels[] = {
    {"sm90_attention_bwd", Backend::kSm90, "sm90", sm90_declines<AttentionBwdProblem>, nullptr},
    {"sm80_attention_bwd", Backend::kSm80, "sm80", cuda::sm80_attention_bwd_declines, cuda::sm80_attention_bwd,
     cuda::prepare_sm80_attention_bwd, cuda::load_sm80_attention_bwd, cuda::sm80_attention_bwd_workspace},
    {"cpu_attention_bwd", Backend::kCpu, "cpu", cpu::attention_bwd_declines, run_on_cpu, nullptr, nullptr,
     cpu::attention_bwd_workspace},
};

AttentionBwdRequest make_request(const AttentionBackwardArgs& args, const AttentionOptions& options) {
  AttentionBwdRequest request;
  request.forward.options = options;
  const AttentionBwdInputs inputs = bwd_inputs_of(const_cast<AttentionBackwardArgs&>(args));
  for (int i = 0; i < kNumAttentionBwdInputs; ++i) {
    request.operand(i) = spec_of(attention_bwd_operand_name(i), *inputs[i]);
  }
  return request;
}

void check_views(const PreparedAttentionBwd& prepared, const AttentionBackwardArgs& args) {
  const AttentionBwdProblem& problem = prepared.problem;
  const Device device = args.q.device;
  const AttentionBwdInputs inputs = bwd_inputs_of(const_cast<AttentionBackwardArgs&>(args));
  for (int i = 0; i < kNumAttentionBwdInputs; ++i) {
    const TensorSpec& spec = problem.operand(i);
    if (!spec.present) continue;
    check_view(attention_bwd_operand_name(i), *inputs[i], find_dtype(spec.dtype)->dtype, spec.shape, device, false);
  }
  const AttentionGradients gradients = gradients_of(const_cast<AttentionBackwardArgs&>(args));
  for (int i = 0; i < kNumAttentionGradients; ++i) {
    const TensorSpec& spec = problem.gradients[i];
    const std::string_view name = kAttentionGradientNames[i];
    if (spec.present) {
      check_view(name, *gradients[i], find_dtype(spec.dtype)->dtype, spec.shape, device, true);
    } else if (gradients[i]->defined()) {
      throw ValueError(std::string(name) + ": got a tensor, expected nothing without " + std::string(name.substr(1)));
    }
  }
  check_workspace(args.workspace, prepared.workspace_bytes, device);
}

PreparedAttentionBwd prepare(const AttentionBwdRequest& request, const Target& target) {
  PreparedAttentionBwd prepared;
  prepared.problem = validate(request);
  const AttentionBwdResolution resolution = resolve(prepared.problem, target);
  prepared.kernel = require_kernel(resolution, "attention backward", to_text(request), target);
  prepared.workspace_bytes = resolution.workspace_bytes;
  if (prepared.kernel->prepare != nullptr) prepared.state = prepared.kernel->prepare(prepared.problem);
  return prepared;
}

}  // namespace

AttentionBwdResolution resolve(const AttentionBwdProblem& problem, const Target& target) {
  return resolve_in(kKernels, problem, target);
}

std::shared_ptr<const PreparedAttentionBwd> prepare_attention_bwd(std::string_view text, const Target& target) {
  static auto* const tables = new PreparedTables<PreparedAttentionBwd>;
  return tables->find_or_make(text, target, [&] { return prepare(parse_attention_bwd_request(text), target); });
}

void load_attention_bwd(const PreparedAttentionBwd& prepared, int device) {
  if (prepared.kernel->load != nullptr) prepared.kernel->load(prepared.problem, prepared.state.get(), device);
}

void run_attention_bwd(const PreparedAttentionBwd& prepared, const AttentionBackwardArgs& args) {
  check_views(prepared, args);
  prepared.kernel->run(prepared.problem, args, prepared.state.get());
}

void attention_backward(const AttentionBackwardArgs& args, const AttentionOptions& options) {
  // 1. Validate, 2. resolve, 3. plan: what a kernel derives from the problem. Its scratch memory is the caller's.
  const PreparedAttentionBwd prepared = prepare(make_request(args, options), target_of(args.q.device));
  // 4. Launch.
  if (args.q.device.type == DeviceType::kCpu) {
    run_attention_bwd(prepared, args);
  } else {
    const cuda::DeviceScope scope(args.q.device.index);  // the default stream is that of the current context
    run_attention_bwd(prepared, args);
  }
}

int64_t attention_backward_workspace_bytes(const AttentionBackwardArgs& args, const AttentionOptions& options) {
  const AttentionBwdRequest request = make_request(args, options);
  const Target target = target_of(args.q.device);
  const AttentionBwdResolution resolution = resolve(validate(request), target);
  require_kernel(resolution, "attention backward", to_text(request), target);
  return resolution.workspace_bytes;
}

}  // namespace heed
