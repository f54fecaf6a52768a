#include "driver/kernel_image.h"

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>

#include "driver/require.h"

namespace flash8 {

namespace {

constexpr std::string_view kName = "kernel_info";

// A cubin. Every read is checked against its size first.
class Cubin {
  public:
    explicit Cubin(std::string_view image) : image_(image), header_(read<Elf64_Ehdr>(0, "header")) {
        require(header_.e_ident[EI_CLASS] == ELFCLASS64 && header_.e_ident[EI_DATA] == ELFDATA2LSB,
                "cubin: it is not a 64-bit little-endian ELF file");
        require(header_.e_shentsize == sizeof(Elf64_Shdr) && header_.e_phentsize == sizeof(Elf64_Phdr),
                "cubin: the entries of its tables have other sizes than those of ELF");
        span(header_.e_phoff, std::uint64_t{header_.e_phnum} * sizeof(Elf64_Phdr), "program headers");
        span(header_.e_shoff, std::uint64_t{header_.e_shnum} * sizeof(Elf64_Shdr), "section headers");
        for (std::size_t i = 0; i < header_.e_shnum; ++i) {
            contents(section(i));
        }
    }

    std::string_view constant(std::string_view name) const {
        for (std::size_t i = 0; i < header_.e_shnum; ++i) {
            const Elf64_Shdr table = section(i);
            if (table.sh_type != SHT_SYMTAB) {
                continue;
            }
            if (const auto found = constant_in(table, name); found) {
                return *found;
            }
        }
        return {};
    }

  private:
    std::optional<std::string_view> constant_in(const Elf64_Shdr& table, std::string_view name) const {
        require(table.sh_link < header_.e_shnum, "cubin: a symbol table has no names");
        const std::string_view names = contents(section(table.sh_link));
        for (std::uint64_t at = 0; at + sizeof(Elf64_Sym) <= table.sh_size; at += sizeof(Elf64_Sym)) {
            const auto symbol = read<Elf64_Sym>(table.sh_offset + at, "symbol");
            if (ELF64_ST_TYPE(symbol.st_info) == STT_OBJECT && symbol.st_shndx < header_.e_shnum &&
                text_at(names, symbol.st_name) == name) {
                return initial_data(section(symbol.st_shndx), symbol);
            }
        }
        return std::nullopt;
    }

    // A symbol's value is relative to its section's address, which is 0 in a cubin.
    std::string_view initial_data(const Elf64_Shdr& owner, const Elf64_Sym& symbol) const {
        const std::string_view data = contents(owner);
        const std::uint64_t offset = symbol.st_value - owner.sh_addr;
        require(offset <= data.size() && symbol.st_size <= data.size() - offset, "cubin: ", kName,
                " does not lie within its section");
        return data.substr(offset, symbol.st_size);
    }

    static std::string_view text_at(std::string_view names, std::uint64_t offset) {
        const std::string_view rest = names.substr(std::min<std::uint64_t>(offset, names.size()));
        return rest.substr(0, rest.find('\0'));
    }

    Elf64_Shdr section(std::size_t index) const {
        return read<Elf64_Shdr>(header_.e_shoff + index * sizeof(Elf64_Shdr), "section header");
    }

    std::string_view contents(const Elf64_Shdr& section) const {
        const bool in_file = section.sh_type != SHT_NOBITS && section.sh_type != SHT_NULL;
        return in_file ? span(section.sh_offset, section.sh_size, "section") : std::string_view();
    }

    std::string_view span(std::uint64_t offset, std::uint64_t bytes, const char* what) const {
        require(offset <= image_.size() && bytes <= image_.size() - offset, "cubin: a ", what, " of ", bytes,
                " bytes at ", offset, " is outside of its ", image_.size(), " bytes");
        return image_.substr(offset, bytes);
    }

    // Copied out, because the bytes of a string may be unaligned.
    template <class Struct>
    Struct read(std::uint64_t offset, const char* what) const {
        Struct found{};
        std::memcpy(&found, span(offset, sizeof(found), what).data(), sizeof(found));
        return found;
    }

    std::string_view image_;
    Elf64_Ehdr header_;
};

// The numbers of ".const .align 4 .b8 kernel_info[404] = {3, 0, ...};". What is left out is zero.
std::string initialiser(std::string_view ptx) {
    constexpr std::size_t kMostBytes = 1 << 16;
    const std::string declared = ".b8 " + std::string(kName) + "[";
    std::size_t at = ptx.find(declared);
    if (at == std::string_view::npos) {
        return {};
    }
    at += declared.size();
    const auto number = [&]() -> std::size_t {
        std::size_t value = 0;
        const std::size_t first = at;
        for (; at < ptx.size() && ptx[at] >= '0' && ptx[at] <= '9' && value <= kMostBytes; ++at) {
            value = 10 * value + static_cast<std::size_t>(ptx[at] - '0');
        }
        require(at > first && value <= kMostBytes, "ptx: ", kName, " has no initialiser of plain bytes");
        return value;
    };
    const auto skip = [&](std::string_view text) {
        require(ptx.substr(at, text.size()) == text, "ptx: ", kName, " has no initialiser of plain bytes");
        at += text.size();
    };
    std::string bytes(number(), '\0');
    skip("] = {");
    for (char& byte : bytes) {
        const std::size_t value = number();
        require(value <= 255, "ptx: ", value, " in ", kName, " is no byte");
        byte = static_cast<char>(static_cast<unsigned char>(value));
        if (ptx.substr(at, 1) == "}") {
            break;
        }
        skip(", ");
    }
    return bytes;
}

}  // namespace

std::string kernel_info_bytes(const std::string& image) {
    constexpr std::string_view kMagic{ELFMAG, SELFMAG};
    if (std::string_view(image).substr(0, SELFMAG) == kMagic) {
        return std::string(Cubin(image).constant(kName));
    }
    return initialiser(image);
}

}  // namespace flash8
