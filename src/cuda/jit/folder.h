// A folder that holds kernels: checked when it is opened, read and written through its descriptor, so that nobody can
// put another folder in its place in between. Nothing here throws for what a disk does: losing a cache costs speed.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace heed::cuda {

// What stands behind an entry's name while it is written, and of its lock.
inline constexpr std::string_view kTemporarySuffix = ".tmp";
inline constexpr std::string_view kLockSuffix = ".lock";

class Folder {
 public:
  // Opens a folder that others may have made, such as one of shipped kernels. Nothing if it is not there.
  static std::optional<Folder> open_shipped(const std::string& path);
  // Makes and opens a folder to put kernels into that are to be shipped. Throws std::runtime_error.
  static Folder create_shipped(const std::string& path);
  // Opens the user's cache, made if need be: HEED_CACHE_DIR, or heed under XDG_CACHE_HOME. A folder that others own or
  // may write to is refused with a warning, and the next one of the list (last: one under TMPDIR) is used. Nothing if
  // none can be had.
  static std::optional<Folder> open_user_cache();

  Folder(Folder&& other) noexcept;
  Folder& operator=(Folder&&) = delete;
  ~Folder();

  const std::string& path() const { return path_; }
  std::vector<std::string> file_names() const;  // sorted
  std::optional<std::string> read(const std::string& name) const;
  // All of the file or nothing of it, also if the process is killed: a temporary file, fsync, rename. On failure the
  // reason is returned; empty: it is written.
  std::string write(const std::string& name, const std::string& bytes) const;
  bool remove(const std::string& name) const;

 private:
  friend class FileLock;
  Folder(int descriptor, std::string path, bool is_private)
      : descriptor_(descriptor), path_(std::move(path)), is_private_(is_private) {}
  static std::optional<Folder> open_private(const std::string& path, std::string& refusal);
  void remove_stale_files() const;

  int descriptor_;
  std::string path_;
  bool is_private_;  // its files are read only if nobody else may have written them
};

// Holds a file's lock against all threads and processes that ask for it, where locks can be had. Waits; gives up after
// two minutes. The kernel frees the lock of a process that dies.
class FileLock {
 public:
  FileLock(const Folder& folder, const std::string& name);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;
  bool is_held() const { return descriptor_ >= 0; }

 private:
  const Folder& folder_;
  std::string name_;
  int descriptor_ = -1;
};

}  // namespace heed::cuda
