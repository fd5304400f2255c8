// What one launch costs on the host: from the entry of heed's XLA handler to the return of the driver's launch.
//
//   launch_cost [--device N] [--calls N]      prints one JSON object
//
// It calls the handler that JAX registers with frames made by hand, on a real stream and real device memory, with
// kernels that are loaded: the same as what a jitted program does per call. The driver's own share is measured beside
// it, with an empty kernel. Median over calls; the stream is drained outside of the timed spans, so that its queue
// never fills up.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpp/xla_call.h"
#include "cuda/jit/jit.h"

namespace {

using heed::test::XlaCall;

// The driver, as far as this program needs it.
struct Driver {
  int (*init)(unsigned);
  int (*device_get)(int*, int);
  int (*device_get_name)(char*, int, int);
  int (*primary_ctx_retain)(void**, int);
  int (*ctx_set_current)(void*);
  int (*mem_alloc)(uint64_t*, size_t);
  int (*memset_d8)(uint64_t, unsigned char, size_t);
  int (*stream_create)(void**, unsigned);
  int (*stream_synchronize)(void*);
  int (*module_load_data)(void**, const void*);
  int (*module_get_function)(void**, void*, const char*);
  int (*launch_kernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                       void**);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) throw std::runtime_error("there is no NVIDIA driver (libcuda.so.1) on this machine");
    const auto get = [&]<class F>(F& function, const char* name) {
      function = reinterpret_cast<F>(dlsym(library, name));
      if (function == nullptr) throw std::runtime_error(std::string("the NVIDIA driver has no ") + name);
    };
    get(init, "cuInit");
    get(device_get, "cuDeviceGet");
    get(device_get_name, "cuDeviceGetName");
    get(primary_ctx_retain, "cuDevicePrimaryCtxRetain");
    get(ctx_set_current, "cuCtxSetCurrent");
    get(mem_alloc, "cuMemAlloc_v2");
    get(memset_d8, "cuMemsetD8_v2");
    get(stream_create, "cuStreamCreate");
    get(stream_synchronize, "cuStreamSynchronize");
    get(module_load_data, "cuModuleLoadData");
    get(module_get_function, "cuModuleGetFunction");
    get(launch_kernel, "cuLaunchKernel");
  }
};

void check(int result, const char* call) {
  if (result != 0) throw std::runtime_error(std::string(call) + " failed with error " + std::to_string(result));
}

void check(heed::xla::Error* error) {
  if (error != nullptr) throw std::runtime_error("the handler failed: " + error->message);
}

struct Figures {
  double median_us = 0.0;
  double p10_us = 0.0;
  double p90_us = 0.0;
};

// Times each call of `body` by itself. `drain` empties the stream between batches.
template <class Body, class Drain>
Figures time_calls(int calls, const Body& body, const Drain& drain) {
  using Clock = std::chrono::steady_clock;
  constexpr int kBatch = 128;  // fewer than what a stream's queue holds
  std::vector<double> times;
  times.reserve(static_cast<size_t>(calls));
  for (int i = 0; i < 4 * kBatch; ++i) {
    body();
    if (i % kBatch == kBatch - 1) drain();
  }
  while (static_cast<int>(times.size()) < calls) {
    for (int i = 0; i < kBatch; ++i) {
      const Clock::time_point start = Clock::now();
      body();
      times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    drain();
  }
  std::sort(times.begin(), times.end());
  const auto at = [&](double share) {
    return times[static_cast<size_t>(share * static_cast<double>(times.size() - 1))];
  };
  return {at(0.5), at(0.1), at(0.9)};
}

void print(const std::string& name, const Figures& figures, bool is_last) {
  std::printf("    \"%s\": {\"median_us\": %.3f, \"p10_us\": %.3f, \"p90_us\": %.3f}%s\n", name.c_str(),
              figures.median_us, figures.p10_us, figures.p90_us, is_last ? "" : ",");
}

struct Problem {
  const char* name;
  const char* text;
};

constexpr Problem kProblems[] = {
    {"bfloat16_causal_d64",
     "attention_fwd.v1;q=bfloat16[1,64,1,64];k=bfloat16[1,64,1,64];v=bfloat16[1,64,1,64];scale=default;causal=1;"
     "align=bottom_right;window=-1,-1;softcap=0x0p+0;lse=0;deterministic=0;backend=auto"},
    {"bfloat16_everything_d64",
     "attention_fwd.v1;q=bfloat16[1,64,2,64];k=bfloat16[1,64,1,64];v=bfloat16[1,64,1,64];sinks=float32[2];"
     "alibi_slopes=float32[2];q_segment_ids=int32[1,64];kv_segment_ids=int32[1,64];scale=default;causal=1;"
     "align=bottom_right;window=32,-1;softcap=0x1.4p+4;lse=1;deterministic=0;backend=auto"},
    {"bfloat16_varlen_d64",
     "attention_fwd.v1;q=bfloat16[64,1,64];k=bfloat16[64,1,64];v=bfloat16[64,1,64];cu_seqlens_q=int32[3];"
     "scale=default;causal=1;align=bottom_right;window=-1,-1;max_seqlen=-1,-1;softcap=0x0p+0;lse=0;deterministic=0;"
     "backend=auto"},
    // On Hopper, with tensor maps.
    {"bfloat16_causal_d128_many_tiles",
     "attention_fwd.v1;q=bfloat16[4,128,40,128];k=bfloat16[4,128,40,128];v=bfloat16[4,128,40,128];scale=default;"
     "causal=1;align=bottom_right;window=-1,-1;softcap=0x0p+0;lse=0;deterministic=0;backend=auto"},
};

constexpr char kEmptyKernel[] =
    ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry empty(.param .u64 unused) { ret; }\n";

int integer_option(int argc, char** argv, const char* name, int otherwise) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], name) == 0) return std::atoi(argv[i + 1]);
  }
  return otherwise;
}

