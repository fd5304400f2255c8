// What the JIT says on stderr: warnings, one line per lookup if HEED_JIT_VERBOSE is set, a line while a person waits.
#pragma once

#include <string>
#include <string_view>

namespace heed::cuda {

// An environment variable; empty if it is not set.
std::string environment(const char* name);

bool is_verbose();
void log_verbose(std::string_view line);
// Once per text and process.
void warn_once(const std::string& line);

double seconds_now();
std::string milliseconds(double seconds);  // such as "12.3 ms"

// Says on a terminal what is being compiled, and replaces it by how long it took. Silent where stderr is no terminal.
class ProgressLine {
 public:
  ProgressLine(const std::string& what, bool is_wanted);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  void done() { is_done_ = true; }

 private:
  std::string what_;
  bool is_shown_;
  bool is_done_ = false;
  double start_;
};

}  // namespace heed::cuda
