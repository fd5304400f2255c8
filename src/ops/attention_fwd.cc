// Attention forward: validate -> resolve -> plan -> launch.
#include "ops/attention_fwd.h"

#include "core/dtype.h"
#include "cpu/attention_fwd.h"
#include "cuda/jit/jit.h"
#include "cuda/sm80_attention_fwd.h"
#include "cuda/sm90_attention_fwd.h"
#include "ops/stages.h"
#include "ops/views.h"

namespace heed {
namespace {

void run_on_cpu(const AttentionProblem& problem, const AttentionForwardArgs& args, void* /*prepared*/) {
  cpu::attention_fwd(problem, args);
}

constexpr AttentionFwdKernel kKernels[] = {
    {"sm90_attention_fwd", Backend::kSm90, "sm90", cuda::sm90_attention_fwd_declines, cuda::sm90_attention_fwd,
     cuda::prepare_sm90_attention_fwd, cuda::load_sm90_attention_fwd, cuda::sm90_attention_fwd_workspace},
    {"sm80_attention_fwd", Backend::kSm80, "sm80", cuda::sm80_attention_fwd_declines, cuda::sm80_attention_fwd,
     cuda::prepare_sm80_attention_fwd, cuda::load_sm80_attention_fwd},
    {"cpu_attention_fwd", Backend::kCpu, "cpu", cpu::attention_fwd_declines, run_on_cpu},
};

const TensorView& operand(const AttentionForwardArgs& args, int index) {
  return *inputs_of(const_cast<AttentionForwardArgs&>(args))[static_cast<size_t>(index)];
}

AttentionRequest make_request(const AttentionForwardArgs& args, const AttentionOptions& options) {
  AttentionRequest request;
  request.options = options;
  request.wants_lse = args.lse.defined();
  for (int i = 0; i < kNumAttentionInputs; ++i) {
    request.operands[i] = spec_of(kAttentionOperandNames[i], operand(args, i));
  }
  return request;
}

void check_views(const PreparedAttentionFwd& prepared, const AttentionForwardArgs& args) {
  const AttentionProblem& problem = prepared.problem;
  for (int i = 0; i < kNumAttentionInputs; ++i) {
    const TensorSpec& spec = problem.operands[i];
    if (!spec.present) continue;
    check_view(kAttentionOperandNames[i], operand(args, i), find_dtype(spec.dtype)->dtype, spec.shape, args.q.device,
               false);
  }
  check_view("out", args.out, problem.dtype, problem.out_shape(), args.q.device, true);
  if (problem.wants_lse) check_view("lse", args.lse, DType::kFloat32, problem.lse_shape(), args.q.device, true);
}

void launch(const PreparedAttentionFwd& prepared, const AttentionForwardArgs& args) {
  prepared.kernel->run(prepared.problem, args, prepared.state.get());
}

PreparedAttentionFwd prepare(const AttentionRequest& request, const Target& target) {
  PreparedAttentionFwd prepared;
  prepared.problem = validate(request);
  const AttentionFwdResolution resolution = resolve(prepared.problem, target);
  prepared.kernel = require_kernel(resolution, "attention forward", to_text(request), target);
  prepared.workspace_bytes = resolution.workspace_bytes;
  if (prepared.kernel->prepare != nullptr) prepared.state = prepared.kernel->prepare(prepared.problem);
  return prepared;
}

}  // namespace

AttentionFwdResolution resolve(const AttentionProblem& problem, const Target& target) {
  return resolve_in(kKernels, problem, target);
}

std::shared_ptr<const PreparedAttentionFwd> prepare_attention_fwd(std::string_view text, const Target& target) {
  static auto* const tables = new PreparedTables<PreparedAttentionFwd>;
  return tables->find_or_make(text, target, [&] { return prepare(parse_attention_request(text), target); });
}

void load_attention_fwd(const PreparedAttentionFwd& prepared, int device) {
  if (prepared.kernel->load != nullptr) prepared.kernel->load(prepared.problem, prepared.state.get(), device);
}

void run_attention_fwd(const PreparedAttentionFwd& prepared, const AttentionForwardArgs& args) {
  check_views(prepared, args);
  const TensorView& workspace = args.workspace;
  if (!workspace.defined() || suffices_as_workspace(workspace, prepared.workspace_bytes, args.q.device)) {
    launch(prepared, args);
  } else {
    AttentionForwardArgs without_workspace = args;
    without_workspace.workspace = {};
    launch(prepared, without_workspace);
  }
}

void attention_forward(const AttentionForwardArgs& args, const AttentionOptions& options) {
  // 1. Validate, 2. resolve, 3. plan: GPU kernels derive their parameters from the problem; the CPU kernel derives its
  // work items when it runs, from the problem and, packed, from its lengths.
  const PreparedAttentionFwd prepared = prepare(make_request(args, options), target_of(args.q.device));
  check_views(prepared, args);
  if (args.workspace.defined()) check_workspace(args.workspace, prepared.workspace_bytes, args.q.device);
  // 4. Launch.
  if (args.q.device.type == DeviceType::kCpu) {
    launch(prepared, args);
  } else {
    const cuda::DeviceScope scope(args.q.device.index);  // the default stream is that of the current context
    launch(prepared, args);
  }
}

int64_t attention_forward_workspace_bytes(const AttentionForwardArgs& args, const AttentionOptions& options) {
  const AttentionRequest request = make_request(args, options);
  const Target target = target_of(args.q.device);
  const AttentionFwdResolution resolution = resolve(validate(request), target);
  require_kernel(resolution, "attention forward", to_text(request), target);
  return resolution.workspace_bytes;
}

}  // namespace heed
