// CPU RMS norms, forward and backward.
//
// Where the time and the bytes go
// -------------------------------
// A row is read, reduced to one number and scaled: memory is the limit. A row (16 KB at 4096 float32) stays in L1
// between its sum of squares and its scaling, so each tensor passes the memory bus once. Results of calls that do not
// fit in the caches go past them (row_memory.h); the sum x + residual is then kept in a buffer of the thread until its
// row is scaled.
//
// Backward, a row needs two sums: those of x^2 and of dout * w * x. Rows are taken four at a time, so that the partial
// sums of the gradient of the weight are read and written once per four rows; x and dout of four rows (128 KB at 4096
// float32) come from L2 the second time.
//
// Gradient of the weight. Blocks of rows, at most 64 of them, are summed by one thread each, into the workspace; a
// second loop adds the blocks in their order. Blocks depend on sizes only: results are bitwise the same for any number
// of threads. Rows of four, of a block, and blocks: rounding errors do not grow with the number of rows.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rms_norm.cc"
#include "cpu/simd.h"
// clang-format off
#include "hwy/foreach_target.h"
#include "cpu/rms_norm-inl.h"
// clang-format on

#if HWY_ONCE

#include <vector>

#include "core/dtype.h"
#include "cpu/cpu_only.h"
#include "cpu/rms_norm.h"

namespace heed::cpu {
namespace {

NormTensor norm_tensor(const TensorView& view) { return {view.defined() ? view.data : nullptr, last_stride(view)}; }

// Of the axes before a row: the leading ones, then those that the weight lacks.
std::vector<int64_t> row_axes(const RmsNormProblem& problem) {
  std::vector<int64_t> axes = problem.lead;
  axes.insert(axes.end(), problem.rows.begin(), problem.rows.end());
  return axes;
}

int64_t backward_row_bytes(const RmsNormProblem& problem) {
  return problem.hidden * info(problem.dtype).size_bytes * (problem.has_dsum ? 4 : 3);
}

}  // namespace

HWY_EXPORT(rms_norm_run);
HWY_EXPORT(rms_norm_bwd_run);

std::string rms_norm_declines(const RmsNormProblem& /*problem*/, const Target& target) {
  return declines_other_targets(target);
}

std::string rms_norm_bwd_declines(const RmsNormProblem& /*problem*/, const Target& target) {
  return declines_other_targets(target);
}

int64_t rms_norm_bwd_workspace(const RmsNormProblem& problem) {
  const int64_t rows = rows_per_norm_block(problem.num_rows, backward_row_bytes(problem));
  const int64_t blocks = (problem.num_rows + rows - 1) / rows;
  return blocks > 1 ? blocks * problem.hidden : 0;
}

void rms_norm(const RmsNormProblem& problem, const RmsNormArgs& args) {
  using Plan = RmsNormPlan;
  const std::vector<int64_t> axes = row_axes(problem);
  const size_t all = axes.size();
  const Plan::Walk walk(
      axes, {row_strides(args.x, all), row_strides(args.residual, all), row_strides(args.weight, problem.lead.size()),
             row_strides(args.out, all), row_strides(args.sum, all)});
  if (walk.num_rows() == 0 || problem.hidden == 0) return;
  const int64_t row_bytes = problem.hidden * info(problem.dtype).size_bytes * (problem.has_residual ? 4 : 2);
  const Plan plan{problem.dtype,
                  walk,
                  {norm_tensor(args.x), norm_tensor(args.residual), norm_tensor(args.weight), norm_tensor(args.out),
                   norm_tensor(args.sum)},
                  problem.hidden,
                  problem.eps,
                  row_bytes,
                  walk.num_rows() * row_bytes >= kStreamingBytes};
  HEED_DYNAMIC_DISPATCH(rms_norm_run)(plan);
}

void rms_norm_bwd(const RmsNormProblem& problem, const RmsNormBackwardArgs& args) {
  using Plan = RmsNormBackwardPlan;
  const std::vector<int64_t> axes = row_axes(problem);
  const size_t all = axes.size();
  const size_t lead = problem.lead.size();
  const Plan::Walk walk(axes, {row_strides(args.x, all), row_strides(args.weight, lead), row_strides(args.dout, all),
                               row_strides(args.dsum, all), row_strides(args.dx, all)});
  const Plan::DweightWalk dweight_walk(problem.lead, {row_strides(args.dweight, lead)});
  if (dweight_walk.num_rows() == 0 || problem.hidden == 0) return;
  const int64_t row_bytes = backward_row_bytes(problem);
  const int64_t rows = rows_per_norm_block(problem.num_rows, row_bytes);
  const Plan plan{problem.dtype,
                  walk,
                  {norm_tensor(args.x), norm_tensor(args.weight), norm_tensor(args.dout), norm_tensor(args.dsum),
                   norm_tensor(args.dx)},
                  dweight_walk,
                  norm_tensor(args.dweight),
                  args.workspace.defined() ? static_cast<float*>(args.workspace.data) : nullptr,
                  dweight_walk.num_rows(),
                  problem.num_rows,
                  rows,
                  (problem.num_rows + rows - 1) / rows,
                  problem.hidden,
                  problem.eps,
                  row_bytes,
                  walk.num_rows() * row_bytes >= kStreamingBytes};
  HEED_DYNAMIC_DISPATCH(rms_norm_bwd_run)(plan);
}

}  // namespace heed::cpu

#endif  // HWY_ONCE
