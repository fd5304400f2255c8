// Finds NVRTC (HEED_NVRTC, the nvidia-cuda-nvrtc wheel, CUDA_HOME, the loader's path, /usr/local/cuda) and runs it.
//
// No mutex here: threads that race open the same library, one of them publishes it, and a fork finds nothing locked.
#include "cuda/jit/nvrtc.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <filesystem>
#include <memory>

#include "cuda/jit/driver_api.h"
#include "cuda/jit/log.h"
#include "cuda/jit/paths.h"
#include "cuda/jit/sources.h"

namespace heed::cuda {
namespace {

namespace fs = std::filesystem;

constexpr int kOldestMajor = 12;  // the first with C++20
constexpr int kNewestMajor = 16;  // asked for by name of the loader; folders may hold newer ones

// "13.0" of "libnvrtc-builtins.so.13.0.88" with prefix "libnvrtc-builtins.so."; empty for any other file.
std::vector<int> version_after(const std::string& name, std::string_view prefix) {
  std::vector<int> numbers;
  if (!name.starts_with(prefix)) return numbers;
  const char* at = name.data() + prefix.size();
  const char* const end = name.data() + name.size();
  while (at < end) {
    int number = 0;
    const auto [next, error] = std::from_chars(at, end, number);
    if (error != std::errc() || (next != end && *next != '.')) return {};
    numbers.push_back(number);
    at = next == end ? end : next + 1;
  }
  return numbers;
}

std::vector<std::string> file_names(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// The newest libnvrtc.so of a folder; empty if it holds none that is new enough.
std::string newest_in(const fs::path& folder) {
  std::string best;
  std::vector<int> best_version;
  for (const std::string& name : file_names(folder)) {
    const std::vector<int> version = version_after(name, "libnvrtc.so.");
    if (version.empty() || version[0] < kOldestMajor || version <= best_version) continue;
    best = name;
    best_version = version;
  }
  std::error_code error;
  if (best.empty() && fs::exists(folder / "libnvrtc.so", error)) best = "libnvrtc.so";
  return best.empty() ? "" : (folder / best).string();
}

// From the file of built-in headers that lies beside each NVRTC, "libnvrtc-builtins.so.13.0": spares opening a library
// of 100 MB. Empty if it does not tell.
std::string version_beside(const std::string& path) {
  std::error_code error;
  const fs::path file = fs::canonical(path, error);
  if (error) return "";
  const std::vector<int> own = version_after(file.filename().string(), "libnvrtc.so.");
  std::string found;
  for (const std::string& name : file_names(file.parent_path())) {
    const std::vector<int> version = version_after(name, "libnvrtc-builtins.so.");
    if (version.size() < 2 || (!own.empty() && own[0] != version[0])) continue;
    const std::string text = std::to_string(version[0]) + "." + std::to_string(version[1]);
    if (!found.empty() && found != text) return "";
    found = text;
  }
  return found;
}

struct Place {
  std::string name;                // how an error message calls it
  std::vector<std::string> paths;  // files, or names for the loader, in order; none: nothing is there
};

// The folders of the nvidia-cuda-nvrtc wheel: nvidia/cu13/lib since CUDA 13, nvidia/cuda_nvrtc/lib before.
Place wheel_place() {
  Place place{"the nvidia-cuda-nvrtc wheel", {}};
  for (const std::string& site : site_dirs()) {
    const fs::path nvidia = fs::path(site) / "nvidia";
    std::vector<std::string> packages = file_names(nvidia);
    std::reverse(packages.begin(), packages.end());  // cu14 before cu13
    for (const std::string& package : packages) {
      if (!package.starts_with("cu1") && package != "cuda_nvrtc") continue;
      const std::string path = newest_in(nvidia / package / "lib");
      if (!path.empty()) place.paths.push_back(path);
    }
  }
  return place;
}

Place toolkit_place(const std::string& name, const std::string& folder) {
  Place place{name, {}};
  for (const char* lib : {"lib64", "lib", "targets/x86_64-linux/lib"}) {
    const std::string path = newest_in(fs::path(folder) / lib);
    if (!path.empty()) place.paths.push_back(path);
  }
  return place;
}

std::vector<Place> places() {
  std::error_code error;
  // Who names one gets that one or an error.
  if (const std::string asked = environment("HEED_NVRTC"); !asked.empty()) {
    return {{"HEED_NVRTC=" + asked, {fs::is_directory(asked, error) ? newest_in(asked) : asked}}};
  }
  std::vector<Place> found{wheel_place()};
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"}) {
    const std::string home = environment(name);
    if (!home.empty()) found.push_back(toolkit_place(std::string(name) + "=" + home, home));
  }
  Place loader{"the loader's path", {}};
  for (int major = kNewestMajor; major >= kOldestMajor; --major) {
    loader.paths.push_back("libnvrtc.so." + std::to_string(major));
  }
  loader.paths.emplace_back("libnvrtc.so");
  found.push_back(std::move(loader));
  found.push_back(toolkit_place("/usr/local/cuda", "/usr/local/cuda"));
  return found;
}

struct OpenNvrtc {
  NvrtcInfo info;
  NvrtcApi api;
};

// Opens a library; null, and why in `reason`, if that fails or something is missing in it. It stays open for ever.
std::unique_ptr<const OpenNvrtc> open_nvrtc(const std::string& path, std::string& reason) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* text = dlerror();
    reason = text != nullptr ? text : "cannot be opened";
    return nullptr;
  }
  auto opened = std::make_unique<OpenNvrtc>();
  bool is_complete = true;
  const auto get = [&]<class F>(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (function == nullptr) is_complete = false;
  };
  NvrtcApi& api = opened->api;
  get(api.get_error_string, "nvrtcGetErrorString");
  get(api.version, "nvrtcVersion");
  get(api.create_program, "nvrtcCreateProgram");
  get(api.destroy_program, "nvrtcDestroyProgram");
  get(api.compile_program, "nvrtcCompileProgram");
  get(api.get_cubin_size, "nvrtcGetCUBINSize");
  get(api.get_cubin, "nvrtcGetCUBIN");
  get(api.get_program_log_size, "nvrtcGetProgramLogSize");
  get(api.get_program_log, "nvrtcGetProgramLog");
  int major = 0;
  int minor = 0;
  if (!is_complete || api.version(&major, &minor) != 0) {
    reason = path + " is not a usable NVRTC";
  } else if (major < kOldestMajor) {
    reason = path + " is NVRTC " + std::to_string(major) + "." + std::to_string(minor) + ", expected at least " +
             std::to_string(kOldestMajor) + ".0";
  } else {
    // One name for one compiler, whether it was opened or not.
    const std::string beside = version_beside(path);
    opened->info = {path, beside.empty() ? std::to_string(major) + "." + std::to_string(minor) : beside};
    return opened;
  }
  dlclose(library);
  return nullptr;
}

