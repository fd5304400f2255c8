// Lines on stderr, each written by one system call so that those of several threads and processes do not mix.
#include "cuda/jit/log.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>

namespace heed::cuda {
namespace {

void write_to_stderr(const std::string& text) {
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t count = write(STDERR_FILENO, text.data() + written, text.size() - written);
    if (count <= 0) return;  // nobody reads it
    written += static_cast<size_t>(count);
  }
}

}  // namespace

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

bool is_verbose() {
  const std::string value = environment("HEED_JIT_VERBOSE");
  return !value.empty() && value != "0";
}

void log_verbose(std::string_view line) {
  if (is_verbose()) write_to_stderr("heed: " + std::string(line) + "\n");
}

void warn_once(const std::string& line) {
  // A few slots instead of a set behind a mutex, which a fork could leave locked.
  static std::atomic<size_t> said[32];
  const size_t hash = std::hash<std::string>()(line) | 1;
  for (std::atomic<size_t>& slot : said) {
    size_t expected = 0;
    if (slot.compare_exchange_strong(expected, hash)) break;
    if (expected == hash) return;
  }
  write_to_stderr("heed: warning: " + line + "\n");
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string milliseconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), seconds < 0.1 ? "%.2f ms" : "%.0f ms", seconds * 1e3);
  return text;
}

ProgressLine::ProgressLine(const std::string& what, bool is_wanted)
    : what_(what), is_shown_(is_wanted && !is_verbose() && isatty(STDERR_FILENO) == 1), start_(seconds_now()) {
  if (is_shown_) write_to_stderr("heed: compiling " + what_ + " ...");
}

ProgressLine::~ProgressLine() {
  if (!is_shown_) return;
  // \r and \x1b[K: over the line that is there.
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%.1f s", seconds_now() - start_);
  write_to_stderr("\r\x1b[Kheed: " + std::string(is_done_ ? "compiled " : "could not compile ") + what_ + " (" +
                  seconds + ")\n");
}

}  // namespace heed::cuda
