// A tensor whose neighbourhood nobody may touch.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "attention_oracle.h"

namespace heed::testing_oracle {

// Moves a tensor's memory between pages that nobody may touch, its last byte before the second one.
class Guarded {
 public:
  explicit Guarded(Tensor& tensor) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(tensor.count() * info(tensor.view.dtype).size_bytes);
    num_bytes_ = (bytes + page - 1) / page * page + 2 * page;
    void* memory = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(memory, MAP_FAILED);
    pages_ = static_cast<char*>(memory);
    EXPECT_EQ(mprotect(pages_, page, PROT_NONE), 0);
    EXPECT_EQ(mprotect(pages_ + num_bytes_ - page, page, PROT_NONE), 0);
    char* to = pages_ + num_bytes_ - page - bytes;
    std::memcpy(to, tensor.view.data, bytes);
    tensor.view.data = to;
  }
  ~Guarded() { munmap(pages_, num_bytes_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

 private:
  char* pages_ = nullptr;
  size_t num_bytes_ = 0;
};

}  // namespace heed::testing_oracle