// Both are published once and never destroyed. What is known may be replaced by what is open, if a file that was seen
// turns out not to work.
std::atomic<const NvrtcInfo*> the_known{nullptr};
std::atomic<const OpenNvrtc*> the_open{nullptr};

template <class T>
const T* publish(std::atomic<const T*>& slot, std::unique_ptr<const T> made) {
  const T* expected = nullptr;
  return slot.compare_exchange_strong(expected, made.get()) ? made.release() : expected;
}

// Tries one path after the other. `visit` returns the reason why it will not do; empty: it does.
template <class Visit>
bool search(std::string& searched, const Visit& visit) {
  for (const Place& place : places()) {
    std::string reasons;
    for (const std::string& path : place.paths) {
      const std::string reason = path.empty() ? "no libnvrtc.so there" : visit(path);
      if (reason.empty()) return true;
      // Of all the names that the loader does not find, one is enough.
      if (reasons.empty() || fs::path(path).has_parent_path()) reasons += "\n  " + place.name + ": " + reason;
    }
    searched += reasons.empty() ? "\n  " + place.name + ": not there" : reasons;
  }
  return false;
}

const OpenNvrtc* opened_nvrtc(std::string& searched) {
  if (const OpenNvrtc* open = the_open.load()) return open;
  const auto visit = [](const std::string& path) {
    std::string reason;
    std::unique_ptr<const OpenNvrtc> opened = open_nvrtc(path, reason);
    if (opened) publish(the_open, std::move(opened));
    return reason;
  };
  // The one whose version names the files of the cache, unless it does not work.
  const NvrtcInfo* known = the_known.load();
  if ((known == nullptr || !visit(known->path).empty()) && !search(searched, visit)) return nullptr;
  return the_open.load();
}

