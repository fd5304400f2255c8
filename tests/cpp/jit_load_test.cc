// Loading and launching, against a driver that is made up: what is asked of it, in which context, how often, what
// happens when it fails, and how long a lookup takes. Compiling needs NVRTC.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "cuda/jit/jit.h"
#include "cuda/jit/nvrtc.h"
#include "fake_driver.h"
#include "heed/heed.h"

namespace heed::cuda {
namespace {

using test::fake_capture_mode;
using test::fake_contexts;
using test::fake_driver;
using test::FakeDriver;
using test::kNumFakeDevices;

// A kernel of its own for each test: what is loaded stays loaded.
KernelSpec new_spec(int shared_bytes = 0) {
  static int count = 0;
  return {"probe", "Probe<64, " + std::to_string(shared_bytes + 4 * ++count) + ">"};
}

class Driver : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::string name = (std::filesystem::temp_directory_path() / "heed-load-test-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    setenv("HEED_CACHE_DIR", name.c_str(), 1);
    ASSERT_GT(device_count(), 0) << why_no_driver();
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(getenv("HEED_CACHE_DIR")); }
  void SetUp() override {
    fake_driver() = FakeDriver();
    fake_contexts().clear();
  }
};

class Loading : public Driver {
 protected:
  void SetUp() override {
    Driver::SetUp();
    if (!find_nvrtc()) GTEST_SKIP() << "there is no NVRTC on this machine";
    for (int device = 0; device < kNumFakeDevices; ++device) const DeviceScope scope(device);  // contexts exist
    fake_driver() = FakeDriver();
  }
};

using Calls = std::vector<std::string>;

TEST_F(Driver, Devices) {
  EXPECT_EQ(device_count(), 3);
  EXPECT_TRUE(is_driver_installed());
  EXPECT_EQ(why_no_driver(), "");
  EXPECT_EQ(driver_version(), 13000);
  EXPECT_EQ(compute_capability(0), 90);
  EXPECT_EQ(compute_capability(2), 80);
  EXPECT_EQ(compute_capability(3), 0);
  EXPECT_EQ(compute_capability(-1), 0);
  EXPECT_EQ(compute_capability(1000), 0);
  EXPECT_EQ(device_name(1), "Fake 1");
  EXPECT_EQ(device_name(3), "");
}

TEST_F(Driver, ScopesNestAndLeaveTheContextAsItWas) {
  {
    const DeviceScope outer(1);
    EXPECT_EQ(fake_contexts(), std::vector<int>{1});
    {
      const DeviceScope same(1);
      EXPECT_EQ(fake_contexts(), std::vector<int>{1});
      const DeviceScope inner(0);
      EXPECT_EQ(fake_contexts(), (std::vector<int>{1, 0}));
    }
    EXPECT_EQ(fake_contexts(), std::vector<int>{1});
  }
  EXPECT_TRUE(fake_contexts().empty());
  EXPECT_THROW(DeviceScope(3), std::runtime_error);
  EXPECT_THROW(DeviceScope(-1), std::runtime_error);
  EXPECT_THROW(DeviceScope(64), std::runtime_error);
}

// ---------------------------------------------------------------------------------------------------------------------

TEST_F(Loading, HappensOncePerDeviceAndInItsContext) {
  const KernelSpec spec = new_spec();
  fake_contexts() = {0};  // the caller's
  const LoadedKernel& kernel = load(spec, 1);
  const std::string attribute = "attribute 8=" + std::to_string(kernel.shared_bytes);
  EXPECT_EQ(fake_driver().device_calls, (Calls{attribute + " 1", "function 1", "load 1"}));
  EXPECT_EQ(fake_driver().num_libraries, 1);
  EXPECT_EQ(fake_contexts(), std::vector<int>{0});
  EXPECT_TRUE(kernel.is_loaded_on(1));
  EXPECT_FALSE(kernel.is_loaded_on(0));
  EXPECT_FALSE(kernel.is_loaded_on(-1));
  EXPECT_FALSE(kernel.is_loaded_on(64));
  EXPECT_EQ(kernel.num_threads, 64);

  EXPECT_EQ(&load(spec, 1), &kernel);
  EXPECT_EQ(fake_driver().device_calls.size(), 3U);  // nothing more to do
  EXPECT_EQ(&load(spec, 0), &kernel);                // the same architecture: the same library
  EXPECT_EQ(fake_driver().device_calls,
            (Calls{attribute + " 1", "function 1", "load 1", attribute + " 0", "function 0", "load 0"}));
  EXPECT_EQ(fake_driver().num_libraries, 1);

  EXPECT_NE(&load(spec, 2), &kernel);  // another architecture: machine code of its own
  EXPECT_EQ(fake_driver().num_libraries, 2);
  EXPECT_EQ(fake_contexts(), std::vector<int>{0});
}

TEST_F(Loading, LargeSharedMemoryIsAskedForOnEachDevice) {
  const KernelSpec spec = new_spec(60000);
  const LoadedKernel& kernel = load(spec, 0);
  const std::string attribute = "attribute 8=" + std::to_string(kernel.shared_bytes);
  EXPECT_GT(kernel.shared_bytes, 60000);
  load(spec, 1);
  EXPECT_EQ(fake_driver().device_calls,
            (Calls{attribute + " 0", "function 0", "load 0", attribute + " 1", "function 1", "load 1"}));
}

// While another thread captures a graph, loading is allowed only in this mode.
TEST_F(Loading, RelaxesTheCaptureModeAndRestoresIt) {
  load(new_spec(), 0);
  EXPECT_EQ(fake_driver().capture_modes, std::vector<int>{2});
  EXPECT_EQ(fake_capture_mode(), 0);
  fake_driver().failing_call = "cuLibraryLoadData";
  EXPECT_THROW(load(new_spec(), 0), std::runtime_error);
  EXPECT_EQ(fake_capture_mode(), 0);
}

TEST_F(Loading, FailuresAreReportedAndTriedAgain) {
  const KernelSpec spec = new_spec();
  for (const char* call : {"cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuFuncLoad"}) {
    fake_driver().failing_call = call;
    try {
      load(spec, 0);
      ADD_FAILURE() << call << " did not fail";
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find("invalid argument (CUDA_ERROR_INVALID_VALUE)"), std::string::npos)
          << error.what();
    }
    EXPECT_TRUE(fake_contexts().empty());
  }
  EXPECT_EQ(fake_driver().num_unloaded, 1);  // the library whose kernel could not be had
  EXPECT_TRUE(load(spec, 0).is_loaded_on(0));
}

