// What the tests of the small ops' problems share: specs, messages, and texts that resemble a problem's.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/small_problems.h"

namespace heed::test {

using Shape = std::vector<int64_t>;

inline TensorSpec spec(const char* dtype, Shape shape) { return {dtype, std::move(shape), true}; }

// The message of the error that validation throws; empty if there is none.
template <class Error, class Request>
std::string message_of(const Request& request) {
  try {
    validate(request);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// The same for errors of either kind: "TypeError: q: got ...".
template <class Request>
std::string typed_message_of(const Request& request) {
  try {
    validate(request);
  } catch (const ValueError& error) {
    return std::string("ValueError: ") + error.what();
  } catch (const TypeError& error) {
    return std::string("TypeError: ") + error.what();
  }
  return "";
}

// Every truncation of a text and every flipped bit is refused with a typed error, or is another problem's text.
template <class Parse>
void refuses_or_parses_what_resembles(const std::string& text, const Parse& parse) {
  EXPECT_EQ(to_text(parse(text)), text);
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_THROW(parse(text.substr(0, length)), ValueError) << text.substr(0, length);
  }
  EXPECT_THROW(parse(text + ";"), ValueError);
  for (size_t at = 0; at < text.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = text;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << bit));
      try {
        validate(parse(flipped));
      } catch (const ValueError&) {
      } catch (const TypeError&) {
      }
    }
  }
}

}  // namespace heed::test
