// The fields of the problems' texts: writing and reading.
#include "core/problem_text.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <vector>

namespace heed {
namespace {

constexpr std::string_view kBackendNames[] = {"auto", "cpu", "sm80", "sm90"};
constexpr std::string_view kAlignNames[] = {"bottom_right", "top_left"};

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ",") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

void TextReader::fail(const std::string& expected) const {
  throw ValueError("problem: got \"" + std::string(text_.substr(at_, 40)) + "\" at position " + std::to_string(at_) +
                   ", expected " + expected);
}

bool TextReader::take(std::string_view token) {
  if (!text_.substr(at_).starts_with(token)) return false;
  at_ += token.size();
  return true;
}

void TextReader::expect(std::string_view token) {
  if (!take(token)) fail("\"" + std::string(token) + "\"");
}

int64_t TextReader::integer() {
  int64_t value = 0;
  auto [end, error] = std::from_chars(begin(), end_of_text(), value);
  if (error != std::errc()) fail("an integer");
  at_ += static_cast<size_t>(end - begin());
  return value;
}

bool TextReader::flag() {
  if (take("0")) return false;
  if (take("1")) return true;
  fail("0 or 1");
}

double TextReader::real() {
  const bool is_negative = take("-");
  double value = 0.0;
  if (take("nan")) return std::numeric_limits<double>::quiet_NaN();
  if (take("inf")) return is_negative ? -HUGE_VAL : HUGE_VAL;
  expect("0x");
  auto [end, error] = std::from_chars(begin(), end_of_text(), value, std::chars_format::hex);
  if (error != std::errc()) fail("a hexadecimal number");
  at_ += static_cast<size_t>(end - begin());
  return is_negative ? -value : value;
}

TensorSpec TextReader::tensor() {
  TensorSpec spec;
  spec.present = true;
  const size_t bracket = text_.find('[', at_);
  if (bracket == std::string_view::npos || bracket - at_ > 32) fail("a dtype and a shape in brackets");
  spec.dtype = text_.substr(at_, bracket - at_);
  at_ = bracket + 1;
  if (take("]")) return spec;
  do {
    spec.shape.push_back(integer());
    if (spec.shape.size() > 64) fail("at most 64 axes");
  } while (take(","));
  expect("]");
  return spec;
}

void TextReader::expect_end() const {
  if (at_ != text_.size()) fail("the end of the text");
}

std::string to_hex(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[40];
  auto [end, error] = std::to_chars(buffer, buffer + sizeof(buffer), std::abs(value), std::chars_format::hex);
  return (std::signbit(value) ? "-0x" : "0x") + std::string(buffer, end);
}

std::string backend_field(Backend backend) {
  return ";backend=" + std::string(kBackendNames[static_cast<int>(backend)]);
}

Backend read_backend(TextReader& reader) {
  reader.expect(";backend=");
  return static_cast<Backend>(reader.one_of(kBackendNames, "auto, cpu, sm80 or sm90"));
}

std::string operand_fields(std::span<const std::string_view> names, std::span<const TensorSpec> specs) {
  std::string text;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (!specs[i].present) continue;
    text += ";" + std::string(names[i]) + "=" + specs[i].dtype + shape_text(specs[i].shape);
  }
  return text;
}

void read_operands(TextReader& reader, std::span<const std::string_view> names, std::span<TensorSpec> specs) {
  for (size_t i = 0; i < specs.size(); ++i) {
    if (reader.take(";" + std::string(names[i]) + "=")) specs[i] = reader.tensor();
  }
}

std::string option_fields(const AttentionOptions& options, bool is_varlen, const bool* wants_lse) {
  std::string text = ";scale=" + (options.softmax_scale ? to_hex(*options.softmax_scale) : "default");
  text += options.is_causal ? ";causal=1" : ";causal=0";
  text += ";align=" + std::string(kAlignNames[static_cast<int>(options.causal_align)]);
  text += ";window=" + std::to_string(options.window_left) + "," + std::to_string(options.window_right);
  if (is_varlen) {
    text += ";max_seqlen=" + std::to_string(options.max_seqlen_q) + "," + std::to_string(options.max_seqlen_k);
  }
  text += ";softcap=" + to_hex(options.softcap);
  if (wants_lse != nullptr) text += *wants_lse ? ";lse=1" : ";lse=0";
  text += options.deterministic ? ";deterministic=1" : ";deterministic=0";
  return text + backend_field(options.backend);
}

void read_options(TextReader& reader, AttentionOptions& options, bool is_varlen, bool* wants_lse) {
  reader.expect(";scale=");
  if (!reader.take("default")) options.softmax_scale = reader.real();
  reader.expect(";causal=");
  options.is_causal = reader.flag();
  reader.expect(";align=");
  options.causal_align = static_cast<CausalAlign>(reader.one_of(kAlignNames, "bottom_right or top_left"));
  reader.expect(";window=");
  options.window_left = reader.integer();
  reader.expect(",");
  options.window_right = reader.integer();
  if (is_varlen) {
    reader.expect(";max_seqlen=");
    options.max_seqlen_q = reader.integer();
    reader.expect(",");
    options.max_seqlen_k = reader.integer();
  }
  reader.expect(";softcap=");
  options.softcap = reader.real();
  if (wants_lse != nullptr) {
    reader.expect(";lse=");
    *wants_lse = reader.flag();
  }
  reader.expect(";deterministic=");
  options.deterministic = reader.flag();
  options.backend = read_backend(reader);
}

}  // namespace heed
