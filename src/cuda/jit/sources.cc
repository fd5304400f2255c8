// The device sources: lookup, transitive includes, the entry source, content ids.
#include "cuda/jit/sources.h"

#include <algorithm>
#include <cctype>
#include <map>

#include "cuda/jit/sha256.h"

namespace heed::cuda {
namespace {

// Changes with what the key or an entry's contents mean.
constexpr std::string_view kKeyFormat = "heed kernel 1";

std::string family_path(std::string_view family) { return "cuda/device/" + std::string(family) + ".cuh"; }

// The paths of all `#include "..."` lines. Conditional ones count too: a header more in a key does no harm.
std::vector<std::string_view> quoted_includes(std::string_view text) {
  std::vector<std::string_view> paths;
  const auto skip_blanks = [&](size_t at) { return std::min(text.find_first_not_of(" \t", at), text.size()); };
  for (size_t line = 0; line < text.size();) {
    const size_t end = std::min(text.find('\n', line), text.size());
    size_t at = skip_blanks(line);
    if (at < end && text[at] == '#') {
      at = skip_blanks(at + 1);
      if (text.substr(at, 7) == "include") {
        const size_t open = skip_blanks(at + 7);
        const size_t close = open < end && text[open] == '"' ? text.find('"', open + 1) : end;
        if (close < end) paths.push_back(text.substr(open + 1, close - open - 1));
      }
    }
    line = end + 1;
  }
  return paths;
}

void add_headers(const EmbeddedSource* source, std::map<std::string_view, const EmbeddedSource*>& found) {
  if (source == nullptr || !found.emplace(source->path, source).second) return;
  for (std::string_view path : quoted_includes(source->text)) add_headers(find_source(path), found);
}

std::string family_names() {
  std::string names;
  for (const EmbeddedSource& source : embedded_sources()) {
    if (!source.path.starts_with("cuda/device/") || !source.path.ends_with(".cuh")) continue;
    const std::string_view name = source.path.substr(12, source.path.size() - 16);
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  return names;
}

// No two lists of fields give the same bytes.
void add_field(Sha256& hash, std::string_view field) {
  hash.update(std::to_string(field.size()) + ":");
  hash.update(field);
}

}  // namespace

const EmbeddedSource* find_source(std::string_view path) {
  const std::span<const EmbeddedSource> all = embedded_sources();
  const auto it = std::lower_bound(all.begin(), all.end(), path,
                                   [](const EmbeddedSource& source, std::string_view p) { return source.path < p; });
  return it != all.end() && it->path == path ? &*it : nullptr;
}

std::vector<const EmbeddedSource*> transitive_headers(std::string_view family) {
  std::map<std::string_view, const EmbeddedSource*> found;
  add_headers(find_source(family_path(family)), found);
  std::vector<const EmbeddedSource*> headers;
  headers.reserve(found.size());
  for (const auto& [path, source] : found) headers.push_back(source);
  return headers;
}

std::string entry_source(const KernelSpec& spec) {
  // The two constants are read from the machine code when it is loaded: it says itself how it is to be launched.
  return "#include \"" + family_path(spec.family) +
         "\"\n"
         "namespace heed::cuda { using Kernel = " +
         spec.instance +
         "; }\n"
         "extern \"C\" __device__ const int heed_num_threads = heed::cuda::Kernel::kNumThreads;\n"
         "extern \"C\" __device__ const int heed_shared_bytes = heed::cuda::Kernel::kSharedBytes;\n"
         "extern \"C\" __global__ void __launch_bounds__(heed::cuda::Kernel::kNumThreads, "
         "heed::cuda::Kernel::kMinBlocksPerSm)\n"
         "heed_kernel(const __grid_constant__ heed::cuda::Kernel::Params params) { heed::cuda::Kernel::run(params); "
         "}\n";
}

std::vector<std::string> compile_flags(std::string_view arch) {
  return {"-std=c++20", "--gpu-architecture=" + std::string(arch),
          "--ptxas-options=-v",    // registers and spills, in the log
          "--no-source-include"};  // the working directory holds no headers of ours
}

void check_spec(const KernelSpec& spec) {
  const bool is_name = !spec.family.empty() && std::all_of(spec.family.begin(), spec.family.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '_';
  });
  if (!is_name || find_source(family_path(spec.family)) == nullptr) {
    throw ValueError("kernel spec: got family '" + spec.family + "', expected one of " + family_names());
  }
  const bool is_line = spec.instance.find_first_not_of(" \t") != std::string::npos &&
                       spec.instance.find_first_of(std::string_view("\n\r\0", 3)) == std::string::npos;
  if (!is_line) {
    throw ValueError("kernel spec: got instance '" + spec.instance + "', expected the name of a type on one line");
  }
}

void check_arch(std::string_view arch) {
  std::string_view digits = arch.starts_with("sm_") ? arch.substr(3) : "";
  if (digits.ends_with('a') || digits.ends_with('f')) digits.remove_suffix(1);
  const bool is_good = (digits.size() == 2 || digits.size() == 3) &&
                       std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
  if (!is_good) throw ValueError("arch: got '" + std::string(arch) + "', expected a name such as sm_80 or sm_90a");
}

std::string content_id(const KernelSpec& spec, std::string_view arch) {
  check_spec(spec);
  check_arch(arch);
  Sha256 hash;
  add_field(hash, kKeyFormat);
  add_field(hash, entry_source(spec));
  for (const EmbeddedSource* header : transitive_headers(spec.family)) {
    add_field(hash, header->path);
    add_field(hash, header->sha256);
  }
  for (const std::string& flag : compile_flags(arch)) add_field(hash, flag);
  return hash.hex_digest().substr(0, 32);
}

// ---------------------------------------------------------------------------------------------------------------------

std::string to_text(const KernelSpec& spec) { return spec.family + " " + spec.instance; }

KernelSpec parse_kernel_spec(std::string_view text) {
  const size_t blank = text.find(' ');
  if (blank == std::string_view::npos) {
    throw ValueError("kernel spec: got '" + std::string(text) + "', expected '<family> <instance>'");
  }
  KernelSpec spec{std::string(text.substr(0, blank)), std::string(text.substr(blank + 1))};
  check_spec(spec);
  return spec;
}

std::string arch_for(int compute_capability_times_ten) {
  // The tensor core instructions of sm_90 are there under the name that ends in "a" only.
  return "sm_" + std::to_string(compute_capability_times_ten) + (compute_capability_times_ten == 90 ? "a" : "");
}

}  // namespace heed::cuda
