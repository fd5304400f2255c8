// The module object of heed.jit, and calls of its functions.
#include "ffi/jit_module.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "ffi/arguments.h"

namespace heed::ffi {
namespace {

namespace ffi = tvm::ffi;

std::string signature_of(const ModuleFunction& function) {
  std::string text = function.name + "(";
  for (size_t i = 0; i < function.parameters.size(); ++i) text += (i == 0 ? "" : ", ") + function.parameters[i];
  return text + ")";
}

bool is_word_character(char c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

// The message with the operands that it names, as whole words, called what the function calls them.
std::string renamed(const std::vector<Rename>& renames, std::string_view message) {
  std::string text;
  while (!message.empty()) {
    const auto end = std::find_if_not(message.begin(), message.end(), is_word_character);
    const auto length = std::max<size_t>(1, static_cast<size_t>(end - message.begin()));
    const std::string_view word = message.substr(0, length);
    const auto found = std::find_if(renames.begin(), renames.end(), [&](const Rename& r) { return r.operand == word; });
    text += found == renames.end() ? word : found->argument;
    message.remove_prefix(length);
  }
  return text;
}

void run(const ModuleFunction& function, Arguments arguments) {
  if (arguments.size() != function.parameters.size()) {
    throw TypeError(function.name + ": got " + std::to_string(arguments.size()) + " arguments, expected " +
                    std::to_string(function.parameters.size()) + ": " + signature_of(function));
  }
  try {
    function.run(arguments);
  } catch (const UnsupportedError&) {
    throw;  // it names no argument
  } catch (const ValueError& error) {
    throw ValueError(renamed(function.renames, error.what()));
  } catch (const TypeError& error) {
    throw TypeError(renamed(function.renames, error.what()));
  }
}

int call(void* self, const TVMFFIAny* arguments, int32_t num_arguments, TVMFFIAny* /*result*/) {
  return guarded([&] {
    run(*static_cast<const ModuleFunction*>(self), Arguments(arguments, static_cast<size_t>(num_arguments)));
  });
}

void destroy(void* self) { delete static_cast<ModuleFunction*>(self); }

class JitModule final : public ffi::ModuleObj {
 public:
  explicit JitModule(std::vector<ModuleFunction> functions) {
    for (ModuleFunction& function : functions) {
      Entry entry{function.name, signature_of(function), nullptr};
      entry.function = ffi::Function::FromExternC(new ModuleFunction(std::move(function)), call, destroy);
      entries_.push_back(std::move(entry));
    }
  }

  const char* kind() const final { return "heed"; }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    const Entry* entry = find(name);
    return entry == nullptr ? ffi::Optional<ffi::Function>() : entry->function;
  }

  ffi::Optional<ffi::String> GetFunctionDoc(const ffi::String& name) final {
    const Entry* entry = find(name);
    return entry == nullptr ? ffi::Optional<ffi::String>() : ffi::String(entry->signature);
  }

 private:
  struct Entry {
    std::string name;
    std::string signature;
    ffi::Function function;
  };

  const Entry* find(const ffi::String& name) const {
    for (const Entry& entry : entries_) {
      if (std::string_view(name.data(), name.size()) == entry.name) return &entry;
    }
    return nullptr;
  }

  std::vector<Entry> entries_;
};

}  // namespace

ffi::Module make_module(std::vector<ModuleFunction> functions) {
  return ffi::Module(ffi::make_object<JitModule>(std::move(functions)));
}

}  // namespace heed::ffi