void allocate(const Driver& driver, std::vector<std::unique_ptr<XlaCall::Tensor>>& tensors) {
  for (auto& tensor : tensors) {
    uint64_t pointer = 0;
    check(driver.mem_alloc(&pointer, static_cast<size_t>(tensor->bytes)), "cuMemAlloc");
    check(driver.memset_d8(pointer, 0, static_cast<size_t>(tensor->bytes)), "cuMemsetD8");
    tensor->buffer.data = reinterpret_cast<void*>(pointer);
  }
}

void run(int device, int calls) {
  const Driver driver;
  check(driver.init(0), "cuInit");
  int handle = 0;
  void* context = nullptr;
  check(driver.device_get(&handle, device), "cuDeviceGet");
  check(driver.primary_ctx_retain(&context, handle), "cuDevicePrimaryCtxRetain");
  check(driver.ctx_set_current(context), "cuCtxSetCurrent");
  char name[256] = "";
  check(driver.device_get_name(name, sizeof(name), handle), "cuDeviceGetName");
  constexpr unsigned kNonBlocking = 1;
  void* stream = nullptr;
  check(driver.stream_create(&stream, kNonBlocking), "cuStreamCreate");
  const auto drain = [&] { check(driver.stream_synchronize(stream), "cuStreamSynchronize"); };

  std::printf("{\n  \"device\": \"%s\",\n  \"calls\": %d,\n  \"handler\": {\n", name, calls);
  for (const Problem& problem : kProblems) {
    XlaCall call(problem.text);
    call.stream = stream;
    call.device = device;
    allocate(driver, call.arguments());
    allocate(driver, call.results());
    check(heed_xla_attention_fwd_cuda(&call.frame(heed::xla::kInitialize)));
    heed::xla::CallFrame& frame = call.frame(heed::xla::kExecute);
    const Figures figures = time_calls(
        calls, [&] { check(heed_xla_attention_fwd_cuda(&frame)); }, drain);
    print(problem.name, figures, &problem == std::end(kProblems) - 1);
  }

  // What the handler's own lookup of a loaded kernel replaces: finding it by its spec.
  const heed::cuda::KernelSpec probe{"probe", "Probe<256>"};
  heed::cuda::load(probe, device);
  std::printf("  },\n  \"lookup\": {\n");
  print("by_spec",
        time_calls(
            calls, [&] { heed::cuda::load(probe, device); }, drain),
        true);

  void* module = nullptr;
  void* empty = nullptr;
  check(driver.module_load_data(&module, kEmptyKernel), "cuModuleLoadData");
  check(driver.module_get_function(&empty, module, "empty"), "cuModuleGetFunction");
  uint64_t unused = 0;
  void* params[] = {&unused};
  const auto launch = [&] {
    check(driver.launch_kernel(empty, 1, 1, 1, 32, 1, 1, 0, stream, params, nullptr), "cuLaunchKernel");
  };
  std::printf("  },\n  \"driver\": {\n");
  print("empty_kernel", time_calls(calls, launch, drain), true);
  std::printf("  }\n}\n");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(integer_option(argc, argv, "--device", 0), integer_option(argc, argv, "--calls", 20000));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "launch_cost: %s\n", error.what());
    return 1;
  }
}
