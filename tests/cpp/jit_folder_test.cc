// Folders of kernels under torture: kills while writing, locks, folders that cannot be used or trusted. Needs no
// compiler.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <random>
#include <thread>

#include "cuda/jit/cache.h"
#include "cuda/jit/entry.h"
#include "cuda/jit/folder.h"
#include "jit_folders.h"

namespace heed::cuda {
namespace {

void make_old(const fs::path& file) {
  const timespec old[2] = {{time(nullptr) - 7200, 0}, {time(nullptr) - 7200, 0}};
  ASSERT_EQ(utimensat(AT_FDCWD, file.c_str(), old, 0), 0);
}

TEST_F(Cache, KilledWriterLeavesAWholeFileOrNone) {
  const std::string name = shipped_entry_name(std::string(32, 'a'));
  std::mt19937 random(static_cast<unsigned>(std::random_device()()));
  std::vector<std::string> versions;
  for (char fill : {'a', 'b', 'c'}) {
    Entry entry{std::string(32, fill), "probe Probe<64>", "sm_90a", "nvrtc 13.0", "log", std::string(1 << 20, fill)};
    versions.push_back(to_bytes(entry));
  }
  int num_whole = 0;
  for (int repeat = 0; repeat < 200; ++repeat) {
    std::error_code error;
    if (repeat % 4 == 0) fs::remove(cache_ / name, error);
    const pid_t child = fork();
    if (child == 0) {
      const std::optional<Folder> folder = Folder::open_user_cache();
      for (size_t i = 0;; ++i) folder->write(name, versions[i % 3]);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 12000));
    ASSERT_EQ(kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    const std::optional<Folder> folder = Folder::open_user_cache();
    const std::optional<std::string> bytes = folder->read(name);
    if (!bytes) continue;
    ++num_whole;
    std::string reason;
    ASSERT_TRUE(parse_entry(*bytes, reason)) << reason;
    ASSERT_NE(std::find(versions.begin(), versions.end(), *bytes), versions.end());
  }
  EXPECT_GT(num_whole, 20);  // else the writers were killed before they did anything
  // What they left behind goes away, once it is old enough to be nobody's.
  std::vector<fs::path> leftovers;
  for (const fs::path& file : files_in(cache_)) {
    if (!file.string().ends_with(".tmp")) continue;
    leftovers.push_back(file);
    make_old(file);
  }
  EXPECT_GT(leftovers.size(), 0U);
  ASSERT_EQ(in_child([&] { return Folder::open_user_cache()->write(name, versions[0]) == "" ? 0 : 1; }), 0);
  EXPECT_EQ(files_in(cache_), std::vector<fs::path>{cache_ / name});
}

// The folder may be one that other programs use too.
TEST_F(Cache, FilesOfOtherProgramsStay) {
  const std::string name = shipped_entry_name(std::string(32, 'a'));
  const std::string ours = name + ".123-4.tmp";
  ASSERT_NE(cache_dir(), "");
  std::vector<fs::path> theirs;
  for (const char* other : {"editor.tmp", "entry.kernel", "entry.kernel.123-4.tmp", "notes.lock"}) {
    theirs.push_back(cache_ / other);
  }
  for (const fs::path& file : theirs) write_file(file, "another program's");
  write_file(cache_ / ours, "left by a kill");
  for (const fs::path& file : files_in(cache_)) make_old(file);
  ASSERT_EQ(in_child([&] { return Folder::open_user_cache()->write(name, "bytes") == "" ? 0 : 1; }), 0);
  EXPECT_FALSE(fs::exists(cache_ / ours));
  EXPECT_EQ(remove_stored_files(false), 1);
  EXPECT_EQ(files_in(cache_), theirs);
}

TEST_F(Cache, AFreshFolderIsPrivateAndItsParentsAreMade) {
  setenv("HEED_CACHE_DIR", (root_ / "a/b/c").c_str(), 1);
  ASSERT_EQ(cache_dir(), (root_ / "a/b/c").string());
  struct stat status {};
  ASSERT_EQ(stat((root_ / "a/b/c").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0700U);
}

TEST_F(Cache, DefaultFoldersFollowTheStandard) {
  unsetenv("HEED_CACHE_DIR");
  EXPECT_EQ(cache_dir(), (root_ / "xdg/heed").string());
  setenv("XDG_CACHE_HOME", "relative", 1);  // the standard: ignore it
  setenv("HOME", (root_ / "home").c_str(), 1);
  EXPECT_EQ(cache_dir(), (root_ / "home/.cache/heed").string());
}

TEST_F(Cache, WorldWritableFoldersAreRefused) {
  for (mode_t mode : {0777, 01777, 0702, 0720}) {
    const fs::path folder = root_ / ("mode" + std::to_string(mode));
    fs::create_directory(folder);
    ASSERT_EQ(chmod(folder.c_str(), mode), 0);
    setenv("HEED_CACHE_DIR", folder.c_str(), 1);
    std::string used;
    const std::string said = stderr_of([&] {
      used = cache_dir();
      EXPECT_EQ(cache_dir(), used);  // said once
    });
    EXPECT_EQ(used, (root_ / "xdg/heed").string());
    EXPECT_NE(said.find("heed: warning: not using the kernel cache " + folder.string()), std::string::npos) << said;
    EXPECT_NE(said.find("others may write to it"), std::string::npos) << said;
    EXPECT_EQ(said.find("warning"), said.rfind("warning")) << said;
    EXPECT_TRUE(files_in(folder).empty());
  }
}

TEST_F(Cache, FoldersOfOtherUsersAreRefused) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can give a folder away";
  fs::create_directory(cache_);
  ASSERT_EQ(chmod(cache_.c_str(), 0755), 0);
  ASSERT_EQ(chown(cache_.c_str(), kOtherUser, kOtherUser), 0);
  std::string used;
  const std::string said = stderr_of([&] { used = cache_dir(); });
  EXPECT_EQ(used, (root_ / "xdg/heed").string());
  EXPECT_NE(said.find("it belongs to another user (uid 65534)"), std::string::npos) << said;
}

// One in the place that everybody can write to, which somebody else has made first.
TEST_F(Cache, WithNoFolderToTrustNothingIsKept) {
  unsetenv("HEED_CACHE_DIR");
  for (const fs::path& folder : {root_ / "xdg/heed", root_ / "tmp" / ("heed-cache-" + std::to_string(geteuid()))}) {
    fs::create_directories(folder);
    ASSERT_EQ(chmod(folder.c_str(), 0777), 0);
  }
  std::string used = "?";
  const std::string said = stderr_of([&] { used = cache_dir(); });
  EXPECT_EQ(used, "");
  EXPECT_NE(said.find("will not be kept"), std::string::npos) << said;
}

TEST_F(Cache, AFolderThatCannotBeMadeIsReplacedSilently) {
  setenv("HEED_CACHE_DIR", "/proc/heed", 1);
  std::string used;
  EXPECT_EQ(stderr_of([&] { used = cache_dir(); }), "");
  EXPECT_EQ(used, (root_ / "xdg/heed").string());
  write_file(root_ / "file", "not a folder");
  setenv("HEED_CACHE_DIR", (root_ / "file").c_str(), 1);
  EXPECT_EQ(cache_dir(), (root_ / "xdg/heed").string());
}

TEST_F(Cache, FilesThatOthersMayHaveWrittenAreNotRead) {
  const std::optional<Folder> folder = Folder::open_user_cache();
  ASSERT_EQ(folder->write("entry.kernel", "bytes"), "");
  EXPECT_EQ(folder->read("entry.kernel"), "bytes");
  ASSERT_EQ(chmod((cache_ / "entry.kernel").c_str(), 0666), 0);
  EXPECT_FALSE(folder->read("entry.kernel"));
  ASSERT_EQ(chmod((cache_ / "entry.kernel").c_str(), 0600), 0);
  fs::create_symlink("entry.kernel", cache_ / "link.kernel");
  EXPECT_FALSE(folder->read("link.kernel"));
  ASSERT_EQ(mkfifo((cache_ / "pipe.kernel").c_str(), 0600), 0);
  EXPECT_FALSE(folder->read("pipe.kernel"));  // nor does it wait for somebody to write
  if (geteuid() == 0) {
    ASSERT_EQ(chown((cache_ / "entry.kernel").c_str(), kOtherUser, kOtherUser), 0);
    EXPECT_FALSE(folder->read("entry.kernel"));
  }
}

TEST_F(Cache, LocksExcludeThreadsAndProcessesAndLeaveNoFile) {
  const std::optional<Folder> folder = Folder::open_user_cache();
  const std::string counter = (root_ / "counter").string();
  write_file(counter, "0");
  const auto count_up = [&] {  // not atomic, but under the lock
    const FileLock lock(*folder, "key");
    ASSERT_TRUE(lock.is_held());
    const int value = std::stoi(read_file(counter));
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    write_file(counter, std::to_string(value + 1));
  };
  std::vector<pid_t> children;
  for (int c = 0; c < 8; ++c) {
    children.push_back(fork());
    if (children.back() == 0) {
      alarm(60);
      for (int i = 0; i < 25; ++i) count_up();
      _exit(::testing::Test::HasFailure() ? 1 : 0);
    }
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 25; ++i) count_up();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (pid_t child : children) {
    int status = -1;
    waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(read_file(counter), std::to_string(12 * 25));
  EXPECT_TRUE(files_in(cache_).empty());
}

TEST_F(Cache, LockOfADeadProcessIsFree) {
  const std::optional<Folder> folder = Folder::open_user_cache();
  const pid_t child = fork();
  if (child == 0) {
    const FileLock lock(*folder, "key");
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_EQ(files_in(cache_), std::vector<fs::path>{cache_ / "key.lock"});
  EXPECT_TRUE(FileLock(*folder, "key").is_held());
}

}  // namespace
}  // namespace heed::cuda
