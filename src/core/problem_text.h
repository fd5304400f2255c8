// What the texts of all problems are made of: fields of operands and options, written and read from left to right.
// Internal to src/core.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "core/problem.h"

namespace heed {

// Reads a text; every field is required to be where the schema has it. Throws ValueError that shows the place.
class TextReader {
 public:
  explicit TextReader(std::string_view text) : text_(text) {}

  [[noreturn]] void fail(const std::string& expected) const;
  bool take(std::string_view token);
  void expect(std::string_view token);
  int64_t integer();
  bool flag();
  double real();
  TensorSpec tensor();
  void expect_end() const;
  template <size_t kCount>
  size_t one_of(const std::string_view (&names)[kCount], const char* what) {
    for (size_t i = 0; i < kCount; ++i) {
      if (take(names[i])) return i;
    }
    fail(what);
  }

 private:
  const char* begin() const { return text_.data() + at_; }
  const char* end_of_text() const { return text_.data() + text_.size(); }

  std::string_view text_;
  size_t at_ = 0;
};

// Exact: hexadecimal, "inf" or "nan".
std::string to_hex(double value);

// ";backend=auto", the last field of every text.
std::string backend_field(Backend backend);
Backend read_backend(TextReader& reader);

// ";name=dtype[sizes]" for each operand that is there.
std::string operand_fields(std::span<const std::string_view> names, std::span<const TensorSpec> specs);
void read_operands(TextReader& reader, std::span<const std::string_view> names, std::span<TensorSpec> specs);

// The options, from ";scale=" on. `wants_lse` is null for an op that has no such field.
std::string option_fields(const AttentionOptions& options, bool is_varlen, const bool* wants_lse);
void read_options(TextReader& reader, AttentionOptions& options, bool is_varlen, bool* wants_lse);

}  // namespace heed
