// What the tests of the small ops' CPU kernels share: every instruction set in turn, random tensors, broadcast indices.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attention_oracle.h"
#include "cpu/simd.h"
#include "heed/ops.h"

namespace heed::testing_oracle {

constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

class EveryTarget : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { cpu::force_target(GetParam()); }
  void TearDown() override { cpu::force_target(""); }
};

inline std::string target_name(const testing::TestParamInfo<std::string>& info) { return info.param; }

inline Tensor random_tensor(DType dtype, std::vector<int64_t> shape, unsigned seed, double gain = 1.0,
                            Layout layout = Layout::kContiguous) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Tensor tensor(dtype, std::move(shape), layout);
  for (int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, gain * normal(random));
  return tensor;
}

inline Tensor tensor_of(DType dtype, std::vector<int64_t> shape, const std::vector<double>& values) {
  Tensor tensor(dtype, std::move(shape));
  for (size_t i = 0; i < values.size(); ++i) tensor.set(static_cast<int64_t>(i), values[i]);
  return tensor;
}

template <class Real>
std::vector<Real> values_of(const Tensor& tensor) {
  std::vector<Real> values(static_cast<size_t>(tensor.count()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<Real>(tensor.get(static_cast<int64_t>(i)));
  return values;
}

inline std::vector<int64_t> shape_of(std::vector<int64_t> lead, std::initializer_list<int64_t> own) {
  lead.insert(lead.end(), own.begin(), own.end());
  return lead;
}

inline int64_t product_of(const std::vector<int64_t>& sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) product *= size;
  return product;
}

// Which of a tensor's leading indices belongs to index `flat` of the full sizes: axes of size 1 broadcast.
inline int64_t broadcast_index(const std::vector<int64_t>& full, const TensorView& view, int64_t flat) {
  int64_t index = 0;
  int64_t stride = 1;
  for (auto axis = static_cast<int>(full.size()) - 1; axis >= 0; --axis) {
    if (view.shape[axis] != 1) index += flat % full[axis] * stride;
    stride *= view.shape[axis];
    flat /= full[axis];
  }
  return index;
}

// A result rounded to the dtype as a plain implementation would; oracles stay as they are.
template <class Real>
double stored(Real x, DType dtype) {
  return sizeof(Real) == sizeof(float) ? round_to(static_cast<double>(x), dtype) : static_cast<double>(x);
}

// The noise of a row of a few elements is a matter of luck: those are judged together.
inline int64_t row_size_of(int64_t columns, const std::vector<double>& all) {
  return columns < 8 ? std::max<int64_t>(static_cast<int64_t>(all.size()), 1) : columns;
}

inline std::vector<char> bytes_of(const Tensor& tensor) { return tensor.memory; }

}  // namespace heed::testing_oracle
