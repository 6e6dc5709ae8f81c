// Shared memory, filled with 0xFF bytes before each block: a NaN as a float, -1 as an integer.
//
// Dynamic shared memory is a heap block of exactly the launch's size, so that AddressSanitizer sees an overrun; without
// it a few guard bytes behind are checked after each block.
//
// Static shared memory is what `__shared__` made: thread_local variables inside functions, whose symbols carry a tag.
// The symbol table of the library that holds this code gives their offsets in its thread-local storage. A library
// whose symbols are stripped runs as well, but without the filling; static_shared_memory().found_symbols says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#if defined(__linux__)
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <unistd.h>
#endif

#include "fibres/sanitizers.h"

// Its symbol's offset and its address tell where the thread-local storage of this library begins.
extern "C" {
inline thread_local __attribute__((visibility("hidden"))) char mpkernels_fibres_storage_anchor = 0;
}

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {

  constexpr unsigned char shared_memory_fill = 0xFF;

  class DynamicSharedMemory {
   public:
    explicit DynamicSharedMemory(std::size_t size) : size_(size) {
      if (posix_memalign(&memory_, 128, size + guard_size) != 0) throw std::bad_alloc();
    }
    DynamicSharedMemory(const DynamicSharedMemory&) = delete;
    DynamicSharedMemory& operator=(const DynamicSharedMemory&) = delete;
    ~DynamicSharedMemory() { std::free(memory_); }

    void* data() const { return memory_; }

    void fill() {
      std::memset(memory_, shared_memory_fill, size_);
      std::memset(end(), guard_fill, guard_size);
    }

    bool overrun() const {
      for (std::size_t i = 0; i < guard_size; ++i) {
        if (end()[i] != guard_fill) return true;
      }
      return false;
    }

   private:
#if defined(MPKERNELS_FIBRES_ADDRESS_SANITIZER)
    static constexpr std::size_t guard_size = 0;
#else
    static constexpr std::size_t guard_size = 256;
#endif
    static constexpr unsigned char guard_fill = 0xA5;

    unsigned char* end() const { return static_cast<unsigned char*>(memory_) + size_; }

    void* memory_ = nullptr;
    std::size_t size_;
  };

  struct StaticSharedMemory {
    struct Variable {
      std::uint64_t offset, size;  // in the thread-local storage of this library
    };
    bool found_symbols = false;
    std::uint64_t anchor_offset = 0;
    std::vector<Variable> variables;

    // Fills the calling OS thread's variables.
    void fill() const {
      if (!found_symbols) return;
      char* storage = &mpkernels_fibres_storage_anchor - anchor_offset;
      for (const Variable& variable : variables) {
        std::memset(storage + variable.offset, shared_memory_fill, variable.size);
      }
    }
  };

#if defined(__linux__)
  namespace elf {

  // The file that the code at `address` was loaded from.
  inline std::string file_of(const void* address) {
    struct Search {
      std::uintptr_t address;
      std::string file;
    } search{reinterpret_cast<std::uintptr_t>(address), ""};
    dl_iterate_phdr(
        [](dl_phdr_info* module, std::size_t, void* data) {
          Search& search = *static_cast<Search*>(data);
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            const auto& segment = module->dlpi_phdr[i];
            const std::uintptr_t begin = module->dlpi_addr + segment.p_vaddr;
            if (segment.p_type == PT_LOAD && search.address >= begin && search.address - begin < segment.p_memsz) {
              search.file = module->dlpi_name[0] ? module->dlpi_name : "/proc/self/exe";
              return 1;
            }
          }
          return 0;
        },
        &search);
    return search.file;
  }

  class File {
   public:
    explicit File(const std::string& path) : descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() {
      if (descriptor_ >= 0) close(descriptor_);
    }

    template <typename T>
    std::vector<T> read(std::uint64_t offset, std::uint64_t count) const {
      std::vector<T> items(count);
      std::size_t done = 0;
      while (done < count * sizeof(T)) {
        const ssize_t part = pread(descriptor_, reinterpret_cast<char*>(items.data()) + done, count * sizeof(T) - done,
                                   static_cast<off_t>(offset + done));
        if (part <= 0) return {};
        done += static_cast<std::size_t>(part);
      }
      return items;
    }

   private:
    int descriptor_;
  };

  inline StaticSharedMemory find_static_shared_memory() {
    StaticSharedMemory found;
    const File file(file_of(reinterpret_cast<const void*>(&find_static_shared_memory)));
    const auto header = file.read<ElfW(Ehdr)>(0, 1);
    if (header.empty() || std::memcmp(header[0].e_ident, ELFMAG, SELFMAG) != 0) return found;
    const auto sections = file.read<ElfW(Shdr)>(header[0].e_shoff, header[0].e_shnum);
    for (const auto& section : sections) {
      if (section.sh_type != SHT_SYMTAB || section.sh_link >= sections.size()) continue;
      const auto symbols = file.read<ElfW(Sym)>(section.sh_offset, section.sh_size / sizeof(ElfW(Sym)));
      const auto& strings = sections[section.sh_link];
      const auto names = file.read<char>(strings.sh_offset, strings.sh_size);
      for (const auto& symbol : symbols) {
        if ((symbol.st_info & 0xF) != STT_TLS || symbol.st_shndx == SHN_UNDEF || symbol.st_name >= names.size())
          continue;
        const std::string name = &names[symbol.st_name];
        if (name == "mpkernels_fibres_storage_anchor") {
          found.found_symbols = true;
          found.anchor_offset = symbol.st_value;
        } else if (name.rfind("_ZZ", 0) == 0 && name.find("B16mpkernels_shared") != std::string::npos) {
          found.variables.push_back({symbol.st_value, symbol.st_size});
        }
      }
    }
    return found;
  }

  }  // namespace elf
#endif

  inline const StaticSharedMemory& static_shared_memory() {
#if defined(__linux__)
    static const StaticSharedMemory memory = elf::find_static_shared_memory();
#else
    static const StaticSharedMemory memory;
#endif
    return memory;
  }

}  // namespace fibres
}  // namespace mpkernels
