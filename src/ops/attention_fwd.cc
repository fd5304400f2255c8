// Attention forward: validate -> resolve -> plan -> launch.
#include "ops/attention_fwd.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/text_table.h"
#include "cpu/attention_fwd.h"
#include "cuda/device_target.h"
#include "cuda/jit/jit.h"
#include "cuda/sm80_attention_fwd.h"

namespace heed {
namespace {

// The Hopper family has a row already, so that a caller learns why it does not serve; this build does not contain it.
std::string sm90_declines(const AttentionProblem& /*problem*/, const Target& target) {
  if (target.is_cpu || (target.sm != 0 && target.sm != 90)) {
    return "needs an NVIDIA Hopper GPU (sm_90a), and the target is " + target.name;
  }
  return "this version of heed has no kernels for Hopper alone";
}

void run_on_cpu(const AttentionProblem& problem, const AttentionForwardArgs& args, void* /*prepared*/) {
  cpu::attention_fwd(problem, args);
}

constexpr AttentionFwdKernel kKernels[] = {
    {"sm90_attention_fwd", Backend::kSm90, "sm90", sm90_declines, nullptr},
    {"sm80_attention_fwd", Backend::kSm80, "sm80", cuda::sm80_attention_fwd_declines, cuda::sm80_attention_fwd,
     cuda::prepare_sm80_attention_fwd, cuda::load_sm80_attention_fwd},
    {"cpu_attention_fwd", Backend::kCpu, "cpu", cpu::attention_fwd_declines, run_on_cpu},
};

const TensorView& operand(const AttentionForwardArgs& args, int index) {
  return *inputs_of(const_cast<AttentionForwardArgs&>(args))[static_cast<size_t>(index)];
}

// What the type system lets through: ranks and enumerators out of range.
void check_view_fields(std::string_view name, const TensorView& view) {
  if (view.rank > kMaxRank) {
    throw ValueError(std::string(name) + ": got rank " + std::to_string(view.rank) + ", expected at most " +
                     std::to_string(kMaxRank));
  }
  if (view.defined() && static_cast<size_t>(view.dtype) >= std::size(kDTypes)) {
    throw TypeError(std::string(name) + ": got DType " + std::to_string(static_cast<int>(view.dtype)) +
                    ", expected one of heed::DType");
  }
}

AttentionRequest make_request(const AttentionForwardArgs& args, const AttentionOptions& options) {
  AttentionRequest request;
  request.options = options;
  request.wants_lse = args.lse.defined();
  for (int i = 0; i < kNumAttentionInputs; ++i) {
    const TensorView& view = operand(args, i);
    if (!view.defined()) continue;
    check_view_fields(kAttentionOperandNames[i], view);
    request.operands[i] = {
        std::string(info(view.dtype).name), {view.shape.begin(), view.shape.begin() + view.rank}, true};
  }
  return request;
}

std::string show(const TensorView& view) {
  std::string text = std::string(info(view.dtype).name) + " [";
  for (int i = 0; i < view.rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(view.shape[i]);
  return text + "]";
}

// Whether each stride steps over all that the smaller ones span. Sufficient for elements not to share memory, and true
// of every layout that slices, transposes or pads an array.
bool has_distinct_elements(const TensorView& view) {
  std::vector<std::pair<uint64_t, uint64_t>> axes;  // stride, size - 1
  for (int i = 0; i < view.rank; ++i) {
    const auto stride = static_cast<uint64_t>(view.strides[i]);
    if (view.shape[i] > 1) axes.emplace_back(view.strides[i] < 0 ? -stride : stride, view.shape[i] - 1);
  }
  std::sort(axes.begin(), axes.end());
  uint64_t span = 0;
  for (auto [stride, steps] : axes) {
    if (stride <= span) return false;
    span += stride * steps;
  }
  return true;
}

// One view's dtype, shape and memory against what the problem says.
void check_view(std::string_view name, const TensorView& view, DType dtype, const std::vector<int64_t>& shape,
                Device device, bool is_output) {
  const std::string tensor(name);
  check_view_fields(name, view);
  bool is_same_shape = view.rank == static_cast<int>(shape.size());
  bool is_empty = false;
  for (int i = 0; is_same_shape && i < view.rank; ++i) {
    is_same_shape = view.shape[i] == shape[i];
    is_empty = is_empty || shape[i] == 0;
  }
  if (!is_same_shape || view.dtype != dtype) {
    TensorView expected;
    expected.rank = static_cast<int>(shape.size());
    expected.dtype = dtype;
    std::copy(shape.begin(), shape.end(), expected.shape.begin());
    const std::string message =
        tensor + ": got " + (view.defined() ? show(view) : "nothing") + ", expected " + show(expected);
    if (is_same_shape) throw TypeError(message);
    throw ValueError(message);
  }
  if (!(view.device == device)) throw ValueError(tensor + ": got another device than q, expected the device of q");
  if (is_empty) return;
  if (view.data == nullptr) throw ValueError(tensor + ": got a null pointer, expected memory");
  const int64_t size_bytes = info(dtype).size_bytes;
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(size_bytes) != 0) {
    throw ValueError(tensor + ": got a misaligned pointer, expected one aligned to " + std::to_string(size_bytes) +
                     " bytes");
  }
  if (is_output && !has_distinct_elements(view)) {
    std::string strides;
    for (int i = 0; i < view.rank; ++i) strides += (i == 0 ? "" : ", ") + std::to_string(view.strides[i]);
    throw ValueError(tensor + ": got strides [" + strides + "], expected strides that keep output elements apart");
  }
}

void check_views(const AttentionProblem& problem, const AttentionForwardArgs& args) {
  for (int i = 0; i < kNumAttentionInputs; ++i) {
    const TensorSpec& spec = problem.operands[i];
    if (!spec.present) continue;
    check_view(kAttentionOperandNames[i], operand(args, i), find_dtype(spec.dtype)->dtype, spec.shape, args.q.device,
               false);
  }
  check_view("out", args.out, problem.dtype, problem.out_shape(), args.q.device, true);
  if (problem.wants_lse) check_view("lse", args.lse, DType::kFloat32, problem.lse_shape(), args.q.device, true);
}

const AttentionFwdKernel* require_kernel(const AttentionFwdResolution& resolution, const AttentionRequest& request,
                                         const Target& target) {
  if (resolution.chosen != nullptr) return resolution.chosen;
  std::string message = "no kernel serves this attention forward on target " + target.name + ":";
  for (const Candidate& candidate : resolution.candidates) {
    message += "\n  " + candidate.name + ": " + candidate.reason;
  }
  throw UnsupportedError(message + "\n  problem: " + to_text(request), resolution.candidates);
}

PreparedAttentionFwd prepare(const AttentionRequest& request, const Target& target) {
  PreparedAttentionFwd prepared;
  prepared.problem = validate(request);
  prepared.kernel = require_kernel(resolve(prepared.problem, target), request, target);
  if (prepared.kernel->prepare != nullptr) prepared.state = prepared.kernel->prepare(prepared.problem);
  return prepared;
}

}  // namespace

AttentionFwdResolution resolve(const AttentionProblem& problem, const Target& target) {
  return resolve_in(kKernels, problem, target);
}

std::shared_ptr<const PreparedAttentionFwd> prepare_attention_fwd(std::string_view text, const Target& target) {
  // One for the CPU and one for each generation of GPUs. Never destroyed: other threads may still compute while the
  // process ends.
  constexpr size_t kNumTables = 128;
  static auto* const tables = new std::array<TextTable<PreparedAttentionFwd>*, kNumTables>{};
  static auto* const once = new std::array<std::once_flag, kNumTables>;
  const size_t index = target.is_cpu ? 0 : 1 + static_cast<size_t>(target.sm) % (kNumTables - 1);
  std::call_once((*once)[index], [&] { (*tables)[index] = new TextTable<PreparedAttentionFwd>; });
  TextTable<PreparedAttentionFwd>& table = *(*tables)[index];
  if (std::shared_ptr<const PreparedAttentionFwd> known = table.find(text)) return known;
  return table.insert(text,
                      std::make_shared<const PreparedAttentionFwd>(prepare(parse_attention_request(text), target)));
}

void load_attention_fwd(const PreparedAttentionFwd& prepared, int device) {
  if (prepared.kernel->load != nullptr) prepared.kernel->load(prepared.problem, prepared.state.get(), device);
}

void run_attention_fwd(const PreparedAttentionFwd& prepared, const AttentionForwardArgs& args) {
  check_views(prepared.problem, args);
  prepared.kernel->run(prepared.problem, args, prepared.state.get());
}

void attention_forward(const AttentionForwardArgs& args, const AttentionOptions& options) {
  // 1. Validate, 2. resolve, 3. plan: GPU kernels derive their parameters from the problem; the CPU kernel derives its
  // work items when it runs, from the problem and, packed, from its lengths. Neither needs workspace.
  const bool is_cpu = args.q.device.type == DeviceType::kCpu;
  const int device = args.q.device.index;
  const PreparedAttentionFwd prepared =
      prepare(make_request(args, options), is_cpu ? parse_target("cpu") : cuda_target(device));
  // 4. Launch.
  if (is_cpu) {
    run_attention_fwd(prepared, args);
  } else {
    const cuda::DeviceScope scope(device);  // the default stream is that of the current context
    run_attention_fwd(prepared, args);
  }
}

}  // namespace heed
