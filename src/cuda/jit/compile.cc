// Finding a kernel's machine code: shipped, in the user's cache, or compiled now and kept.
#include <fcntl.h>
#include <unistd.h>

#include <stdexcept>

#include "cuda/jit/cache.h"
#include "cuda/jit/cubin.h"
#include "cuda/jit/entry.h"
#include "cuda/jit/folder.h"
#include "cuda/jit/jit.h"
#include "cuda/jit/log.h"
#include "cuda/jit/nvrtc.h"
#include "cuda/jit/paths.h"
#include "cuda/jit/sources.h"

namespace heed::cuda {
namespace {

// What is looked up, and what became of it.
struct Lookup {
  const KernelSpec& spec;
  const std::string& arch;
  std::string id;
  std::string where;  // the file it came from or went to, for the log
};

// Nothing if the entry is not there or is not what its name says.
std::optional<CompiledKernel> read_kernel(const Folder& folder, const std::string& name, const char* origin,
                                          Lookup& lookup) {
  const std::optional<std::string> bytes = folder.read(name);
  if (!bytes) return std::nullopt;
  const std::string file = folder.path() + "/" + name;
  std::string reason;
  std::optional<Entry> entry = parse_entry(*bytes, reason);
  if (entry && (entry->id != lookup.id || entry->spec != to_text(lookup.spec) || entry->arch != lookup.arch)) {
    reason = "it holds another kernel";
    entry.reset();
  }
  std::optional<CompiledKernel> kernel;
  if (entry) kernel = to_compiled_kernel(std::move(entry->cubin), std::move(entry->log), reason);
  if (!kernel) {
    log_verbose("jit: ignoring " + file + ": " + reason);
    return std::nullopt;
  }
  kernel->origin = origin;
  lookup.where = file;
  return kernel;
}

std::optional<CompiledKernel> find_shipped(Lookup& lookup) {
  for (const std::string& path : ahead_of_time_dirs()) {
    const std::optional<Folder> folder = Folder::open_shipped(path);
    if (!folder) continue;
    if (auto kernel = read_kernel(*folder, shipped_entry_name(lookup.id), "ahead of time", lookup)) return kernel;
  }
  return std::nullopt;
}

// With no compiler on this machine, what any compiler made is as good.
std::optional<CompiledKernel> find_from_any_compiler(const Folder& folder, Lookup& lookup) {
  for (const std::string& name : folder.file_names()) {
    if (!name.starts_with(lookup.id + "-") || !name.ends_with(kEntrySuffix)) continue;
    if (auto kernel = read_kernel(folder, name, "cache", lookup)) return kernel;
  }
  return std::nullopt;
}

CompiledKernel run_compiler(const Lookup& lookup, bool shows_progress) {
  ProgressLine progress(lookup.spec.family + " for " + lookup.arch, shows_progress);
  Compilation compilation = run_nvrtc(lookup.spec, lookup.arch);
  std::string reason;
  std::optional<CompiledKernel> kernel =
      to_compiled_kernel(std::move(compilation.cubin), std::move(compilation.log), reason);
  if (!kernel) throw std::runtime_error("NVRTC gave a cubin that cannot be used: " + reason);
  kernel->origin = "compiled";
  progress.done();
  return std::move(*kernel);
}

// Returns why it could not be kept; empty if it was.
std::string keep(const Folder& folder, const std::string& name, const CompiledKernel& kernel, Lookup& lookup) {
  const std::optional<NvrtcInfo> compiler = find_nvrtc();
  const Entry entry{lookup.id,  to_text(lookup.spec), lookup.arch, "nvrtc " + (compiler ? compiler->version : ""),
                    kernel.log, kernel.cubin};
  std::string reason = folder.write(name, to_bytes(entry));
  if (reason.empty()) lookup.where = folder.path() + "/" + name;
  return reason;
}

CompiledKernel find_or_compile(Lookup& lookup, bool shows_progress) {
  const std::optional<Folder> cache = Folder::open_user_cache();
  const std::optional<NvrtcInfo> compiler = find_nvrtc();
  if (!cache) return run_compiler(lookup, shows_progress);
  if (!compiler) {
    if (auto kernel = find_from_any_compiler(*cache, lookup)) return std::move(*kernel);
    return run_compiler(lookup, shows_progress);  // says what is missing
  }
  const std::string name = cached_entry_name(lookup.id, compiler->version);
  if (auto kernel = read_kernel(*cache, name, "cache", lookup)) return std::move(*kernel);
  const FileLock lock(*cache, name);
  if (auto kernel = read_kernel(*cache, name, "cache", lookup)) return std::move(*kernel);  // made while we waited
  CompiledKernel kernel = run_compiler(lookup, shows_progress);
  // Anew: if the compiler that was found did not open, another one has done the work.
  const std::string reason = keep(*cache, cached_entry_name(lookup.id, find_nvrtc()->version), kernel, lookup);
  if (!reason.empty()) log_verbose("jit: cannot keep a kernel in " + cache->path() + ": " + reason);
  return kernel;
}

// Appends the spec to the file HEED_RECORD_SPECS, a line by one write: processes may share the file.
void record(const KernelSpec& spec) {
  const std::string path = environment("HEED_RECORD_SPECS");
  if (path.empty()) return;
  const std::string line = to_text(spec) + "\n";
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  const bool is_written = file >= 0 && write(file, line.data(), line.size()) == static_cast<ssize_t>(line.size());
  if (file >= 0) close(file);
  if (!is_written) warn_once("cannot append to HEED_RECORD_SPECS=" + path);
}

void log_lookup(const Lookup& lookup, const CompiledKernel& kernel) {
  if (!is_verbose()) return;
  log_verbose("jit: " + lookup.arch + " " + to_text(lookup.spec) + ": " + kernel.origin + " in " +
              milliseconds(kernel.seconds) + " (" + (lookup.where.empty() ? "not kept" : lookup.where) + ")");
}

StoredKernel look_up(const KernelSpec& spec, const std::string& arch, bool shows_progress) {
  const double start = seconds_now();
  Lookup lookup{spec, arch, content_id(spec, arch), ""};
  record(spec);
  std::optional<CompiledKernel> kernel = find_shipped(lookup);
  if (!kernel) kernel = find_or_compile(lookup, shows_progress);
  kernel->seconds = seconds_now() - start;
  log_lookup(lookup, *kernel);
  return {std::move(*kernel), lookup.where};
}

}  // namespace

std::optional<CompiledKernel> to_compiled_kernel(std::string cubin, std::string log, std::string& reason) {
  const std::optional<int> num_threads = cubin_constant(cubin, "heed_num_threads");
  const std::optional<int> shared_bytes = cubin_constant(cubin, "heed_shared_bytes");
  if (!num_threads || !shared_bytes || *num_threads < 1 || *num_threads > 1024 || *shared_bytes < 0) {
    reason = "its cubin does not say how it is to be launched";
    return std::nullopt;
  }
  CompiledKernel kernel;
  kernel.cubin = std::move(cubin);
  kernel.log = std::move(log);
  kernel.num_threads = *num_threads;
  kernel.shared_bytes = *shared_bytes;
  return kernel;
}

CompiledKernel compile(const KernelSpec& spec, const std::string& arch) { return look_up(spec, arch, true).kernel; }

StoredKernel compile_to_cache(const KernelSpec& spec, const std::string& arch) { return look_up(spec, arch, false); }

StoredKernel compile_to_folder(const KernelSpec& spec, const std::string& arch, const std::string& path) {
  const double start = seconds_now();
  Lookup lookup{spec, arch, content_id(spec, arch), ""};
  const Folder folder = Folder::create_shipped(path);
  const std::string name = shipped_entry_name(lookup.id);
  std::optional<CompiledKernel> kernel = read_kernel(folder, name, "ahead of time", lookup);
  if (!kernel) {
    kernel = run_compiler(lookup, false);
    const std::string reason = keep(folder, name, *kernel, lookup);
    if (!reason.empty()) throw std::runtime_error("cannot write " + path + "/" + name + ": " + reason);
  }
  kernel->seconds = seconds_now() - start;
  return {std::move(*kernel), lookup.where};
}

}  // namespace heed::cuda
