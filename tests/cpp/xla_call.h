// XLA's side of heed's custom call, made by hand: an API that knows one stream and one device, and a call frame.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/attention_bwd_problem.h"
#include "core/problem.h"
#include "core/target.h"
#include "ffi/xla_abi.h"
#include "heed/heed.h"
#include "ops/attention_bwd.h"
#include "ops/attention_fwd.h"

namespace heed::xla {

struct Error {
  ErrorCode code;
  std::string message;
};

}  // namespace heed::xla

extern "C" heed::xla::Error* heed_xla_attention_fwd(heed::xla::CallFrame* frame);
extern "C" heed::xla::Error* heed_xla_attention_fwd_cuda(heed::xla::CallFrame* frame);
extern "C" heed::xla::Error* heed_xla_attention_bwd(heed::xla::CallFrame* frame);
extern "C" heed::xla::Error* heed_xla_attention_bwd_cuda(heed::xla::CallFrame* frame);

namespace heed::test {

// One call of attention, forward or backward, or of what has the operands and results that are given. Otherwise these
// are those of the problem, and the workspace that of the target. Their memory is the caller's.
class XlaCall {
 public:
  explicit XlaCall(std::string text, std::string_view target = "sm_90a") : text_(std::move(text)) {
    if (text_.starts_with(kAttentionBwdSchema)) {
      add_backward(validate(parse_attention_bwd_request(text_)), parse_target(target));
    } else {
      add_forward(validate(parse_attention_request(text_)), parse_target(target));
    }
    make_frame();
  }
  XlaCall(std::string text, std::span<const TensorSpec> operands, std::span<const TensorSpec> results)
      : text_(std::move(text)) {
    for (const TensorSpec& spec : operands) add(arguments_, spec);
    for (const TensorSpec& spec : results) add(results_, spec);
    make_frame();
  }
  XlaCall(const XlaCall&) = delete;
  XlaCall& operator=(const XlaCall&) = delete;

  void* stream = nullptr;
  int device = 0;

  xla::Api& api() { return api_; }
  xla::CallFrame& frame(xla::Stage stage) {
    frame_.stage = stage;
    return frame_;
  }
  struct Tensor {
    std::vector<int64_t> dims;
    int64_t bytes = 0;
    xla::Buffer buffer{};
  };
  std::vector<std::unique_ptr<Tensor>>& arguments() { return arguments_.tensors; }
  std::vector<std::unique_ptr<Tensor>>& results() { return results_.tensors; }

 private:
  struct Tensors {
    std::vector<std::unique_ptr<Tensor>> tensors;
    std::vector<void*> pointers;
    std::vector<int> types;
  };

  void make_frame() {
    api_.struct_size = sizeof(xla::Api);
    api_.version = {sizeof(xla::ApiVersion), nullptr, xla::kApiMajor, xla::kApiMinor};
    api_.create_error = [](xla::ErrorCreateArgs* args) { return new xla::Error{args->code, args->message}; };
    api_.get_stream = [](xla::StreamGetArgs* args) -> xla::Error* {
      args->stream = static_cast<XlaCall*>(args->context)->stream;
      return nullptr;
    };
    api_.get_device_ordinal = [](xla::DeviceOrdinalGetArgs* args) -> xla::Error* {
      args->device_ordinal = static_cast<XlaCall*>(args->context)->device;
      return nullptr;
    };
    frame_.struct_size = sizeof(xla::CallFrame);
    frame_.api = &api_;
    frame_.context = this;
    point_to(frame_.args, arguments_);
    point_to(frame_.rets, results_);
    attribute_text_ = {text_.data(), text_.size()};
    frame_.attrs = {sizeof(xla::Attributes), nullptr, 1, &attribute_type_, &attribute_names_, &attribute_values_};
  }

  void add_forward(const AttentionProblem& problem, const Target& target) {
    for (const TensorSpec& spec : problem.operands) add(arguments_, spec);
    add(results_, problem.operands[kQ].dtype, problem.out_shape());
    if (problem.wants_lse) add(results_, "float32", problem.lse_shape());
    const int64_t floats = resolve(problem, target).workspace_per_head;
    if (floats > 0) add(results_, "float32", problem.workspace_shape(floats));
  }

  void add_backward(const AttentionBwdProblem& problem, const Target& target) {
    for (int i = 0; i < kNumAttentionBwdInputs; ++i) add(arguments_, problem.operand(i));
    for (const TensorSpec& spec : problem.gradients) add(results_, spec);
    add(results_, "float32", problem.workspace_shape(resolve(problem, target).workspace_per_head));
  }

  static void add(Tensors& list, const TensorSpec& spec) {
    if (spec.present) add(list, spec.dtype, spec.shape);
  }

  static void add(Tensors& list, const std::string& dtype, const std::vector<int64_t>& shape) {
    auto tensor = std::make_unique<Tensor>();
    tensor->dims = shape;
    const bool is_16_bits = dtype == "float16" || dtype == "bfloat16";
    tensor->bytes = is_16_bits ? 2 : 4;
    for (int64_t size : shape) tensor->bytes *= size;
    const xla::DataType type = dtype == "float16"    ? xla::kF16
                               : dtype == "bfloat16" ? xla::kBF16
                               : dtype == "int32"    ? xla::kS32
                                                     : xla::kF32;
    tensor->buffer = {sizeof(xla::Buffer), nullptr, type, nullptr, static_cast<int64_t>(shape.size()),
                      tensor->dims.data()};
    list.pointers.push_back(&tensor->buffer);
    list.types.push_back(1);
    list.tensors.push_back(std::move(tensor));
  }

  static void point_to(xla::Tensors& tensors, Tensors& list) {
    tensors = {sizeof(xla::Tensors), nullptr, static_cast<int64_t>(list.tensors.size()), list.types.data(),
               list.pointers.data()};
  }

  std::string text_;
  Tensors arguments_;
  Tensors results_;
  xla::Api api_{};
  xla::CallFrame frame_{};
  xla::ByteSpan attribute_text_{};
  xla::ByteSpan attribute_name_{"problem", 7};
  xla::ByteSpan* attribute_names_ = &attribute_name_;
  void* attribute_values_ = &attribute_text_;
  xla::AttrType attribute_type_ = xla::kStringAttr;
};

}  // namespace heed::test