std::string flags_in_one_line(const std::vector<std::string>& flags) {
  std::string line;
  for (const std::string& flag : flags) line += (line.empty() ? "" : " ") + flag;
  return line;
}

// Without the lines that differ from run to run: the same source gives the same bytes.
std::string without_times(std::string_view log) {
  std::string kept;
  while (!log.empty()) {
    const size_t end = std::min(log.find('\n'), log.size() - 1) + 1;
    const std::string_view line = log.substr(0, end);
    if (line.find("Compile time =") == std::string_view::npos) kept += line;
    log.remove_prefix(end);
  }
  while (!kept.empty() && (kept.back() == '\0' || kept.back() == '\n')) kept.pop_back();
  return kept;
}

}  // namespace

std::optional<NvrtcInfo> find_nvrtc(std::string* searched) {
  if (const OpenNvrtc* open = the_open.load()) return open->info;
  if (const NvrtcInfo* known = the_known.load()) return *known;
  std::string reasons;
  const bool is_found = search(reasons, [](const std::string& path) -> std::string {
    if (const std::string version = version_beside(path); !version.empty()) {
      publish(the_known, std::make_unique<const NvrtcInfo>(NvrtcInfo{path, version}));
      return "";
    }
    std::string reason;
    std::unique_ptr<const OpenNvrtc> opened = open_nvrtc(path, reason);
    if (opened) publish(the_open, std::move(opened));
    return reason;
  });
  if (searched != nullptr) *searched = reasons;
  if (!is_found) return std::nullopt;
  return find_nvrtc();
}

Compilation run_nvrtc(const KernelSpec& spec, const std::string& arch) {
  std::string searched;
  const OpenNvrtc* nvrtc = opened_nvrtc(searched);
  if (nvrtc == nullptr) {
    throw std::runtime_error("heed has to compile " + to_text(spec) + " for " + arch +
                             ", but there is no NVRTC: `pip install nvidia-cuda-nvrtc`, or set HEED_NVRTC to the file "
                             "libnvrtc.so. Looked at:" +
                             searched);
  }
  const NvrtcApi& api = nvrtc->api;
  const auto expect = [&](nvrtcResult result, const char* call) {
    if (result != 0) throw std::runtime_error(std::string(call) + " failed: " + api.get_error_string(result));
  };

  const std::string source = entry_source(spec);
  std::vector<const char*> texts;
  std::vector<std::string> paths;
  for (const EmbeddedSource* header : transitive_headers(spec.family)) {
    texts.push_back(header->text.data());
    paths.emplace_back(header->path);
  }
  const auto pointers = [](const std::vector<std::string>& strings) {
    std::vector<const char*> list;
    list.reserve(strings.size());
    for (const std::string& string : strings) list.push_back(string.c_str());
    return list;
  };
  nvrtcProgram program = nullptr;
  expect(api.create_program(&program, source.c_str(), "heed_kernel.cu", static_cast<int>(texts.size()), texts.data(),
                            pointers(paths).data()),
         "nvrtcCreateProgram");
  struct Destroy {
    const NvrtcApi& api;
    nvrtcProgram program;
    ~Destroy() { api.destroy_program(&program); }
  } const destroy{api, program};

  const std::vector<std::string> flags = compile_flags(arch);
  const std::vector<const char*> options = pointers(flags);
  const nvrtcResult result = api.compile_program(program, static_cast<int>(options.size()), options.data());
  Compilation compilation;
  size_t bytes = 0;
  expect(api.get_program_log_size(program, &bytes), "nvrtcGetProgramLogSize");
  compilation.log.resize(bytes);
  expect(api.get_program_log(program, compilation.log.data()), "nvrtcGetProgramLog");
  compilation.log = without_times(compilation.log);
  if (result != 0) {
    throw std::runtime_error(
        "NVRTC " + nvrtc->info.version + " could not compile a kernel: " + api.get_error_string(result) +
        "\n  kernel: " + to_text(spec) + "\n  flags: " + flags_in_one_line(flags) + "\n" + compilation.log);
  }
  expect(api.get_cubin_size(program, &bytes), "nvrtcGetCUBINSize");
  compilation.cubin.resize(bytes);
  expect(api.get_cubin(program, compilation.cubin.data()), "nvrtcGetCUBIN");
  return compilation;
}

}  // namespace heed::cuda
