// Products of whole warpgroups, wgmma. Each warp multiplies its 16 rows by itself, as soon as its own lanes have come:
// that the four run in step is nothing to rely on. A group of products is done for every thread only when it is for all
// four. Accumulators are poisoned from the product until the wait.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "device_emulation/hopper_memory.h"

namespace heed::device_emulation {

inline constexpr int kWarpgroupWarps = 4;

// d[64 x N] (+)= a[64 x 16] b[16 x N].
struct Product {
  int num_columns;
  bool is_bf16, has_a_in_shared, is_n_major, accumulates;
  uint64_t a, b;  // descriptors of shared memory

  bool operator==(const Product&) const = default;
};

inline float product_round(double exact) {  // tensor cores truncate the sum
  const float nearest = static_cast<float>(exact);
  if (!(std::abs(static_cast<double>(nearest)) > std::abs(exact)) || std::isinf(nearest)) return nearest;
  return bits_as<float>(bits_as<uint32_t>(nearest) - 1);
}

class Products {
 public:
  explicit Products(AsyncView& memory) : memory_(memory) {}

  void start_block() {
    for (std::vector<Product>& history : history_) history.clear();
    for (Warp& warp : warps_) warp = {};
    for (Thread& thread : threads_) thread = {};
  }
  void end_thread() {
    if (!thread().accumulators.empty()) fail("a thread ends before its products are done");
  }

  // Warps whose next product can be done.
  bool has_next(int warp) const {
    const std::deque<WarpProduct>& products = warps_[warp].products;
    return !products.empty() && products.front().num_lanes == kWarpSize;
  }
  void multiply_next(int warp);  // below

  void fence() { thread().is_fenced = true; }
  void multiply(const Product& product, float* d, const std::array<uint32_t, 4>& a) {
    Thread& self = thread();
    const int warp = block.current / kWarpSize;
    if (!self.is_fenced) fail("a product without wgmma.fence after the registers were last accessible");
    check_same(product, warp / kWarpgroupWarps, self.num_products);
    add_accumulators(self, product, d);
    memory_.end_reads();

    std::deque<WarpProduct>& products = warps_[warp].products;
    const unsigned place = self.num_products++ - warps_[warp].num_done;
    while (products.size() <= place) products.emplace_back();
    WarpProduct& mine = products[place];
    mine.product = product;
    mine.a[current_lane()] = a;
    mine.d[current_lane()] = d;
    if (++mine.num_lanes == kWarpSize && is_done_at_once(!block.copies_late)) {
      while (has_next(warp)) multiply_next(warp);
    }
  }
  void commit() { thread().group_ends.push_back(thread().num_products); }
  // `is_listed(registers)`: whether the caller may touch them afterwards.
  template <class IsListed>
  void wait(unsigned num_pending, const IsListed& is_listed) {
    Thread& self = thread();
    const size_t num_groups = self.group_ends.size();
    const unsigned end = num_groups > num_pending ? self.group_ends[num_groups - 1 - num_pending] : 0;
    const Warp* const warps = warps_ + block.current / kWarpSize / kWarpgroupWarps * kWarpgroupWarps;
    wait_until("products", end, [&] {
      return std::all_of(warps, warps + kWarpgroupWarps, [&](const Warp& warp) { return warp.num_done >= end; });
    });
    const auto deliver = [&](const LiveAccumulators& live) {
      if (live.last_product >= end) return false;
      if (!is_listed(live.registers)) fail("a wait for products does not list the accumulators that it completes");
      for (size_t i = 0; i < live.values.size(); ++i) {
        if (bits_of(live.registers + i) != kPoison) fail("accumulators were written before the product was done");
      }
      std::memcpy(live.registers, live.values.data(), live.values.size() * sizeof(float));
      return true;
    };
    std::erase_if(self.accumulators, deliver);
    self.is_fenced = false;
  }

 private:
  static constexpr uint32_t kPoison = 0x7FBADBAD;  // a NaN that nothing computes

  // A warp's share. Lanes add themselves one by one.
  struct WarpProduct {
    Product product;
    int num_lanes = 0;
    std::array<std::array<uint32_t, 4>, kWarpSize> a;
    std::array<float*, kWarpSize> d;
  };
  struct Warp {
    std::deque<WarpProduct> products;  // of which none is done
    unsigned num_done = 0;
  };
  // Between a product and the wait for it.
  struct LiveAccumulators {
    float* registers;  // where the poison is
    std::vector<float> values;
    unsigned last_product;
  };
  struct Thread {
    unsigned num_products;
    std::vector<unsigned> group_ends;  // numbers of products
    std::vector<LiveAccumulators> accumulators;
    bool is_fenced;  // registers may be read by products
  };

  Thread& thread() { return threads_[block.current]; }
  static uint32_t bits_of(const float* at) {
    uint32_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return bits;
  }

  // All threads of a warpgroup issue the same products in the same order.
  void check_same(const Product& product, int warpgroup, unsigned number) {
    std::vector<Product>& history = history_[warpgroup];
    if (number == history.size()) history.push_back(product);
    if (!(history[number] == product)) fail("the threads of a warpgroup disagree about a product");
  }
  static void add_accumulators(Thread& self, const Product& product, float* d) {
    const auto size = static_cast<size_t>(product.num_columns / 2);
    const auto found = std::find_if(self.accumulators.begin(), self.accumulators.end(),
                                    [&](const LiveAccumulators& live) { return live.registers == d; });
    if (found != self.accumulators.end()) {
      if (found->values.size() != size) fail("products of different shapes share accumulators in flight");
      found->last_product = self.num_products;
      return;
    }
    LiveAccumulators live{d, std::vector<float>(d, d + size), self.num_products};
    self.accumulators.push_back(std::move(live));
    for (size_t i = 0; i < size; ++i) std::memcpy(d + i, &kPoison, sizeof kPoison);
  }

