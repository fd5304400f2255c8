// What heed's XLA custom calls share.
#include "ffi/xla_call.h"

#include <string>

namespace heed::xla {
namespace {

Error* make_error(const Api* api, ErrorCode code, const char* message) {
  ErrorCreateArgs args{sizeof(ErrorCreateArgs), nullptr, message, code};
  return api->create_error(&args);
}

// Whether the call only asks for metadata, which is then filled in.
bool answers_metadata(Extension* extension) {
  if (extension == nullptr || extension->type != kMetadataExtension) return false;
  Metadata& metadata = *reinterpret_cast<MetadataExtension*>(extension)->metadata;
  metadata.api_version = {sizeof(ApiVersion), nullptr, kApiMajor, kApiMinor};
  metadata.traits = kCommandBufferCompatible;
  return true;
}

// An error of XLA's own, to be handed back to it.
struct XlaError {
  Error* error;
};

void check(Error* error) {
  if (error != nullptr) throw XlaError{error};
}

DType dtype_of(DataType dtype) {
  switch (dtype) {
    case kF32:
      return DType::kFloat32;
    case kF16:
      return DType::kFloat16;
    case kBF16:
      return DType::kBFloat16;
    case kS32:
      return DType::kInt32;
  }
  throw TypeError("heed: got XLA dtype " + std::to_string(dtype) + ", which heed lacks");
}

}  // namespace

std::string_view problem_of(const CallFrame& frame) {
  const Attributes& attributes = frame.attrs;
  for (int64_t i = 0; i < attributes.size; ++i) {
    const ByteSpan& found = *attributes.names[i];
    if (std::string_view(found.data, found.size) != "problem") continue;
    if (attributes.types[i] != kStringAttr) break;
    const auto* text = static_cast<const ByteSpan*>(attributes.values[i]);
    return {text->data, text->size};
  }
  throw TypeError("heed: the call has no string attribute problem");
}

TensorView view_of(const void* pointer, Device device) {
  const auto& buffer = *static_cast<const Buffer*>(pointer);
  if (buffer.rank > kMaxRank) throw ValueError("heed: got rank above kMaxRank");
  TensorView view;
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

int cuda_device_of(const CallFrame& frame) {
  DeviceOrdinalGetArgs args{sizeof(DeviceOrdinalGetArgs), nullptr, frame.context, -1};
  check(frame.api->get_device_ordinal(&args));
  return args.device_ordinal;
}

void* cuda_stream_of(const CallFrame& frame) {
  StreamGetArgs args{sizeof(StreamGetArgs), nullptr, frame.context, nullptr};
  check(frame.api->get_stream(&args));
  return args.stream;
}

void check_counts(const CallFrame& frame, int num_inputs, int num_outputs, bool may_have_workspace) {
  const int64_t num_more = frame.rets.size - num_outputs;
  if (frame.args.size == num_inputs && (num_more == 0 || (num_more == 1 && may_have_workspace))) return;
  throw TypeError("heed: the call's operands or results are not those of its problem");
}

Error* handle(CallFrame* frame, void (*body)(const CallFrame&)) {
  if (answers_metadata(frame->extensions)) return nullptr;
  try {
    body(*frame);
    return nullptr;
  } catch (const XlaError& error) {
    return error.error;
  } catch (const UnsupportedError& error) {
    return make_error(frame->api, kUnimplemented, error.what());
  } catch (const ValueError& error) {
    return make_error(frame->api, kInvalidArgument, error.what());
  } catch (const TypeError& error) {
    return make_error(frame->api, kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return make_error(frame->api, kInternal, error.what());
  } catch (...) {
    return make_error(frame->api, kInternal, "heed: unknown exception");
  }
}

}  // namespace heed::xla
