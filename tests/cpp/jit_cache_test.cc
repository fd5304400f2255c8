// Compiling through the cache, under torture: races, damage, folders that fail, errors. Needs NVRTC and no GPU; skipped
// without one.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <random>
#include <stdexcept>
#include <thread>

#include "cuda/jit/cache.h"
#include "cuda/jit/cubin.h"
#include "cuda/jit/entry.h"
#include "cuda/jit/jit.h"
#include "cuda/jit/nvrtc.h"
#include "cuda/jit/sources.h"
#include "heed/heed.h"
#include "jit_folders.h"

namespace heed::cuda {
namespace {

const KernelSpec kSpec{"probe", "Probe<64>"};

class CompilingCache : public Cache {
 protected:
  void SetUp() override {
    Cache::SetUp();
    if (!find_nvrtc()) GTEST_SKIP() << "there is no NVRTC on this machine";
  }
};

// As a user who is not root: permissions do not hold root back.
void become_other_user() {
  if (geteuid() != 0) return;
  if (setgid(kOtherUser) != 0 || setuid(kOtherUser) != 0) throw std::runtime_error("cannot change the user");
}

TEST_F(CompilingCache, CompilesOnceThenReads) {
  const CompiledKernel first = compile(kSpec, "sm_90a");
  EXPECT_EQ(first.origin, "compiled");
  EXPECT_EQ(first.num_threads, 64);
  EXPECT_EQ(first.shared_bytes, 256);
  const CompiledKernel second = compile(kSpec, "sm_90a");
  EXPECT_EQ(second.origin, "cache");
  EXPECT_EQ(second.cubin, first.cubin);
  EXPECT_EQ(second.log, first.log);
  EXPECT_EQ(second.num_threads, 64);
  EXPECT_EQ(second.shared_bytes, 256);
  EXPECT_EQ(compile(kSpec, "sm_80").origin, "compiled");
  EXPECT_EQ(compile({"probe", "Probe<96>"}, "sm_90a").origin, "compiled");
  EXPECT_EQ(files_in(cache_).size(), 3U);
}

TEST_F(CompilingCache, TheLogTellsRegistersAndSpills) {
  for (int repeat = 0; repeat < 2; ++repeat) {  // compiled, then from the cache
    const std::string log = compile(kSpec, "sm_90a").log;
    EXPECT_NE(log.find(" registers"), std::string::npos) << log;
    EXPECT_NE(log.find("0 bytes spill stores, 0 bytes spill loads"), std::string::npos) << log;
  }
}

TEST_F(CompilingCache, TheSameKernelGivesTheSameFile) {
  compile_to_folder(kSpec, "sm_90a", (root_ / "one").string());
  compile_to_folder(kSpec, "sm_90a", (root_ / "two").string());
  ASSERT_EQ(files_in(root_ / "one").size(), 1U);
  ASSERT_EQ(files_in(root_ / "two").size(), 1U);
  EXPECT_EQ(read_file(files_in(root_ / "one")[0]), read_file(files_in(root_ / "two")[0]));
}

TEST_F(CompilingCache, DamagedEntriesAreCompiledAnewAndReplaced) {
  const std::string cubin = compile(kSpec, "sm_90a").cubin;
  const fs::path file = files_in(cache_)[0];
  const std::string good = read_file(file);
  std::mt19937 random(0);
  for (int repeat = 0; repeat < 24; ++repeat) {
    std::string bytes = good;
    if (repeat % 2 == 0) {
      bytes.resize(random() % bytes.size());
    } else {
      const size_t bit = random() % (bytes.size() * 8);
      bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ (1 << bit % 8));
    }
    write_file(file, bytes);
    const CompiledKernel kernel = compile(kSpec, "sm_90a");
    ASSERT_EQ(kernel.origin, "compiled") << repeat;
    ASSERT_EQ(kernel.cubin, cubin) << repeat;
    ASSERT_EQ(read_file(file), good) << repeat;
  }
}

// Good files under another kernel's name: of another spec, and of the same spec with other device code.
TEST_F(CompilingCache, SwappedEntriesAreNotBelieved) {
  compile(kSpec, "sm_90a");
  const fs::path file = files_in(cache_)[0];
  const std::string good = read_file(file);
  const KernelSpec other{"probe", "Probe<96>"};
  fs::copy_file(file, cache_ / (content_id(other, "sm_90a") + file.filename().string().substr(32)));
  const CompiledKernel kernel = compile(other, "sm_90a");
  EXPECT_EQ(kernel.origin, "compiled");
  EXPECT_EQ(kernel.num_threads, 96);

  std::string reason;
  std::optional<Entry> entry = parse_entry(good, reason);
  ASSERT_TRUE(entry) << reason;
  entry->id = std::string(32, '0');
  write_file(file, to_bytes(*entry));
  EXPECT_EQ(compile(kSpec, "sm_90a").origin, "compiled");
  EXPECT_EQ(read_file(file), good);
}

TEST_F(CompilingCache, SixteenProcessesCompileAKeyOnce) {
  for (int repeat = 0; repeat < 3; ++repeat) {
    const KernelSpec spec{"probe", "Probe<64, " + std::to_string(repeat) + ">"};
    int gate[2];
    ASSERT_EQ(pipe(gate), 0);
    std::vector<pid_t> children;
    for (int c = 0; c < 16; ++c) {
      children.push_back(fork());
      if (children.back() != 0) continue;
      alarm(60);
      close(gate[1]);
      char byte;
      (void)!read(gate[0], &byte, 1);  // all start when the parent closes its end
      int status = 3;
      try {
        const CompiledKernel kernel = compile(spec, "sm_90a");
        if (kernel.num_threads == 64) status = kernel.origin == "compiled" ? 1 : kernel.origin == "cache" ? 0 : 2;
      } catch (const std::exception&) {
      }
      _exit(status);
    }
    close(gate[0]);
    close(gate[1]);
    int num_compiled = 0;
    for (pid_t child : children) {
      int status = -1;
      waitpid(child, &status, 0);
      ASSERT_TRUE(WIFEXITED(status));
      ASSERT_LE(WEXITSTATUS(status), 1);
      num_compiled += WEXITSTATUS(status);
    }
    EXPECT_EQ(num_compiled, 1);
    EXPECT_EQ(files_in(cache_).size(), repeat + 1U);
  }
}

TEST_F(CompilingCache, SixteenThreadsCompileAKeyOnce) {
  std::atomic<int> num_compiled{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([&] { num_compiled += compile(kSpec, "sm_90a").origin == "compiled" ? 1 : 0; });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_compiled, 1);
}

TEST_F(CompilingCache, AForkedChildCompilesToo) {
  compile(kSpec, "sm_90a");  // the compiler is open in the parent
  EXPECT_EQ(in_child([&] { return compile({"probe", "Probe<128>"}, "sm_90a").num_threads == 128 ? 0 : 1; }), 0);
}

TEST_F(CompilingCache, AReadOnlyFolderIsReadAndCostsOnlySpeed) {
  const std::string cubin = compile(kSpec, "sm_90a").cubin;
  const uid_t user = geteuid() == 0 ? kOtherUser : geteuid();
  ASSERT_EQ(chown(files_in(cache_)[0].c_str(), user, getegid()), 0);
  ASSERT_EQ(chown(cache_.c_str(), user, getegid()), 0);
  ASSERT_EQ(chmod(cache_.c_str(), 0500), 0);
  EXPECT_EQ(in_child([&] {
              become_other_user();
              if (compile(kSpec, "sm_90a").origin != "cache") return 1;
              for (int repeat = 0; repeat < 2; ++repeat) {  // each time anew
                const CompiledKernel kernel = compile({"probe", "Probe<96>"}, "sm_90a");
                if (kernel.origin != "compiled" || kernel.num_threads != 96) return 2;
              }
              return 0;
            }),
            0);
  ASSERT_EQ(chmod(cache_.c_str(), 0700), 0);
  EXPECT_EQ(files_in(cache_).size(), 1U);
}

// Stands for a full disk: the system ends a write in the middle.
TEST_F(CompilingCache, AFullDiskCostsOnlySpeed) {
  EXPECT_EQ(in_child([&] {
              std::signal(SIGXFSZ, SIG_IGN);
              const rlimit limit{1000, 1000};
              if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
              for (int repeat = 0; repeat < 2; ++repeat) {
                if (compile(kSpec, "sm_90a").origin != "compiled") return 2;
              }
              return 0;
            }),
            0);
  EXPECT_TRUE(files_in(cache_).empty());
}

TEST_F(CompilingCache, WithoutAFolderEveryCallCompiles) {
  unsetenv("HEED_CACHE_DIR");
  setenv("XDG_CACHE_HOME", "/proc", 1);
  setenv("TMPDIR", "/proc", 1);
  for (int repeat = 0; repeat < 2; ++repeat) EXPECT_EQ(compile(kSpec, "sm_90a").origin, "compiled");
}

TEST_F(CompilingCache, AFolderThatGoesAwayIsMadeAnew) {
  compile(kSpec, "sm_90a");
  fs::remove_all(cache_);
  EXPECT_EQ(compile(kSpec, "sm_90a").origin, "compiled");
  EXPECT_EQ(compile(kSpec, "sm_90a").origin, "cache");
}

TEST_F(CompilingCache, ShippedKernelsComeFirst) {
  const StoredKernel shipped = compile_to_folder(kSpec, "sm_90a", (root_ / "aot").string());
  EXPECT_EQ(shipped.kernel.origin, "compiled");
  EXPECT_EQ(compile_to_folder(kSpec, "sm_90a", (root_ / "aot").string()).kernel.origin, "ahead of time");
  const CompiledKernel kernel = compile(kSpec, "sm_90a");
  EXPECT_EQ(kernel.origin, "ahead of time");
  EXPECT_EQ(kernel.cubin, shipped.kernel.cubin);
  EXPECT_EQ(compile(kSpec, "sm_80").origin, "compiled");  // another architecture
  write_file(shipped.file, read_file(shipped.file).substr(0, 400));
  EXPECT_EQ(compile(kSpec, "sm_90a").origin, "compiled");  // a damaged one is passed over
}

TEST_F(CompilingCache, ErrorsCarryTheLogTheSpecAndTheFlags) {
  try {
    compile({"probe", "Probe<33>"}, "sm_90a");
    FAIL() << "compiled";
  } catch (const std::runtime_error& error) {
    const std::string text = error.what();
    for (const char* part : {"probe Probe<33>", "--gpu-architecture=sm_90a", "-std=c++20", "expected whole warps",
                             "cuda/device/probe.cuh(", "NVRTC_ERROR_COMPILATION"}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " is missing in:\n" << text;
    }
  }
  EXPECT_THROW(compile({"probe", "Nothing"}, "sm_90a"), std::runtime_error);
  EXPECT_THROW(compile(kSpec, "sm_10"), std::runtime_error);  // no compiler knows it
  EXPECT_TRUE(files_in(cache_).empty());
}

// What compile() writes to stderr, which is a terminal.
TEST_F(CompilingCache, APersonWhoWaitsSeesALine) {
  const int ours = posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_GE(ours, 0);
  ASSERT_EQ(grantpt(ours) | unlockpt(ours), 0);
  const int theirs = open(ptsname(ours), O_RDWR | O_NOCTTY);
  ASSERT_GE(theirs, 0);
  ASSERT_EQ(in_child([&] {
              dup2(theirs, STDERR_FILENO);
              compile(kSpec, "sm_90a");
              compile(kSpec, "sm_90a");          // found: nobody waits
              compile_to_cache(kSpec, "sm_80");  // a command has a bar of its own
              return 0;
            }),
            0);
  close(theirs);
  char buffer[4096];
  const ssize_t count = read(ours, buffer, sizeof(buffer));
  close(ours);
  ASSERT_GT(count, 0);
  const std::string text(buffer, static_cast<size_t>(count));
  EXPECT_EQ(text.find("heed: compiling probe for sm_90a ...\r\x1b[Kheed: compiled probe for sm_90a (0."), 0U) << text;
  EXPECT_EQ(text.find(" s)\r\n"), text.size() - 5) << text;
  EXPECT_EQ(stderr_of([] { compile({"probe", "Probe<256>"}, "sm_90a"); }), "");  // no terminal: silent
}

TEST_F(CompilingCache, ListsVerifiesAndEmpties) {
  compile(kSpec, "sm_90a");
  compile(kSpec, "sm_80");
  const std::string id(32, '0');
  write_file(cache_ / (id + ".kernel"), "nonsense");
  write_file(cache_ / (id + "-nvrtc13.0.kernel.123-4.tmp"), "left by a kill");
  write_file(cache_ / (id + "-nvrtc13.0.kernel.lock"), "");
  write_file(cache_ / "notes.txt", "of the user");
  const std::vector<StoredFile> files = stored_files();
  ASSERT_EQ(files.size(), 3U);
  EXPECT_NE(files[0].error, "");
  EXPECT_EQ(files[1].arch, "sm_80");
  EXPECT_EQ(files[2].spec, "probe Probe<64>");
  EXPECT_EQ(files[2].error, "");
  EXPECT_EQ(remove_stored_files(true), 3);
  EXPECT_EQ(files_in(cache_).size(), 3U);
  EXPECT_EQ(remove_stored_files(false), 2);
  EXPECT_EQ(files_in(cache_), std::vector<fs::path>{cache_ / "notes.txt"});
}

// Every bit of a real cubin's tables: it is refused or gives some number, and nothing is read outside of it.
TEST_F(CompilingCache, DamagedCubinsAreHarmless) {
  const std::string cubin = compile(kSpec, "sm_90a").cubin;
  EXPECT_EQ(cubin_constant(cubin, "heed_num_threads"), 64);
  EXPECT_EQ(cubin_constant(cubin, "heed_shared_bytes"), 256);
  EXPECT_FALSE(cubin_constant(cubin, "heed_nothing"));
  EXPECT_FALSE(cubin_constant(cubin, "heed_num_thread"));
  EXPECT_FALSE(cubin_constant(cubin, "heed_kernel"));  // code, not a constant
  for (size_t bit = 0; bit < cubin.size() * 8; ++bit) {
    std::string damaged = cubin;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    cubin_constant(damaged, "heed_num_threads");
  }
  for (size_t size = 0; size < cubin.size(); size += 7) cubin_constant(cubin.substr(0, size), "heed_shared_bytes");
}

}  // namespace
}  // namespace heed::cuda