TEST_F(Loading, WrongDevicesAndSpecsAreRefused) {
  EXPECT_THROW(load(new_spec(), 3), std::runtime_error);
  EXPECT_THROW(load(new_spec(), -1), std::runtime_error);
  EXPECT_THROW(load({"nothing", "Probe<64>"}, 0), ValueError);
  EXPECT_THROW(load({"probe", "Probe<33>"}, 0), std::runtime_error);
  EXPECT_TRUE(fake_contexts().empty());
}

TEST_F(Loading, ManyThreadsLoadOnce) {
  const KernelSpec spec = new_spec();
  std::vector<std::thread> threads;
  std::vector<const LoadedKernel*> kernels(16);
  for (size_t t = 0; t < kernels.size(); ++t) {
    threads.emplace_back([&, t] { kernels[t] = &load(spec, static_cast<int>(t % 2)); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(fake_driver().num_libraries, 1);
  EXPECT_EQ(fake_driver().device_calls.size(), 6U);  // three per device
  for (const LoadedKernel* kernel : kernels) EXPECT_EQ(kernel, kernels[0]);
}

TEST_F(Loading, LaunchPassesOnWhatItWasGiven) {
  const LoadedKernel& kernel = load(new_spec(1000), 0);
  int params = 7;
  int stream = 0;
  launch(kernel, {.grid_x = 100000, .grid_y = 2, .grid_z = 3, .stream = &stream}, &params);
  ASSERT_EQ(fake_driver().launches.size(), 1U);
  const test::FakeLaunch& launched = fake_driver().launches[0];
  EXPECT_EQ(launched.function, kernel.handle);
  EXPECT_EQ(launched.grid[0], 100000U);
  EXPECT_EQ(launched.grid[1], 2U);
  EXPECT_EQ(launched.grid[2], 3U);
  EXPECT_EQ(launched.block, 64U);
  EXPECT_EQ(launched.shared_bytes, static_cast<unsigned>(kernel.shared_bytes));
  EXPECT_EQ(launched.stream, &stream);
  EXPECT_EQ(launched.params, &params);

  fake_driver().failing_call = "cuLaunchKernel";
  EXPECT_THROW(launch(kernel, {}, &params), std::runtime_error);
  for (const LaunchConfig& wrong : {LaunchConfig{.grid_x = 0}, LaunchConfig{.grid_x = int64_t{1} << 31},
                                    LaunchConfig{.grid_y = 65536}, LaunchConfig{.grid_z = -1}}) {
    EXPECT_THROW(launch(kernel, wrong, &params), std::runtime_error);
  }
  EXPECT_EQ(fake_driver().launches.size(), 1U);
}

TEST_F(Loading, LaunchesOfClustersAndOverlappingOnes) {
  const LoadedKernel& kernel = load(new_spec(1000), 0);
  int params = 7;
  int stream = 0;
  launch(kernel, {.grid_x = 48, .stream = &stream, .cluster_x = 16}, &params);
  launch(kernel, {.grid_x = 5, .grid_y = 2, .stream = &stream, .overlaps_previous = true}, &params);
  ASSERT_EQ(fake_driver().launches.size(), 2U);
  const test::FakeLaunch& clusters = fake_driver().launches[0];
  EXPECT_EQ(clusters.function, kernel.handle);
  EXPECT_EQ(clusters.grid[0], 48U);
  EXPECT_EQ(clusters.grid[2], 1U);
  EXPECT_EQ(clusters.block, 64U);
  EXPECT_EQ(clusters.shared_bytes, static_cast<unsigned>(kernel.shared_bytes));
  EXPECT_EQ(clusters.stream, &stream);
  EXPECT_EQ(clusters.params, &params);
  EXPECT_EQ(clusters.cluster, 16U);
  EXPECT_FALSE(clusters.overlaps_previous);
  const test::FakeLaunch& overlapping = fake_driver().launches[1];
  EXPECT_EQ(overlapping.grid[1], 2U);
  EXPECT_EQ(overlapping.cluster, 1U);
  EXPECT_TRUE(overlapping.overlaps_previous);

  fake_driver().failing_call = "cuLaunchKernelEx";
  EXPECT_THROW(launch(kernel, {.grid_x = 2, .cluster_x = 2}, &params), std::runtime_error);
  EXPECT_THROW(launch(kernel, {.grid_x = 3, .cluster_x = 2}, &params), std::runtime_error);
  EXPECT_THROW(launch(kernel, {.cluster_x = 0}, &params), std::runtime_error);
  EXPECT_EQ(fake_driver().launches.size(), 2U);
}

TEST_F(Loading, ClustersThatFitAtOnce) {
  const LoadedKernel& kernel = load(new_spec(), 0);
  fake_driver() = FakeDriver();
  EXPECT_EQ(max_active_clusters(kernel, 0, 8), 16);
  EXPECT_EQ(fake_driver().device_calls, Calls{"function 0"});
  EXPECT_TRUE(fake_contexts().empty());
  fake_driver().failing_call = "cuOccupancyMaxActiveClusters";
  EXPECT_EQ(max_active_clusters(kernel, 0, 8), 0);
  EXPECT_EQ(max_active_clusters(load(new_spec(), 2), 2, 8), 0);  // sm_80
}

TEST_F(Loading, AForkedChildIsToldThatCudaIsGone) {
  const KernelSpec spec = new_spec();
  load(spec, 0);
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    int status = 1;
    try {
      load(spec, 0);
    } catch (const std::runtime_error& error) {
      const bool says_so = std::string(error.what()).find("forked") != std::string::npos;
      const bool can_compile = compile(new_spec(), "sm_90a").num_threads == 64;
      status = says_so && can_compile && device_count() == 0 ? 0 : 2;
    }
    _exit(status);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

// A lookup of a kernel that is there, among many others, with a name as long as real ones. The best of several rounds:
// other programs run on the machine, too.
TEST_F(Loading, LookupTakesLessThanAMicrosecond) {
  KernelSpec spec = new_spec();
  spec.instance = "Probe<" + std::string(300, ' ') + spec.instance.substr(6);
  load(spec, 0);
  double best = 1;
  constexpr int kCount = 20000;
  for (int round = 0; round < 20; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCount; ++i) load(spec, 0);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / kCount);
  }
  RecordProperty("lookup_ns", static_cast<int>(best * 1e9));
  printf("a lookup takes %.0f ns\n", best * 1e9);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT_LE(best, 1e-6);
#endif
}

}  // namespace
}  // namespace heed::cuda
