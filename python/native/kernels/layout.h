// The layout of the structs that host and device share, as the compiler of the extension sees it.

#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace flash8 {

struct FieldLayout {
    std::string name;
    std::size_t offset;
    std::size_t size;
};

struct StructLayout {
    std::string name;
    std::size_t size;
    std::size_t align;
    std::vector<FieldLayout> fields;  // in the order of declaration
};

std::vector<StructLayout> struct_layouts();

}  // namespace flash8
