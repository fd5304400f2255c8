// The XLA custom call "heed.attention_fwd.v1": handlers on XLA's C ABI for the CPU and for CUDA, which JAX registers by
// address. They read the problem's text in place.
//
// They do not go through jax_tvm_ffi: up to 0.1.3 that frees string attributes of more than 7 bytes before it calls the
// function that reads them.
//
// On CUDA a call has two stages. Before every run of a program XLA initialises its calls, never while it captures a
// CUDA graph: a program from another process finds its kernel there, and may compile and load it. To execute is to
// launch.
#include <string>
#include <string_view>

#include "core/dtype.h"
#include "cuda/device_target.h"
#include "ffi/xla_abi.h"
#include "ops/attention_fwd.h"

namespace {

namespace xla = heed::xla;

xla::Error* make_error(const xla::Api* api, xla::ErrorCode code, const char* message) {
  xla::ErrorCreateArgs args{sizeof(xla::ErrorCreateArgs), nullptr, message, code};
  return api->create_error(&args);
}

// Whether the call only asks for metadata, which is then filled in.
bool answers_metadata(xla::Extension* extension) {
  if (extension == nullptr || extension->type != xla::kMetadataExtension) return false;
  xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(extension)->metadata;
  metadata.api_version = {sizeof(xla::ApiVersion), nullptr, xla::kApiMajor, xla::kApiMinor};
  metadata.traits = xla::kCommandBufferCompatible;
  return true;
}

// An error of XLA's own, to be handed back to it.
struct XlaError {
  xla::Error* error;
};

void check(xla::Error* error) {
  if (error != nullptr) throw XlaError{error};
}

std::string_view string_attribute(const xla::Attributes& attributes, std::string_view name) {
  for (int64_t i = 0; i < attributes.size; ++i) {
    const xla::ByteSpan& found = *attributes.names[i];
    if (std::string_view(found.data, found.size) != name) continue;
    if (attributes.types[i] != xla::kStringAttr) break;
    const auto* text = static_cast<const xla::ByteSpan*>(attributes.values[i]);
    return {text->data, text->size};
  }
  throw heed::TypeError("heed.attention_fwd.v1: the call has no string attribute " + std::string(name));
}

heed::DType dtype_of(xla::DataType dtype) {
  switch (dtype) {
    case xla::kF32:
      return heed::DType::kFloat32;
    case xla::kF16:
      return heed::DType::kFloat16;
    case xla::kBF16:
      return heed::DType::kBFloat16;
    case xla::kS32:
      return heed::DType::kInt32;
  }
  throw heed::TypeError("heed.attention_fwd.v1: got XLA dtype " + std::to_string(dtype) + ", which heed lacks");
}

// XLA's buffers are row-major: the call asks for those layouts.
heed::TensorView view_of(const void* pointer, heed::Device device) {
  const auto& buffer = *static_cast<const xla::Buffer*>(pointer);
  if (buffer.rank > heed::kMaxRank) throw heed::ValueError("heed.attention_fwd.v1: got rank above kMaxRank");
  heed::TensorView view;
  view.data = buffer.data;
  view.device = device;
  view.dtype = dtype_of(buffer.dtype);
  view.rank = static_cast<int32_t>(buffer.rank);
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = buffer.dims[i];
    view.strides[i] = stride;
    stride *= buffer.dims[i];
  }
  return view;
}

heed::AttentionForwardArgs args_of(const xla::CallFrame& frame, const heed::AttentionProblem& problem,
                                   heed::Device device) {
  if (frame.args.size != problem.num_inputs() || frame.rets.size != problem.num_outputs()) {
    throw heed::TypeError("heed.attention_fwd.v1: the call's operands or results are not those of its problem");
  }
  heed::AttentionForwardArgs args;
  const heed::AttentionInputs inputs = heed::inputs_of(args);
  int64_t next = 0;
  for (int i = 0; i < heed::kNumAttentionInputs; ++i) {
    if (problem.operands[i].present) *inputs[i] = view_of(frame.args.tensors[next++], device);
  }
  args.out = view_of(frame.rets.tensors[0], device);
  if (problem.wants_lse) args.lse = view_of(frame.rets.tensors[1], device);
  return args;
}

void run_on_cpu(const xla::CallFrame& frame) {
  static const heed::Target kTarget = heed::parse_target("cpu");
  const auto prepared = heed::prepare_attention_fwd(string_attribute(frame.attrs, "problem"), kTarget);
  heed::run_attention_fwd(*prepared, args_of(frame, prepared->problem, {}));
}

int cuda_device_of(const xla::CallFrame& frame) {
  xla::DeviceOrdinalGetArgs args{sizeof(xla::DeviceOrdinalGetArgs), nullptr, frame.context, -1};
  check(frame.api->get_device_ordinal(&args));
  return args.device_ordinal;
}

void* cuda_stream_of(const xla::CallFrame& frame) {
  xla::StreamGetArgs args{sizeof(xla::StreamGetArgs), nullptr, frame.context, nullptr};
  check(frame.api->get_stream(&args));
  return args.stream;
}

void run_on_cuda(const xla::CallFrame& frame) {
  const int device = cuda_device_of(frame);
  const auto prepared =
      heed::prepare_attention_fwd(string_attribute(frame.attrs, "problem"), heed::cuda_target(device));
  if (frame.stage == xla::kInitialize) {
    heed::load_attention_fwd(*prepared, device);
    return;
  }
  heed::AttentionForwardArgs args = args_of(frame, prepared->problem, {heed::DeviceType::kCuda, device});
  args.stream = cuda_stream_of(frame);
  heed::run_attention_fwd(*prepared, args);
}

// Runs `body` unless XLA only asks for metadata. C++ errors become XLA's.
xla::Error* handle(xla::CallFrame* frame, void (*body)(const xla::CallFrame&)) {
  if (answers_metadata(frame->extensions)) return nullptr;
  try {
    body(*frame);
    return nullptr;
  } catch (const XlaError& error) {
    return error.error;
  } catch (const heed::UnsupportedError& error) {
    return make_error(frame->api, xla::kUnimplemented, error.what());
  } catch (const heed::ValueError& error) {
    return make_error(frame->api, xla::kInvalidArgument, error.what());
  } catch (const heed::TypeError& error) {
    return make_error(frame->api, xla::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return make_error(frame->api, xla::kInternal, error.what());
  } catch (...) {
    return make_error(frame->api, xla::kInternal, "heed.attention_fwd.v1: unknown exception");
  }
}

}  // namespace

extern "C" HEED_API xla::Error* heed_xla_attention_fwd(xla::CallFrame* frame) { return handle(frame, run_on_cpu); }

// For both stages.
extern "C" HEED_API xla::Error* heed_xla_attention_fwd_cuda(xla::CallFrame* frame) {
  return handle(frame, run_on_cuda);
}
