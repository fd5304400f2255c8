// The exports of the kernel compiler and its cache, for `python -m heed`.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/tvm_ffi.h>

#include <string>
#include <string_view>
#include <vector>

#include "cuda/ahead_of_time.h"
#include "cuda/jit/cache.h"
#include "cuda/jit/jit.h"
#include "cuda/jit/nvrtc.h"
#include "cuda/jit/paths.h"
#include "ffi/device_ordinal.h"

namespace {

namespace ffi = tvm::ffi;
using Record = ffi::Map<ffi::String, ffi::Any>;

// Runs `body`; heed's errors become those that Python users expect.
template <class Body>
auto guarded(const Body& body) {
  try {
    return body();
  } catch (const heed::ValueError& error) {
    throw ffi::Error("ValueError", error.what(), "");
  } catch (const ffi::Error&) {
    throw;
  } catch (const std::exception& error) {
    throw ffi::Error("RuntimeError", error.what(), "");
  }
}

ffi::Array<ffi::String> to_array(const std::vector<std::string>& values) {
  ffi::Array<ffi::String> array;
  for (const std::string& value : values) array.push_back(value);
  return array;
}

ffi::Array<ffi::String> ahead_of_time_list(const std::string& arch) {
  return guarded([&] {
    ffi::Array<ffi::String> texts;
    for (const heed::cuda::KernelSpec& spec : heed::cuda::ahead_of_time_list(arch)) texts.push_back(to_text(spec));
    return texts;
  });
}

// jit_compile(spec, arch, folder): into the user's cache if the folder is empty.
Record compile(const std::string& text, const std::string& arch, const std::string& folder) {
  return guarded([&]() -> Record {
    const heed::cuda::KernelSpec spec = heed::cuda::parse_kernel_spec(text);
    const heed::cuda::StoredKernel stored =
        folder.empty() ? heed::cuda::compile_to_cache(spec, arch) : heed::cuda::compile_to_folder(spec, arch, folder);
    return {{"origin", ffi::String(stored.kernel.origin)},
            {"file", ffi::String(stored.file)},
            {"log", ffi::String(stored.kernel.log)},
            {"seconds", stored.kernel.seconds},
            {"num_threads", int64_t{stored.kernel.num_threads}},
            {"shared_bytes", int64_t{stored.kernel.shared_bytes}},
            {"cubin_bytes", static_cast<int64_t>(stored.kernel.cubin.size())}};
  });
}

// jit_load(spec, device): ready to launch there. Returns the block's threads and shared memory.
Record load(const std::string& text, int64_t device) {
  return guarded([&]() -> Record {
    const heed::cuda::LoadedKernel& kernel =
        heed::cuda::load(heed::cuda::parse_kernel_spec(text), heed::device_ordinal(device));
    return {{"num_threads", int64_t{kernel.num_threads}}, {"shared_bytes", int64_t{kernel.shared_bytes}}};
  });
}

ffi::Array<Record> stored_files(const std::string& folder) {
  return guarded([&] {
    ffi::Array<Record> records;
    for (const heed::cuda::StoredFile& file : heed::cuda::stored_files(folder)) {
      records.push_back(Record{{"name", ffi::String(file.name)},
                               {"bytes", file.bytes},
                               {"spec", ffi::String(file.spec)},
                               {"arch", ffi::String(file.arch)},
                               {"compiler", ffi::String(file.compiler)},
                               {"error", ffi::String(file.error)}});
    }
    return records;
  });
}

// Initialises CUDA.
Record gpu_info() {
  return guarded([]() -> Record {
    ffi::Array<Record> devices;
    for (int device = 0; device < heed::cuda::device_count(); ++device) {
      const int capability = heed::cuda::compute_capability(device);
      devices.push_back(Record{{"name", ffi::String(heed::cuda::device_name(device))},
                               {"capability", int64_t{capability}},
                               {"arch", ffi::String(heed::cuda::arch_for(capability))}});
    }
    return {{"driver_version", int64_t{heed::cuda::driver_version()}},
            {"has_driver", heed::cuda::is_driver_installed()},
            {"why_no_driver", ffi::String(heed::cuda::why_no_driver())},
            {"devices", devices}};
  });
}

Record jit_info() {
  return guarded([]() -> Record {
    std::string searched;
    const auto nvrtc = heed::cuda::find_nvrtc(&searched);
    return {{"nvrtc_path", ffi::String(nvrtc ? nvrtc->path : "")},
            {"nvrtc_version", ffi::String(nvrtc ? nvrtc->version : "")},
            {"nvrtc_searched", ffi::String(searched)},
            {"cache_dir", ffi::String(heed::cuda::cache_dir())},
            {"ahead_of_time_dirs", to_array(heed::cuda::ahead_of_time_dirs())}};
  });
}

void set_site_dirs(const ffi::Array<ffi::String>& folders) {
  heed::cuda::set_site_dirs({folders.begin(), folders.end()});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(jit_set_site_dirs, set_site_dirs)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(jit_ahead_of_time_list, ahead_of_time_list)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(jit_compile, compile)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(jit_load, load)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(jit_info, jit_info)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(jit_stored_files, stored_files)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(jit_remove_stored_files,
                              [](bool only_damaged) { return heed::cuda::remove_stored_files(only_damaged); })
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gpu_info, gpu_info)
