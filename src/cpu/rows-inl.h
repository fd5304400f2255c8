// Pieces of rows between memory and a kernel's loops: gathered and scattered where elements are not adjacent, written
// past the caches where a call is large.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ROWS_INL_H_
#undef HEED_CPU_ROWS_INL_H_
#else
#define HEED_CPU_ROWS_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "core/dtype.h"
#include "cpu/convert-inl.h"
#include "cpu/row_memory.h"
#include "hwy/cache_control.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Calls f with the storage type of a floating-point dtype.
template <class F>
void with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Float32());
    case DType::kFloat16:
      return f(Float16());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kInt32:
      return;  // validated away
  }
}

// Calls op(d, index) on vectors that cover [0, count), each element once: the last ones one by one.
template <class D, class Op>
HWY_INLINE void for_vectors_once(D d, size_t count, const Op& op) {
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) op(d, i);
  const hn::CappedTag<hn::TFromD<D>, 1> d1;
  for (; i < count; ++i) op(d1, i);
}

// Asks for what will be read soon. Hardware prefetchers follow every row, but arithmetic between the loads leaves them
// too few requests ahead: 1.1 to 1.3 times the speed at large sizes. `kBytes` at `from` are the loop's current ones.
template <size_t kBytes>
HWY_INLINE void prefetch_ahead(const void* from) {
  constexpr size_t kAhead = 3072;
  constexpr size_t kLine = 64;
  HEED_UNROLL for (size_t x = 0; x < kBytes; x += kLine) {
    __builtin_prefetch(static_cast<const char*>(from) + kAhead + x);
  }
}

// `count` elements at `row`, `stride` apart, as adjacent ones: in place, or copied to `buffer` [count].
template <class Stored>
HWY_INLINE const Stored* gathered(const Stored* row, int64_t stride, int64_t count, Stored* buffer) {
  if (stride == 1) return row;
  for (int64_t x = 0; x < count; ++x) buffer[x] = row[x * stride];
  return buffer;
}

// `bytes` from -> to past the caches. The thread must call hwy::FlushStream() before others read them.
inline HWY_NOINLINE void stream_bytes(const void* from, void* to, size_t bytes) {
  const auto* source = static_cast<const uint8_t*>(from);
  auto* target = static_cast<uint8_t*>(to);
  const hn::ScalableTag<uint8_t> d;
  const size_t lanes = hn::Lanes(d);
  constexpr size_t kLine = 64;
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(target) % kLine) % kLine;
  if (lanes < 16 || bytes < 2 * kLine) {
    std::memcpy(target, source, bytes);
    return;
  }
  std::memcpy(target, source, head);
  size_t at = head;
  for (; at + lanes <= bytes; at += lanes) hn::Stream(hn::LoadU(d, source + at), d, target + at);
  std::memcpy(target + at, source + at, bytes - at);
}

// Where a kernel writes a piece of a row, and how it gets to its place.
template <class Stored>
class RowWriter {
 public:
  // `buffer`, as long as the piece, is used where the row cannot be written in place.
  RowWriter(int64_t stride, bool is_streaming, Stored* buffer)
      : stride_(stride), is_streaming_(is_streaming), buffer_(buffer) {}
  HWY_INLINE Stored* begin(Stored* row) const { return stride_ == 1 && !is_streaming_ ? row : buffer_; }
  HWY_INLINE void end(Stored* row, int64_t count) const {
    if (stride_ != 1) {
      for (int64_t x = 0; x < count; ++x) row[x * stride_] = buffer_[x];
    } else if (is_streaming_) {
      stream_bytes(buffer_, row, static_cast<size_t>(count) * sizeof(Stored));
    }
  }

 private:
  int64_t stride_;
  bool is_streaming_;
  Stored* buffer_;
};

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ROWS_INL_H_
