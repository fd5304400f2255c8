// The file format of kernels on a disk:
//
//   heed-kernel 1
//   sha256 <of all that follows this line>
//   id, spec, arch, compiler: one line each, "<name> <value>"
//   log <bytes>
//   cubin <bytes>
//   <empty line>, the log, the cubin
#include "cuda/jit/entry.h"

#include <charconv>

#include "cuda/jit/cubin.h"
#include "cuda/jit/folder.h"
#include "cuda/jit/sha256.h"

namespace heed::cuda {
namespace {

constexpr std::string_view kMagic = "heed-kernel 1\nsha256 ";
constexpr size_t kDigestDigits = 64;
constexpr size_t kIdDigits = 32;

// Takes "<name> <value>\n" off the front.
bool take_line(std::string_view& rest, std::string_view name, std::string& value) {
  const size_t end = rest.find('\n');
  if (end == std::string_view::npos || !rest.starts_with(name) || rest.size() <= name.size()) return false;
  if (rest[name.size()] != ' ') return false;
  value = rest.substr(name.size() + 1, end - name.size() - 1);
  rest.remove_prefix(end + 1);
  return true;
}

bool take_size(std::string_view& rest, std::string_view name, size_t& value) {
  std::string text;
  if (!take_line(rest, name, text)) return false;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

}  // namespace

std::string shipped_entry_name(const std::string& id) { return id + std::string(kEntrySuffix); }

std::string cached_entry_name(const std::string& id, const std::string& nvrtc_version) {
  return id + "-nvrtc" + nvrtc_version + std::string(kEntrySuffix);
}

bool is_entry_name(std::string_view name) {
  return name.find_first_not_of("0123456789abcdef") == kIdDigits && name.ends_with(kEntrySuffix);
}

bool is_leftover_name(std::string_view name) {
  if (!name.ends_with(kTemporarySuffix) && !name.ends_with(kLockSuffix)) return false;
  const size_t end = name.rfind(kEntrySuffix);
  return end != std::string_view::npos && is_entry_name(name.substr(0, end + kEntrySuffix.size()));
}

std::string to_bytes(const Entry& entry) {
  std::string body = "\nid " + entry.id + "\nspec " + entry.spec + "\narch " + entry.arch + "\ncompiler " +
                     entry.compiler + "\nlog " + std::to_string(entry.log.size()) + "\ncubin " +
                     std::to_string(entry.cubin.size()) + "\n\n";
  body += entry.log;
  body += entry.cubin;
  return std::string(kMagic) + sha256_hex(body) + body;
}

std::optional<Entry> parse_entry(std::string_view bytes, std::string& reason) {
  if (!bytes.starts_with(kMagic)) {
    reason = "it does not begin like a kernel of this version";
    return std::nullopt;
  }
  std::string_view rest = bytes.substr(kMagic.size());
  if (rest.size() < kDigestDigits || sha256_hex(rest.substr(kDigestDigits)) != rest.substr(0, kDigestDigits)) {
    reason = "its checksum is wrong: it is truncated or damaged";
    return std::nullopt;
  }
  rest.remove_prefix(kDigestDigits);
  Entry entry;
  size_t log_bytes = 0;
  size_t cubin_bytes = 0;
  const auto take_empty_line = [&] {
    if (!rest.starts_with('\n')) return false;
    rest.remove_prefix(1);
    return true;
  };
  if (!take_empty_line() || !take_line(rest, "id", entry.id) || !take_line(rest, "spec", entry.spec) ||
      !take_line(rest, "arch", entry.arch) || !take_line(rest, "compiler", entry.compiler) ||
      !take_size(rest, "log", log_bytes) || !take_size(rest, "cubin", cubin_bytes) || !take_empty_line() ||
      log_bytes > rest.size() || rest.size() - log_bytes != cubin_bytes) {
    reason = "its header is wrong";
    return std::nullopt;
  }
  entry.log = rest.substr(0, log_bytes);
  entry.cubin = rest.substr(log_bytes);
  return entry;
}

}  // namespace heed::cuda
