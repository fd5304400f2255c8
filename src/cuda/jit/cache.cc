// Listing, checking and emptying folders of kernels.
#include "cuda/jit/cache.h"

#include <algorithm>
#include <tuple>

#include "cuda/jit/entry.h"
#include "cuda/jit/folder.h"

namespace heed::cuda {
namespace {

StoredFile inspect(const Folder& folder, const std::string& name) {
  StoredFile file;
  file.name = name;
  const std::optional<std::string> bytes = folder.read(name);
  if (!bytes) {
    file.error = "it cannot be read, or others may have written it";
    return file;
  }
  file.bytes = static_cast<int64_t>(bytes->size());
  std::optional<Entry> entry = parse_entry(*bytes, file.error);
  if (!entry) return file;
  file.spec = entry->spec;
  file.arch = entry->arch;
  file.compiler = entry->compiler;
  if (name.substr(0, entry->id.size()) != entry->id) file.error = "it holds another kernel than its name says";
  if (file.error.empty()) to_compiled_kernel(std::move(entry->cubin), "", file.error);
  return file;
}

}  // namespace

std::string cache_dir() {
  const std::optional<Folder> folder = Folder::open_user_cache();
  return folder ? folder->path() : "";
}

std::vector<StoredFile> stored_files(const std::string& path) {
  const std::optional<Folder> folder = path.empty() ? Folder::open_user_cache() : Folder::open_shipped(path);
  std::vector<StoredFile> files;
  if (!folder) return files;
  for (const std::string& name : folder->file_names()) {
    if (is_entry_name(name)) files.push_back(inspect(*folder, name));
  }
  std::sort(files.begin(), files.end(), [](const StoredFile& a, const StoredFile& b) {
    return std::tie(a.spec, a.arch, a.name) < std::tie(b.spec, b.arch, b.name);
  });
  return files;
}

int64_t remove_stored_files(bool only_damaged) {
  const std::optional<Folder> folder = Folder::open_user_cache();
  if (!folder) return 0;
  int64_t count = 0;
  for (const std::string& name : folder->file_names()) {
    const bool is_wanted = is_entry_name(name) && only_damaged && inspect(*folder, name).error.empty();
    if (is_wanted || (!is_entry_name(name) && !is_leftover_name(name))) continue;
    if (folder->remove(name)) ++count;
  }
  return count;
}

}  // namespace heed::cuda
