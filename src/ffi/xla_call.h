// What heed's XLA custom calls share: handlers on XLA's C ABI for the CPU and for CUDA, which JAX registers by address.
// They read the problem's text in place.
//
// They do not go through jax_tvm_ffi: up to 0.1.3 that frees string attributes of more than 7 bytes before it calls the
// function that reads them.
//
// On CUDA a call has two stages. Before every run of a program XLA initialises its calls, never while it captures a
// CUDA graph: a program from another process finds its kernel there, and may compile and load it. To execute is to
// launch.
#pragma once

#include <string_view>

#include "cuda/device_target.h"
#include "ffi/xla_abi.h"
#include "heed/heed.h"

namespace heed::xla {

// The problem's text. Throws TypeError if the call has none.
std::string_view problem_of(const CallFrame& frame);

// The view of an operand or a result (an XLA buffer). They are row-major: the call asks for those layouts.
TensorView view_of(const void* pointer, Device device);

int cuda_device_of(const CallFrame& frame);
void* cuda_stream_of(const CallFrame& frame);

// The views of a call's tensors, one after the other.
class TensorReader {
 public:
  TensorReader(const Tensors& tensors, Device device) : tensors_(tensors), device_(device) {}
  TensorView next() { return view_of(tensors_.tensors[next_++], device_); }
  bool has_next() const { return next_ < tensors_.size; }

 private:
  const Tensors& tensors_;
  Device device_;
  int64_t next_ = 0;
};

// Throws TypeError unless the call has as many operands and results as its problem, or one result more where that may
// be.
void check_counts(const CallFrame& frame, int num_inputs, int num_outputs, bool may_have_workspace);

// Answers XLA's question for metadata, or runs `body`. C++ errors become XLA's.
Error* handle(CallFrame* frame, void (*body)(const CallFrame&));

// The two bodies. Op: prepare(text, target), load(prepared, device), args(prepared, frame, device), run(prepared,
// args), and kMayHaveWorkspace if a call may have a workspace after its outputs, or none.
template <class Op>
void check_counts_of(const CallFrame& frame, const auto& problem) {
  constexpr bool kMayHaveWorkspace = requires { Op::kMayHaveWorkspace; };
  check_counts(frame, problem.num_inputs(), problem.num_outputs(), kMayHaveWorkspace);
}

template <class Op>
void run_on_cpu(const CallFrame& frame) {
  static const Target kTarget = parse_target("cpu");
  const auto prepared = Op::prepare(problem_of(frame), kTarget);
  check_counts_of<Op>(frame, prepared->problem);
  Op::run(*prepared, Op::args(*prepared, frame, {}));
}

template <class Op>
void run_on_cuda(const CallFrame& frame) {
  const int device = cuda_device_of(frame);
  const auto prepared = Op::prepare(problem_of(frame), cuda_target(device));
  if (frame.stage == kInitialize) {
    Op::load(*prepared, device);
    return;
  }
  check_counts_of<Op>(frame, prepared->problem);
  auto args = Op::args(*prepared, frame, {DeviceType::kCuda, device});
  args.stream = cuda_stream_of(frame);
  Op::run(*prepared, args);
}

}  // namespace heed::xla
