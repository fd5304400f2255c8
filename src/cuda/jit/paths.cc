// Folders relative to the library and to Python's packages.
#include "cuda/jit/paths.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <filesystem>

#include "cuda/jit/log.h"

namespace heed::cuda {
namespace {

namespace fs = std::filesystem;

// Published whole and never freed: readers need no lock.
std::atomic<const std::vector<std::string>*> the_site_dirs{nullptr};

// The folder of libheed.so; empty if the loader does not say.
fs::path library_dir() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&set_site_dirs), &info) == 0 || info.dli_fname == nullptr) return {};
  std::error_code error;
  const fs::path file = fs::absolute(info.dli_fname, error);
  return error ? fs::path() : file.parent_path();
}

}  // namespace

std::vector<std::string> site_dirs() {
  std::vector<std::string> folders;
  if (const std::vector<std::string>* set = the_site_dirs.load()) folders = *set;
  const fs::path library = library_dir();  // site-packages/heed/lib
  if (!library.empty()) {
    const std::string site = library.parent_path().parent_path().string();
    if (std::find(folders.begin(), folders.end(), site) == folders.end()) folders.push_back(site);
  }
  return folders;
}

void set_site_dirs(std::vector<std::string> folders) {
  the_site_dirs.store(new std::vector<std::string>(std::move(folders)));
}

std::vector<std::string> ahead_of_time_dirs() {
  std::vector<std::string> folders;
  if (const std::string folder = environment("HEED_AOT_DIR"); !folder.empty()) folders.push_back(folder);
  const fs::path library = library_dir();
  if (!library.empty()) folders.push_back((library / "heed-kernels").string());
  return folders;
}

}  // namespace heed::cuda
