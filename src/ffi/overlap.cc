// Whether views share memory, from their starts, shapes and strides.
#include "ffi/overlap.h"

#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace heed::ffi {
namespace {

// Bytes that follow each other. Unsigned: what a caller hands over may be any numbers, and is checked elsewhere.
struct Bytes {
  uint64_t begin, count;
};

uint64_t stride_bytes(const TensorView& view, int axis) {
  return static_cast<uint64_t>(view.strides[axis]) * static_cast<uint64_t>(info(view.dtype).size_bytes);
}

bool is_negative(uint64_t stride) { return stride >> 63 != 0; }
uint64_t magnitude(uint64_t stride) { return is_negative(stride) ? -stride : stride; }

// The view's first to last byte. With a modulus, axes whose strides are multiples of it are left out.
Bytes span_of(const TensorView& view, uint64_t modulus = 0) {
  Bytes bytes{reinterpret_cast<uintptr_t>(view.data), static_cast<uint64_t>(info(view.dtype).size_bytes)};
  for (int axis = 0; axis < view.rank; ++axis) {
    const uint64_t stride = stride_bytes(view, axis);
    if (modulus != 0 && magnitude(stride) % modulus == 0) continue;
    const uint64_t reach = magnitude(stride) * static_cast<uint64_t>(view.shape[axis] - 1);
    if (is_negative(stride)) bytes.begin -= reach;
    bytes.count += reach;
  }
  return bytes;
}

bool has_bytes(const TensorView& view) {
  if (!view.defined() || view.data == nullptr) return false;
  for (int axis = 0; axis < view.rank; ++axis) {
    if (view.shape[axis] <= 0) return false;
  }
  return true;
}

// Whether the two take turns: all their bytes differ in what remains of addresses modulo a stride.
bool alternate(const TensorView& a, const TensorView& b, uint64_t modulus) {
  if (modulus == 0) return false;
  const Bytes of_a = span_of(a, modulus), of_b = span_of(b, modulus);
  const uint64_t from_a_to_b = (of_b.begin % modulus + modulus - of_a.begin % modulus) % modulus;
  return of_a.count <= from_a_to_b && of_b.count <= modulus - from_a_to_b;
}

bool share_memory(const TensorView& a, const TensorView& b) {
  if (!has_bytes(a) || !has_bytes(b) || !(a.device == b.device)) return false;
  const Bytes of_a = span_of(a), of_b = span_of(b);
  if (of_a.begin + of_a.count <= of_b.begin || of_b.begin + of_b.count <= of_a.begin) return false;
  for (const TensorView* view : {&a, &b}) {
    for (int axis = 0; axis < view->rank; ++axis) {
      if (view->shape[axis] > 1 && alternate(a, b, magnitude(stride_bytes(*view, axis)))) return false;
    }
  }
  return true;
}

bool is_same(const TensorView& a, const TensorView& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.rank != b.rank) return false;
  for (int axis = 0; axis < a.rank; ++axis) {
    if (a.shape[axis] != b.shape[axis]) return false;
    if (a.shape[axis] != 1 && a.strides[axis] != b.strides[axis]) return false;
  }
  return true;
}

void check_apart(const NamedView& output, const NamedView& other) {
  if (!share_memory(output.view, other.view)) return;
  if (output.may_be == other.name && is_same(output.view, other.view)) return;
  std::string message = std::string(output.name) + ": got memory that it shares with " + std::string(other.name) +
                        ", expected memory of its own";
  if (!output.may_be.empty()) {
    message += ", or exactly " + std::string(output.may_be) + ": the same start, shape and strides";
  }
  throw ValueError(message);
}

}  // namespace

void check_memory(std::initializer_list<NamedView> inputs, std::initializer_list<NamedView> outputs) {
  for (const NamedView* output = outputs.begin(); output != outputs.end(); ++output) {
    for (const NamedView& input : inputs) check_apart(*output, input);
    for (const NamedView* other = outputs.begin(); other != output; ++other) check_apart(*output, *other);
  }
}

}  // namespace heed::ffi
