// Folders of kernels: which are trusted, atomic writes, locks.
#include "cuda/jit/folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <utility>

#include "cuda/jit/entry.h"
#include "cuda/jit/log.h"

namespace heed::cuda {
namespace {

constexpr off_t kMostBytes = off_t{1} << 30;
constexpr time_t kStaleSeconds = 3600;
constexpr double kMostSecondsForLock = 120;

std::string error_text(int error) { return std::strerror(error); }

// mkdir -p; what is made is private. Returns the reason, empty if the folder is there.
std::string make_folders(const std::string& path, mode_t mode) {
  for (size_t at = 1; at <= path.size(); ++at) {
    if (at < path.size() && path[at] != '/') continue;
    const std::string part = path.substr(0, at);
    if (mkdir(part.c_str(), mode) == 0 || errno == EEXIST) continue;
    const int error = errno;
    // Above the folder there may be some that we may not even look at.
    if (at == path.size()) return error_text(error);
  }
  return "";
}

int open_directory(const std::string& path, int flags) {
  return open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | flags);
}

bool write_all(int descriptor, const std::string& bytes) {
  size_t written = 0;
  while (written < bytes.size()) {
    const ssize_t count = write(descriptor, bytes.data() + written, bytes.size() - written);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    written += static_cast<size_t>(count);
  }
  return true;
}

std::string read_all(int descriptor, size_t size) {
  std::string bytes(size, '\0');
  size_t done = 0;
  while (done < size) {
    const ssize_t count = read(descriptor, &bytes[done], size - done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;  // shorter than it was: its checksum will not hold
    done += static_cast<size_t>(count);
  }
  bytes.resize(done);
  return bytes;
}

}  // namespace

Folder::Folder(Folder&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      path_(std::move(other.path_)),
      is_private_(other.is_private_) {}

Folder::~Folder() {
  if (descriptor_ >= 0) close(descriptor_);
}

std::optional<Folder> Folder::open_shipped(const std::string& path) {
  const int descriptor = open_directory(path, 0);
  if (descriptor < 0) return std::nullopt;
  return Folder(descriptor, path, false);
}

Folder Folder::create_shipped(const std::string& path) {
  const std::string reason = make_folders(path, 0755);
  const int descriptor = reason.empty() ? open_directory(path, 0) : -1;
  if (descriptor < 0) {
    throw std::runtime_error("cannot write to the folder " + path + ": " +
                             (reason.empty() ? error_text(errno) : reason));
  }
  return {descriptor, path, false};
}

std::optional<Folder> Folder::open_private(const std::string& path, std::string& refusal) {
  const std::string reason = make_folders(path, 0700);
  const int descriptor = reason.empty() ? open_directory(path, 0) : -1;
  if (descriptor < 0) {
    log_verbose("jit: no cache in " + path + ": " + (reason.empty() ? error_text(errno) : reason));
    return std::nullopt;
  }
  Folder folder(descriptor, path, true);
  struct stat status {};
  if (fstat(descriptor, &status) != 0) {
    refusal = error_text(errno);
  } else if (status.st_uid != geteuid()) {
    refusal = "it belongs to another user (uid " + std::to_string(status.st_uid) + ")";
  } else if ((status.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    refusal = "others may write to it (chmod go-w would do)";
  }
  if (!refusal.empty()) return std::nullopt;
  return folder;
}

std::optional<Folder> Folder::open_user_cache() {
  std::vector<std::string> paths;
  if (const std::string asked = environment("HEED_CACHE_DIR"); !asked.empty()) paths.push_back(asked);
  const std::string xdg = environment("XDG_CACHE_HOME");
  const std::string home = environment("HOME");
  if (!xdg.empty() && xdg[0] == '/') {  // the standard says to ignore a relative one
    paths.push_back(xdg + "/heed");
  } else if (!home.empty() && home[0] == '/') {
    paths.push_back(home + "/.cache/heed");
  }
  const std::string tmp = environment("TMPDIR");
  paths.push_back((tmp.empty() ? "/tmp" : tmp) + "/heed-cache-" + std::to_string(geteuid()));

  std::string refused;
  for (const std::string& path : paths) {
    std::string refusal;
    std::optional<Folder> folder = open_private(path, refusal);
    if (!refusal.empty()) {
      refused.append("not using the kernel cache ").append(path).append(": ").append(refusal).append("; ");
    } else if (folder) {
      if (!refused.empty()) warn_once(refused.append("using ").append(path).append(" instead"));
      return folder;
    }
  }
  if (!refused.empty()) warn_once(refused.append("kernels that are compiled will not be kept"));
  return std::nullopt;
}

std::vector<std::string> Folder::file_names() const {
  std::vector<std::string> names;
  // A descriptor of its own: its position would be shared with a duplicate.
  const int descriptor = openat(descriptor_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR* stream = descriptor >= 0 ? fdopendir(descriptor) : nullptr;
  if (stream == nullptr) {
    if (descriptor >= 0) close(descriptor);
    return names;
  }
  while (const dirent* entry = readdir(stream)) names.emplace_back(entry->d_name);
  closedir(stream);
  std::sort(names.begin(), names.end());
  return names;
}

std::optional<std::string> Folder::read(const std::string& name) const {
  const int no_links = is_private_ ? O_NOFOLLOW : 0;
  const int file = openat(descriptor_, name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | no_links);
  if (file < 0) return std::nullopt;
  std::optional<std::string> bytes;
  struct stat status {};
  const bool is_there = fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size <= kMostBytes;
  const bool is_ours = status.st_uid == geteuid() && (status.st_mode & (S_IWGRP | S_IWOTH)) == 0;
  if (is_there && (is_ours || !is_private_)) bytes = read_all(file, static_cast<size_t>(status.st_size));
  close(file);
  return bytes;
}

std::string Folder::write(const std::string& name, const std::string& bytes) const {
  static std::atomic<unsigned> counter{0};
  remove_stale_files();
  std::string temporary;
  int file = -1;
  do {  // names of another machine's processes may be there: try the next
    temporary = name + "." + std::to_string(getpid()) + "-" + std::to_string(counter.fetch_add(1));
    temporary += kTemporarySuffix;
    file = openat(descriptor_, temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, is_private_ ? 0600 : 0644);
  } while (file < 0 && errno == EEXIST);
  if (file < 0) return error_text(errno);
  int error = 0;
  if (!write_all(file, bytes) || fsync(file) != 0) error = errno != 0 ? errno : EIO;
  if (close(file) != 0 && error == 0) error = errno;
  if (error == 0 && renameat(descriptor_, temporary.c_str(), descriptor_, name.c_str()) != 0) error = errno;
  if (error != 0) unlinkat(descriptor_, temporary.c_str(), 0);
  return error == 0 ? "" : error_text(error);
}

bool Folder::remove(const std::string& name) const { return unlinkat(descriptor_, name.c_str(), 0) == 0; }

void Folder::remove_stale_files() const {
  static std::atomic<pid_t> done_by{0};
  if (done_by.exchange(getpid()) == getpid()) return;  // once per process is enough
  for (const std::string& name : file_names()) {
    if (!is_leftover_name(name) || !name.ends_with(kTemporarySuffix)) continue;
    struct stat status {};
    if (fstatat(descriptor_, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
    if (status.st_mtime < time(nullptr) - kStaleSeconds) remove(name);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

FileLock::FileLock(const Folder& folder, const std::string& name)
    : folder_(folder), name_(name + std::string(kLockSuffix)) {
  const double deadline = seconds_now() + kMostSecondsForLock;
  useconds_t pause = 500;
  while (seconds_now() < deadline) {
    const int file = openat(folder_.descriptor_, name_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (file < 0) return;  // a read-only folder: everybody for himself
    bool is_locked = false;
    while (!(is_locked = flock(file, LOCK_EX | LOCK_NB) == 0) && (errno == EWOULDBLOCK || errno == EINTR) &&
           seconds_now() < deadline) {
      usleep(pause);
      pause = std::min<useconds_t>(pause * 2, 20000);
    }
    // Whoever held it before us removed the file: a newer one may be locked by somebody else.
    struct stat status {};
    if (is_locked && fstat(file, &status) == 0 && status.st_nlink > 0) {
      descriptor_ = file;
      return;
    }
    close(file);
    if (!is_locked) return;  // a file system without locks, or out of time
  }
}

FileLock::~FileLock() {
  if (descriptor_ < 0) return;
  folder_.remove(name_);
  close(descriptor_);
}

}  // namespace heed::cuda
