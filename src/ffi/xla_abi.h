// The part of XLA's FFI C ABI (major 0, minor 3 and later) that heed's custom calls use, as layouts.
//
// jaxlib ships the official header (xla/ffi/api/c_api.h), but its type names change between versions and a build would
// need all of jaxlib for it. The layouts are an ABI: they do not change within a major version, and
// tests/test_xla_abi.py compares every struct below with the header of the installed jaxlib.
#pragma once

#include <cstddef>
#include <cstdint>

namespace heed::xla {

inline constexpr int kApiMajor = 0;
inline constexpr int kApiMinor = 3;  // the oldest that has all of this: JAX 0.10

enum ExtensionType : int { kMetadataExtension = 1 };

struct Extension {
  size_t struct_size;
  ExtensionType type;
  Extension* next;
};

struct ApiVersion {
  size_t struct_size;
  Extension* extensions;
  int major_version;  // out
  int minor_version;  // out
};

struct Error;  // opaque

enum ErrorCode : int { kInvalidArgument = 3, kUnimplemented = 12, kInternal = 13 };

struct ErrorCreateArgs {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

struct StreamGetArgs {
  size_t struct_size;
  Extension* extensions;
  void* context;
  void* stream;  // out: a CUstream
};

struct DeviceOrdinalGetArgs {
  size_t struct_size;
  Extension* extensions;
  void* context;
  int32_t device_ordinal;  // out: CUDA's ordinal of the device that the program runs on
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  ApiVersion version;
  const void* internal_api;
  Error* (*create_error)(ErrorCreateArgs*);
  void* skipped_1[3];
  Error* (*get_stream)(StreamGetArgs*);
  void* skipped_2[12];
  Error* (*get_device_ordinal)(DeviceOrdinalGetArgs*);
  // More functions may follow.
};

enum DataType : int { kS32 = 4, kF16 = 10, kF32 = 11, kBF16 = 16 };

struct Buffer {
  size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;  // [rank]
};

enum AttrType : int { kStringAttr = 4 };

struct ByteSpan {
  const char* data;
  size_t size;
};

// Operands, and results.
struct Tensors {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  int* types;      // [size]: buffers all
  void** tensors;  // [size] of Buffer
};

struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  AttrType* types;   // [size]
  ByteSpan** names;  // [size]
  void** values;     // [size]: a ByteSpan where the type is a string
};

// Before each run of a program that holds the call, and for each run of the call (or once, to capture it).
enum Stage : int { kInitialize = 2, kExecute = 3 };

struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  void* context;
  Stage stage;
  Tensors args;
  Tensors rets;
  Attributes attrs;
  // More follows.
};

// XLA asks a handler what it was built for by a call whose frame carries this extension.
enum HandlerTraits : uint32_t { kCommandBufferCompatible = 1 };  // may be captured into a CUDA graph

struct Metadata {
  size_t struct_size;
  ApiVersion api_version;
  uint32_t traits;
  int64_t state_type_id;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

}  // namespace heed::xla
