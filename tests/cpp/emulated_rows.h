// What the tests of row-wise device code share: tensors, broadcast rows, and kernels run on the CPU.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "attention_oracle.h"
#include "cuda/row_spec.h"
#include "device_emulation/emulation.h"
#include "guarded.h"

namespace heed::testing_oracle {

using Shape = std::vector<int64_t>;

inline Tensor random_tensor(DType dtype, const Shape& shape, unsigned seed, Layout layout = Layout::kContiguous) {
  Tensor tensor(dtype, shape, layout);
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, 2.0 * normal(random));
  return tensor;
}

inline Tensor int_tensor(const std::vector<int32_t>& values, Shape shape = {}) {
  if (shape.empty()) shape = {static_cast<int64_t>(values.size())};
  Tensor tensor(DType::kInt32, shape);
  for (size_t i = 0; i < values.size(); ++i) tensor.set(static_cast<int64_t>(i), values[i]);
  return tensor;
}

// Which row of a tensor, whose leading axes may be 1, belongs to a row of the full result.
inline int64_t own_row(const Tensor& of, const Tensor& full, int64_t row) {
  int64_t own = 0;
  int64_t step = 1;
  for (int axis = full.view.rank - 2; axis >= 0; --axis) {
    const int64_t place = row % full.view.shape[axis];
    row /= full.view.shape[axis];
    if (of.view.shape[axis] != 1) own += place * step;
    step *= of.view.shape[axis];
  }
  return own;
}

// Row-major tensors between pages that nobody may touch; others stay where they are.
inline std::vector<std::unique_ptr<Guarded>> guard(Layout layout, std::initializer_list<Tensor*> tensors) {
  std::vector<std::unique_ptr<Guarded>> all;
  for (Tensor* tensor : tensors) {
    if (layout == Layout::kContiguous && tensor->view.defined()) all.push_back(std::make_unique<Guarded>(*tensor));
  }
  return all;
}

template <class Kernel>
void run_blocks(const typename Kernel::Params& params, int64_t num_blocks) {
  for (int64_t index = 0; index < num_blocks; ++index) {
    device_emulation::run_block(static_cast<unsigned>(index), Kernel::kNumThreads, Kernel::kSharedBytes,
                                [&] { Kernel::run(params); });
  }
}

inline DType dtype_of(cuda::Element element) {
  return element == cuda::Element::kFloat32   ? DType::kFloat32
         : element == cuda::Element::kFloat16 ? DType::kFloat16
                                              : DType::kBFloat16;
}

inline double rounded(double x, DType dtype, bool is_naive) { return is_naive ? round_to(x, dtype) : x; }

}  // namespace heed::testing_oracle