  // The element of 16 bits at a row of 128 bytes of a tile of 8 such rows; `offset` in bytes from the tile's start.
  uint16_t swizzled(uint64_t descriptor, uint32_t offset) const {
    uint32_t address = static_cast<uint32_t>(descriptor & 0x3FFF) * 16 + offset;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, memory_.at(address, 2), 2);
    return bits;
  }
  static uint32_t leading_bytes(uint64_t descriptor) { return static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) * 16; }
  static uint32_t stride_bytes(uint64_t descriptor) { return static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) * 16; }
  static void check_descriptor(uint64_t descriptor) {
    constexpr uint64_t kUsed = 0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 3ull << 62;
    if ((descriptor & ~kUsed) != 0) fail("a descriptor with a base offset or unknown bits");
    if (descriptor >> 62 != 1) fail("only descriptors of the 128-byte swizzle are emulated");
  }
  // Rows are those of M or N: eight of them, 128 bytes each, then the stride. The leading distance does not matter.
  uint16_t k_major(uint64_t descriptor, int row, int k) const {
    const auto r = static_cast<uint32_t>(row);
    return swizzled(descriptor, r / 8 * stride_bytes(descriptor) + r % 8 * 128 + static_cast<uint32_t>(k) * 2);
  }
  // Rows are those of K: eight of them, 128 bytes each, then the stride; 64 columns, then the leading distance.
  uint16_t n_major(uint64_t descriptor, int column, int k) const {
    const auto c = static_cast<uint32_t>(column);
    const auto r = static_cast<uint32_t>(k);
    return swizzled(descriptor,
                    c / 64 * leading_bytes(descriptor) + c % 64 * 2 + r / 8 * stride_bytes(descriptor) + r % 8 * 128);
  }

  __attribute__((no_sanitize("address", "undefined"))) static void sum_row(const double (&a)[16],
                                                                           const double (&b)[16][256], int num_columns,
                                                                           double (&sums)[256]) {
    for (int column = 0; column < num_columns; ++column) sums[column] = a[0] * b[0][column];
    for (int k = 1; k < 16; ++k) {
      for (int column = 0; column < num_columns; ++column) sums[column] += a[k] * b[k][column];
    }
  }
  std::vector<float>& accumulators_of(int thread, const float* registers) {
    for (LiveAccumulators& live : threads_[thread].accumulators) {
      if (live.registers == registers) return live.values;
    }
    fail("a product without accumulators");
  }
  static double value_of(uint16_t bits, bool is_bf16) {
    if (is_bf16) return bits_as<float>(static_cast<uint32_t>(bits) << 16);
    static const std::vector<float> table = [] {
      std::vector<float> values(1 << 16);
      for (uint32_t half = 0; half < 1 << 16; ++half) {
        const int exponent = static_cast<int>(half >> 10 & 31);
        const auto mantissa = static_cast<float>(half & 1023);
        float size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024.0f + mantissa, exponent - 25);
        if (exponent == 31) size = mantissa == 0.0f ? INFINITY : NAN;
        values[half] = half >> 15 == 0 ? size : -size;
      }
      return values;
    }();
    return table[bits];
  }

  AsyncView& memory_;
  std::vector<Product> history_[kMaxWarps / kWarpgroupWarps];
  Warp warps_[kMaxWarps];
  Thread threads_[kMaxThreads];
};

inline void Products::multiply_next(int warp) {
  const WarpProduct mine = std::move(warps_[warp].products.front());
  warps_[warp].products.pop_front();
  ++warps_[warp].num_done;
  const Product& product = mine.product;
  static double a[16][16];
  static double b[16][256];
  check_descriptor(product.b);
  if (product.has_a_in_shared) check_descriptor(product.a);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      // Lane 4 r + c has rows r and r + 8, k of 2 c, 2 c + 1 and those + 8.
      const uint32_t word = mine.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const auto bits = product.has_a_in_shared ? k_major(product.a, warp % kWarpgroupWarps * 16 + row, k)
                                                : static_cast<uint16_t>(word >> (16 * (k % 2)));
      a[row][k] = value_of(bits, product.is_bf16);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < product.num_columns; ++column) {
      const uint16_t bits = product.is_n_major ? n_major(product.b, column, k) : k_major(product.b, column, k);
      b[k][column] = value_of(bits, product.is_bf16);
    }
  }
  for (int row = 0; row < 16; ++row) {
    double sums[256];
    sum_row(a[row], b, product.num_columns, sums);
    for (int pair = 0; pair < 4; ++pair) {
      const int lane = row % 8 * 4 + pair;
      std::vector<float>& values = accumulators_of(warp * kWarpSize + lane, mine.d[lane]);
      for (int tile = 0; tile < product.num_columns / 8; ++tile) {
        for (int e = 0; e < 2; ++e) {
          float& value = values[static_cast<size_t>(4 * tile + row / 8 * 2 + e)];
          const double sum = sums[8 * tile + 2 * pair + e];
          value = product_round(product.accumulates ? value + sum : sum);
        }
      }
    }
  }
}

}  // namespace heed::device_emulation
