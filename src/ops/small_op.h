// The stages that the small ops share. What differs among them is a struct per op (ops/act_and_mul.h, ops/rope.h, ...):
//   Problem, Args, kName, kTitle,
//   kResultNames, kHasWorkspace: names of the results; with a workspace, the last one is that,
//   inputs(args), results(args): the views in the orders of Problem::kNames and kResultNames, null for an operand that
//     the op never has,
//   result_specs(problem, workspace_floats): dtypes and shapes of the results, absent ones marked,
// and the stages themselves, which every face calls:
//   resolve(problem, target): picks a kernel, or none, with every candidate's reason. Pure.
//   resolve_text(text, target): parses and validates first.
//   prepare(text, target): parses, validates and resolves the text, or finds it among those seen before: one lock-free
//     lookup by the text's bytes. Throws what validation throws, and UnsupportedError.
//   load(prepared, device): makes the kernel ready on CUDA's device of that ordinal. Idempotent.
//   run(prepared, args): checks the views against the problem (shapes, dtypes, memory) and runs the kernel.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "core/dtype.h"
#include "core/registry.h"
#include "core/small_problems.h"
#include "core/target.h"
#include "cuda/device_target.h"
#include "cuda/jit/jit.h"
#include "heed/ops.h"
#include "ops/stages.h"
#include "ops/views.h"

namespace heed {

// A problem of the op with the kernel that serves it: what a compiled program's text stands for.
template <class Op>
struct PreparedOp : Prepared<Kernel<typename Op::Problem, typename Op::Args>> {
  std::array<TensorSpec, Op::kResultNames.size()> results;
};

template <class Op>
struct ResolvedOp {
  typename Op::Problem problem;
  Resolution<Kernel<typename Op::Problem, typename Op::Args>> resolution;
  std::array<TensorSpec, Op::kResultNames.size()> results;
};

template <class Op, class Request>
ResolvedOp<Op> resolve_request(const Request& request, const Target& target) {
  ResolvedOp<Op> resolved;
  resolved.problem = validate(request);
  resolved.resolution = Op::resolve(resolved.problem, target);
  resolved.results = Op::result_specs(resolved.problem, resolved.resolution.workspace_per_head);
  return resolved;
}

template <class Op, class Request>
PreparedOp<Op> prepare_request(const Request& request, const Target& target) {
  ResolvedOp<Op> resolved = resolve_request<Op>(request, target);
  PreparedOp<Op> prepared;
  prepared.kernel = require_kernel(resolved.resolution, Op::kTitle, to_text(request), target);
  prepared.problem = std::move(resolved.problem);
  prepared.workspace_bytes = resolved.resolution.workspace_bytes;
  prepared.results = std::move(resolved.results);
  if (prepared.kernel->prepare != nullptr) prepared.state = prepared.kernel->prepare(prepared.problem);
  return prepared;
}

// Calls read(name, spec) for each tensor of a call in the order in which faces pass them, and stores the view that it
// returns.
template <class Op, class Read>
typename Op::Args read_views(const PreparedOp<Op>& prepared, const Read& read) {
  typename Op::Args args;
  const auto inputs = Op::inputs(args);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const TensorSpec& spec = prepared.problem.operands[i];
    if (spec.present) *inputs[i] = read(Op::Problem::kNames[i], spec);
  }
  const auto results = Op::results(args);
  for (size_t i = 0; i < results.size(); ++i) {
    if (prepared.results[i].present) *results[i] = read(Op::kResultNames[i], prepared.results[i]);
  }
  return args;
}

template <class Op>
Device device_of(const typename Op::Args& args) {
  return Op::inputs(const_cast<typename Op::Args&>(args))[0]->device;
}

template <class Op>
void load_op(const PreparedOp<Op>& prepared, int device) {
  if (prepared.kernel->load != nullptr) prepared.kernel->load(prepared.problem, prepared.state.get(), device);
}

template <class Op>
void run_op(const PreparedOp<Op>& prepared, const typename Op::Args& args) {
  auto& views = const_cast<typename Op::Args&>(args);
  const Device device = device_of<Op>(args);
  const std::string_view first = Op::Problem::kNames[0];
  const auto inputs = Op::inputs(views);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const TensorSpec& spec = prepared.problem.operands[i];
    if (!spec.present) continue;
    check_view(Op::Problem::kNames[i], *inputs[i], find_dtype(spec.dtype)->dtype, spec.shape, device, false, first);
  }
  const auto results = Op::results(views);
  for (size_t i = 0; i < results.size(); ++i) {
    const TensorSpec& spec = prepared.results[i];
    const std::string_view name = Op::kResultNames[i];
    if (Op::kHasWorkspace && i + 1 == results.size()) {
      // Its size as well: a compiled program may come from a version of heed that needed less.
      check_workspace(*results[i], prepared.workspace_bytes, device, first);
    } else if (spec.present) {
      check_view(name, *results[i], find_dtype(spec.dtype)->dtype, spec.shape, device, true, first);
    } else if (results[i]->defined()) {
      throw ValueError(std::string(name) + ": got a tensor, expected nothing for these inputs");
    }
  }
  prepared.kernel->run(prepared.problem, args, prepared.state.get());
}

// The request's operands, from the views.
template <class Op, class Request>
void set_operands(Request& request, const typename Op::Args& args) {
  const auto inputs = Op::inputs(const_cast<typename Op::Args&>(args));
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i] != nullptr) request.operands[i] = spec_of(Op::Problem::kNames[i], *inputs[i]);
  }
}

// The stages of a call from C++.
template <class Op, class Request>
void call_op(const Request& request, const typename Op::Args& args) {
  const Device device = device_of<Op>(args);
  // 1. Validate, 2. resolve, 3. plan: what a kernel derives from the problem. Its scratch memory is the caller's.
  const PreparedOp<Op> prepared = prepare_request<Op>(request, target_of(device));
  // 4. Launch.
  if (device.type == DeviceType::kCpu) {
    run_op<Op>(prepared, args);
  } else {
    const cuda::DeviceScope scope(device.index);  // the default stream is that of the current context
    run_op<Op>(prepared, args);
  }
}

template <class Op, class Request>
int64_t workspace_bytes_of(const Request& request, const typename Op::Args& args) {
  const Target target = target_of(device_of<Op>(args));
  const ResolvedOp<Op> resolved = resolve_request<Op>(request, target);
  require_kernel(resolved.resolution, Op::kTitle, to_text(request), target);
  return resolved.resolution.workspace_bytes;
}

}  // namespace heed
