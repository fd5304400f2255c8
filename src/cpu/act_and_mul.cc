// CPU gated activations, forward and backward.
//
// Where the time and the bytes go
// -------------------------------
// An output element is 2 elements read, 1 written and some 30 instructions (an exponential, a division): with 2 cores
// that share 60 GB/s, memory takes 0.2 ns per float32 element and arithmetic about 1 ns / 16 lanes, so memory is the
// limit, and the kernel only has to touch each byte once.
//
// Items. Rows and columns are cut into pieces of about 128 KiB. A row's gates and ups are two streams that the hardware
// prefetchers follow. Results of calls that do not fit in the caches are computed into a buffer of 256 elements and
// written past the caches from there (row_memory.h): 3 units of traffic instead of 4. Rows below 64 elements, and rows
// whose elements are not adjacent, are gathered first, so that the arithmetic always runs on full vectors.
//
// Results do not depend on how the call is cut: every element is computed by itself, by the same instructions.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/act_and_mul.cc"
#include "cpu/simd.h"
// clang-format off
#include "hwy/foreach_target.h"
#include "cpu/act_and_mul-inl.h"
// clang-format on

#if HWY_ONCE

#include "core/dtype.h"
#include "cpu/act_and_mul.h"
#include "cpu/cpu_only.h"

namespace heed::cpu {
namespace {

// Columns of the view from `column` on.
MapSlot slot(const TensorView& view, int64_t column, int64_t size_bytes) {
  const int64_t stride = last_stride(view);
  return {static_cast<char*>(view.data) + column * stride * size_bytes, stride};
}

}  // namespace

HWY_EXPORT(act_and_mul_run);
HWY_EXPORT(act_and_mul_bwd_run);

std::string act_and_mul_declines(const ActAndMulProblem& /*problem*/, const Target& target) {
  return declines_other_targets(target);
}

std::string act_and_mul_bwd_declines(const ActAndMulProblem& /*problem*/, const Target& target) {
  return declines_other_targets(target);
}

void act_and_mul(const ActAndMulProblem& problem, const ActAndMulArgs& args) {
  const size_t axes = problem.lead.size();
  const RowStrides x = row_strides(args.x, axes);
  const RowStrides out = row_strides(args.out, axes);
  const RowWalk<3> walk(problem.lead, {x, x, out});
  if (walk.num_rows() == 0 || problem.hidden == 0) return;
  const int64_t bytes = info(problem.dtype).size_bytes;
  const MapPlan<2, 1> map(walk, {slot(args.x, 0, bytes), slot(args.x, problem.hidden, bytes), slot(args.out, 0, bytes)},
                          problem.hidden, bytes);
  HEED_DYNAMIC_DISPATCH(act_and_mul_run)({problem.dtype, problem.activation, map});
}

void act_and_mul_bwd(const ActAndMulProblem& problem, const ActAndMulBackwardArgs& args) {
  const size_t axes = problem.lead.size();
  const RowStrides x = row_strides(args.x, axes);
  const RowStrides dx = row_strides(args.dx, axes);
  const RowWalk<5> walk(problem.lead, {x, x, row_strides(args.dout, axes), dx, dx});
  if (walk.num_rows() == 0 || problem.hidden == 0) return;
  const int64_t bytes = info(problem.dtype).size_bytes;
  const MapPlan<3, 2> map(walk,
                          {slot(args.x, 0, bytes), slot(args.x, problem.hidden, bytes), slot(args.dout, 0, bytes),
                           slot(args.dx, 0, bytes), slot(args.dx, problem.hidden, bytes)},
                          problem.hidden, bytes);
  HEED_DYNAMIC_DISPATCH(act_and_mul_bwd_run)({problem.dtype, problem.activation, map});
}

}  // namespace heed::cpu

#endif  // HWY_ONCE
