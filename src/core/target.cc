// Parses target names.
#include "core/target.h"

#include <charconv>

#include "heed/heed.h"

namespace heed {

Target parse_target(std::string_view name) {
  if (name == "cpu") return Target{};
  if (name == "cuda") return Target{false, 0, "cuda"};
  if (name.starts_with("sm_")) {
    std::string_view digits = name.substr(3);
    int sm = 0;
    auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), sm);
    std::string_view suffix(end, static_cast<size_t>(digits.data() + digits.size() - end));
    const bool has_known_suffix = suffix.empty() || suffix == "a" || suffix == "f";
    if (error == std::errc() && sm >= 10 && sm < 1000 && has_known_suffix) return Target{false, sm, std::string(name)};
  }
  throw ValueError("target: got \"" + std::string(name) +
                   "\", expected \"cpu\", \"cuda\" or an architecture such as \"sm_80\" or \"sm_90a\"");
}

}  // namespace heed
