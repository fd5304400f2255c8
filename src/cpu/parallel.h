// The one thread arena that every CPU kernel shares.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace heed::cpu {

// Calls body(i) once for every i in [0, count), each on some thread of the arena (or all on the caller's thread if
// `is_small`), handing out indices in increasing order: put the longest work first. Returns when all are done; the
// first exception is rethrown. Workers run with the caller's floating-point control state (FTZ/DAZ).
void parallel_for(int64_t count, bool is_small, const std::function<void(int64_t)>& body);

// `bytes` of 64-byte aligned scratch of this thread, reused by its next call and freed with the thread. Contents are
// undefined.
void* thread_scratch(size_t bytes);

}  // namespace heed::cpu
