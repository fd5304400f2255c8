// What the tests of kernel folders share: a cache of their own, files, children.
#pragma once

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace heed::cuda {

namespace fs = std::filesystem;

inline constexpr uid_t kOtherUser = 65534;

// A folder of its own for each test; HEED_CACHE_DIR points into it.
class Cache : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "heed-jit-test-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
    ASSERT_EQ(chmod(name.c_str(), 0755), 0);  // tests that become another user have to get there
    cache_ = root_ / "cache";
    setenv("HEED_CACHE_DIR", cache_.c_str(), 1);
    setenv("XDG_CACHE_HOME", (root_ / "xdg").c_str(), 1);
    setenv("TMPDIR", (root_ / "tmp").c_str(), 1);
    setenv("HEED_AOT_DIR", (root_ / "aot").c_str(), 1);
  }
  void TearDown() override {
    for (const char* name : {"HEED_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR", "HEED_AOT_DIR"}) unsetenv(name);
    std::error_code error;
    fs::remove_all(root_, error);
  }

  std::vector<fs::path> files_in(const fs::path& folder) const {
    std::vector<fs::path> files;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(folder, error)) files.push_back(entry.path());
    std::sort(files.begin(), files.end());
    return files;
  }

  fs::path root_, cache_;
};

inline std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

inline void write_file(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

// Runs the body in a child process; its return value is the exit status. Those above 63 mean that it threw.
inline int in_child(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    int status = 64;
    try {
      status = body();
    } catch (const std::exception& error) {
      fprintf(stderr, "%s\n", error.what());
    }
    _exit(status);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// Runs with stderr in a string.
inline std::string stderr_of(const std::function<void()>& body) {
  ::testing::internal::CaptureStderr();
  body();
  return ::testing::internal::GetCapturedStderr();
}

}  // namespace heed::cuda
