// A reader of as much ELF as it takes to find a symbol's bytes. Every offset is checked: files may be damaged.
#include "cuda/jit/cubin.h"

#include <elf.h>

#include <cstring>

namespace heed::cuda {
namespace {

constexpr Elf64_Half kMachineCuda = 190;

// The object at an offset, if the file has that many bytes.
template <class T>
std::optional<T> read(std::string_view file, uint64_t offset) {
  if (offset > file.size() || file.size() - offset < sizeof(T)) return std::nullopt;
  T object;
  std::memcpy(&object, file.data() + offset, sizeof(T));
  return object;
}

std::optional<Elf64_Shdr> section(std::string_view file, const Elf64_Ehdr& header, uint64_t index) {
  if (index >= header.e_shnum || header.e_shentsize != sizeof(Elf64_Shdr)) return std::nullopt;
  return read<Elf64_Shdr>(file, header.e_shoff + index * sizeof(Elf64_Shdr));
}

bool is_string_at(std::string_view file, uint64_t offset, std::string_view name) {
  if (offset > file.size() || file.size() - offset <= name.size()) return false;
  return file.substr(offset, name.size()) == name && file[offset + name.size()] == '\0';
}

}  // namespace

std::optional<int> cubin_constant(std::string_view cubin, std::string_view name) {
  const auto header = read<Elf64_Ehdr>(cubin, 0);
  if (!header || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return std::nullopt;
  if (header->e_ident[EI_CLASS] != ELFCLASS64 || header->e_machine != kMachineCuda) return std::nullopt;
  for (uint64_t i = 0; i < header->e_shnum; ++i) {
    const auto symbols = section(cubin, *header, i);
    if (!symbols || symbols->sh_type != SHT_SYMTAB) continue;
    const auto names = section(cubin, *header, symbols->sh_link);
    if (!names) return std::nullopt;
    for (uint64_t s = 0; s < symbols->sh_size / sizeof(Elf64_Sym); ++s) {
      const auto symbol = read<Elf64_Sym>(cubin, symbols->sh_offset + s * sizeof(Elf64_Sym));
      if (!symbol) return std::nullopt;
      if (!is_string_at(cubin, names->sh_offset + symbol->st_name, name)) continue;
      const auto home = section(cubin, *header, symbol->st_shndx);
      if (!home || symbol->st_size != sizeof(int)) return std::nullopt;
      if (home->sh_type == SHT_NOBITS) return 0;  // what is zero takes no room in the file
      return read<int>(cubin, home->sh_offset + symbol->st_value);
    }
  }
  return std::nullopt;
}

}  // namespace heed::cuda
