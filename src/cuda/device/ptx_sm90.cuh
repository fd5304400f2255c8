// One wrapper per PTX instruction that sm_90a has beyond ptx.cuh: barriers in shared memory that count arrivals and
// bytes, tensor copies, the warpgroup's products and what goes with them.
#pragma once

#include "cuda/device/memory.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/wgmma_tiles.cuh"
#include "cuda/tensor_map.h"

namespace heed::cuda::ptx {

// A barrier of 8 bytes of shared memory: a phase ends with so many arrivals and all bytes that were expected.
__device__ __forceinline__ void mbarrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes new barriers known to tensor copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and the phase waits for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32 barrier, int num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}
// Until the phase of this parity has ended. A new barrier is in phase 0, and phase -1, of parity 1, has ended.
__device__ __forceinline__ void mbarrier_wait(uint32 barrier, uint32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(barrier),
      "r"(parity)
      : "memory");
}
// Whether it has.
__device__ __forceinline__ bool mbarrier_has_ended(uint32 barrier, uint32 parity) {
  uint32 has_ended;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(has_ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return has_ended != 0;
}

// What was written to shared memory before can be read by tensor copies and warpgroup products.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Has the map at hand for copies.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Copies the map's box at these coordinates (elements; the innermost axis first) to shared memory, zeros where the
// tensor ends, and counts the bytes of the whole box on the barrier.
__device__ __forceinline__ void tma_load(uint32 to, const TensorMap& map, uint32 barrier, int c0, int c1, int c2,
                                         int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint32 to, const TensorMap& map, uint32 barrier, int c0, int c1, int c2,
                                         int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// Copies a box from shared memory, without what lies outside of the tensor.
__device__ __forceinline__ void tma_store(const TensorMap& map, uint32 from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap& map, uint32 from, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// Stores of this thread since the last commit become a group.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but kPending groups of this thread have been read from shared memory, or written to global memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Registers move between warpgroups; each instruction is executed by a whole one.
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 * m + r gives the address of row r of matrix m.
__device__ __forceinline__ void stmatrix_x4(uint32 to, uint32 a, uint32 b, uint32 c, uint32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// Lane 0 alone stores. A predicate by hand: behind a branch, the compiler spills registers of kernels that are full.
__device__ __forceinline__ void store_byte_of_lane_0(int lane, uint32 to, uint32 value) {
  asm volatile(
      "{\n.reg .pred is_first;\n"
      "setp.eq.s32 is_first, %0, 0;\n"
      "@is_first st.shared.u8 [%1], %2;\n}" ::"r"(lane),
      "r"(to), "r"(value)
      : "memory");
}

// The number that the counter had.
__device__ __forceinline__ uint32 take_tile(unsigned* counter) {
  uint32 number;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(number) : "l"(counter) : "memory");
  return number;
}

// Flags that say that something has been written. What was written before the store, by this thread or by others that
// it has met since, is known to those who have loaded what it stored, and to those whom they meet.
__device__ __forceinline__ void store_release(uint64* to, uint64 value) {
  asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ uint64 load_acquire(const uint64* from) {
  uint64 value;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

// 16 bytes of memory, at a multiple of 16, become `wanted` if they are `expected`, all at once; what they were.
__device__ __forceinline__ uint4 compare_and_swap_16(void* at, uint4 expected, uint4 wanted) {
  uint4 found;
  asm volatile(
      "{\n.reg .b128 expected, wanted, found;\nmov.b128 expected, {%5, %6};\nmov.b128 wanted, {%7, %8};\n"
      "atom.relaxed.gpu.global.cas.b128 found, [%4], expected, wanted;\n.reg .b64 low, high;\n"
      "mov.b128 {low, high}, found;\nmov.b64 {%0, %1}, low;\nmov.b64 {%2, %3}, high;\n}"
      : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
      : "l"(at), "l"(expected.x | static_cast<uint64>(expected.y) << 32),
        "l"(expected.z | static_cast<uint64>(expected.w) << 32), "l"(wanted.x | static_cast<uint64>(wanted.y) << 32),
        "l"(wanted.z | static_cast<uint64>(wanted.w) << 32)
      : "memory");
  return found;
}

// a * b + c of two 16-bit numbers each.
__device__ __forceinline__ uint32 multiply_add_bf16(uint32 a, uint32 b, uint32 c) {
  uint32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32 multiply_add_f16(uint32 a, uint32 b, uint32 c) {
  uint32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Ends the kernel with an error.
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// ---------------------------------------------------------------------------------------------------------------------
// Warpgroup products: d[64 x N] (+)= a[64 x 16] b[16 x N], asynchronous. d lies in registers of 128 threads: warp w of
// the four has rows 16 w to 16 w + 15, and d[4 i + e] is element e of their i-th 16 x 8 tile, as mma.sync has it
// (element.cuh). a lies in registers, as mma.sync's operand, or in shared memory; b in shared memory.
//
// The order is wgmma_fence (what was written to registers before may be read), products, wgmma_commit and wgmma_wait,
// before which the group's registers must not be touched. Where the compiler cannot see that, it serialises all
// products of a kernel: each is one statement that has all its accumulators as operands.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The compiler moves no use of these registers across this.
template <int kSize>
__device__ __forceinline__ void pin(float (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
// Until all groups but the kPending newest are done; `registers` are those that may be touched afterwards.
template <int kPending, class... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (pin(registers), ...);
}

// The instructions of one shape; the numbers are those of the operands after the accumulators.
template <int kColumns>
struct Wgmma;

#define HEED_WGMMA_OPEN(last, columns, type) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #last ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type
#define HEED_WGMMA_RS(columns, type, n0, n1, n2, n3, n4, n5, n6)                                                   \
  asm volatile(HEED_WGMMA_OPEN(n5, columns, type) " {" HEED_NUMBERS_##n0 "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 \
                                                                         "}, %" #n4 ", p, 1, 1, %" #n6 ";\n}"      \
               : HEED_FLOATS_##n0(d, 0)                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulates ? 1 : 0), "n"(kIsNMajor ? 1 : 0))
#define HEED_WGMMA_SS(columns, type, n0, n1, n2)                                                                    \
  asm volatile(HEED_WGMMA_OPEN(n2, columns, type) " {" HEED_NUMBERS_##n0 "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, 0;\n}" \
               : HEED_FLOATS_##n0(d, 0)                                                                             \
               : "l"(a), "l"(b), "r"(accumulates ? 1 : 0))
#define HEED_WGMMA(columns, n0, n1, n2, n3, n4, n5, n6)                                                           \
  template <>                                                                                                     \
  struct Wgmma<columns> {                                                                                         \
    template <bool kIsBf16, bool kIsNMajor>                                                                       \
    static __device__ __forceinline__ void rs(float (&d)[n0], const uint32 (&a)[4], uint64 b, bool accumulates) { \
      if constexpr (kIsBf16) {                                                                                    \
        HEED_WGMMA_RS(columns, "bf16", n0, n1, n2, n3, n4, n5, n6);                                               \
      } else {                                                                                                    \
        HEED_WGMMA_RS(columns, "f16", n0, n1, n2, n3, n4, n5, n6);                                                \
      }                                                                                                           \
    }                                                                                                             \
    template <bool kIsBf16>                                                                                       \
    static __device__ __forceinline__ void ss(float (&d)[n0], uint64 a, uint64 b, bool accumulates) {             \
      if constexpr (kIsBf16) {                                                                                    \
        HEED_WGMMA_SS(columns, "bf16", n0, n1, n2);                                                               \
      } else {                                                                                                    \
        HEED_WGMMA_SS(columns, "f16", n0, n1, n2);                                                                \
      }                                                                                                           \
    }                                                                                                             \
  }

#define HEED_FLOATS_8(d, i)                                                                                         \
  "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), "+f"((d)[(i) + 4]), "+f"((d)[(i) + 5]), \
      "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define HEED_FLOATS_32(d, i) \
  HEED_FLOATS_8(d, i), HEED_FLOATS_8(d, (i) + 8), HEED_FLOATS_8(d, (i) + 16), HEED_FLOATS_8(d, (i) + 24)
#define HEED_FLOATS_40(d, i) HEED_FLOATS_32(d, i), HEED_FLOATS_8(d, (i) + 32)
#define HEED_FLOATS_48(d, i) HEED_FLOATS_40(d, i), HEED_FLOATS_8(d, (i) + 40)
#define HEED_FLOATS_64(d, i) HEED_FLOATS_32(d, i), HEED_FLOATS_32(d, (i) + 32)
#define HEED_FLOATS_96(d, i) HEED_FLOATS_64(d, i), HEED_FLOATS_32(d, (i) + 64)
#define HEED_FLOATS_128(d, i) HEED_FLOATS_64(d, i), HEED_FLOATS_64(d, (i) + 64)
#define HEED_NUMBERS_32                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define HEED_NUMBERS_40 HEED_NUMBERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define HEED_NUMBERS_48 HEED_NUMBERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define HEED_NUMBERS_64 \
  HEED_NUMBERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HEED_NUMBERS_96                                                                          \
  HEED_NUMBERS_64                                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define HEED_NUMBERS_128                                                                           \
  HEED_NUMBERS_96                                                                                  \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

HEED_WGMMA(64, 32, 33, 34, 35, 36, 37, 38);
HEED_WGMMA(80, 40, 41, 42, 43, 44, 45, 46);
HEED_WGMMA(96, 48, 49, 50, 51, 52, 53, 54);
HEED_WGMMA(128, 64, 65, 66, 67, 68, 69, 70);
HEED_WGMMA(192, 96, 97, 98, 99, 100, 101, 102);
HEED_WGMMA(256, 128, 129, 130, 131, 132, 133, 134);

// a in registers; b k-major, or n-major where its rows are those of k.
template <bool kIsBf16, bool kIsNMajor, int kSize>
__device__ __forceinline__ void wgmma_rs(float (&d)[kSize], const uint32 (&a)[4], uint64 b, bool accumulates) {
  Wgmma<2 * kSize>::template rs<kIsBf16, kIsNMajor>(d, a, b, accumulates);
}
// Both in shared memory and k-major.
template <bool kIsBf16, int kSize>
__device__ __forceinline__ void wgmma_ss(float (&d)[kSize], uint64 a, uint64 b, bool accumulates) {
  Wgmma<2 * kSize>::template ss<kIsBf16>(d, a, b, accumulates);
}

#undef HEED_WGMMA
#undef HEED_WGMMA_OPEN
#undef HEED_WGMMA_RS
#undef HEED_WGMMA_SS

}  // namespace heed::cuda::ptx
