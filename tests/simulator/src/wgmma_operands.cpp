#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>

#include "errors.h"
#include "float_formats.h"
#include "lanes.h"
#include "wgmma.h"

namespace sim {
namespace {

// The fields of a matrix descriptor (PTX ISA, "Matrix Descriptor Format"), in bytes.
struct Descriptor {
    uint32_t start, leading, stride, base_offset, span;  // span: 16 without swizzle
    explicit Descriptor(uint64_t bits)
        : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
          leading(static_cast<uint32_t>((bits >> 16) & 0x3fff) << 4),
          stride(static_cast<uint32_t>((bits >> 32) & 0x3fff) << 4),
          base_offset(static_cast<uint32_t>((bits >> 49) & 7)) {
        static const uint32_t spans[] = {16, 128, 64, 32};
        span = spans[bits >> 62];
    }
};

// The 16-byte units of a swizzled row trade places by the row's number: bits of the address itself.
uint32_t swizzled(uint32_t address, uint32_t span) {
    switch (span) {
        case 128:
            return address ^ ((address >> 3) & 0x70);
        case 64:
            return address ^ ((address >> 3) & 0x30);
        case 32:
            return address ^ ((address >> 3) & 0x10);
        default:
            return address;
    }
}

// K-major: 16 bytes along K of row `mn`. Units: `k_unit` counts 16 bytes.
uint32_t k_major_address(const Descriptor& d, int mn, int k_unit) {
    if (d.span == 16) {
        return d.start + static_cast<uint32_t>(mn % 8) * 16 + static_cast<uint32_t>(mn / 8) * d.stride +
               static_cast<uint32_t>(k_unit) * d.leading;
    }
    return d.start + static_cast<uint32_t>(mn % 8) * d.span + static_cast<uint32_t>(mn / 8) * d.stride +
           static_cast<uint32_t>(k_unit) * 16;
}

// MN-major: 16 bytes (8 elements) along M/N of row `k`.
uint32_t mn_major_address(const Descriptor& d, int mn_unit, int k) {
    const uint32_t k_in = static_cast<uint32_t>(k % 8), k_out = static_cast<uint32_t>(k / 8);
    if (d.span == 16) {
        return d.start + static_cast<uint32_t>(mn_unit) * d.stride + k_in * 16 + k_out * d.leading;
    }
    const uint32_t units = d.span / 16;
    const uint32_t unit = static_cast<uint32_t>(mn_unit);
    return d.start + unit % units * 16 + unit / units * d.leading + k_in * d.span + k_out * d.stride;
}

float element_value(const uint8_t* at, Type type, bool negate) {
    float value;
    switch (type) {
        case Type::kBf16: {
            uint16_t code;
            std::memcpy(&code, at, 2);
            value = bf16_to_float(code);
            break;
        }
        case Type::kF16: {
            uint16_t code;
            std::memcpy(&code, at, 2);
            value = half_to_float(code);
            break;
        }
        case Type::kE4m3:
            value = e4m3_table()[*at];
            break;
        case Type::kE5m2:
            value = e5m2_table()[*at];
            break;
        default: {  // tf32: the low 13 bits are not read
            uint32_t bits;
            std::memcpy(&bits, at, 4);
            value = as_float(bits & 0xffffe000u);
            break;
        }
    }
    return negate ? -value : value;
}

template <Type kType>
void convert_halves(const uint8_t* bytes, uint32_t flip, float* values) {
    uint16_t codes[8];
    std::memcpy(codes, bytes, 16);
    for (int i = 0; i < 8; ++i) {
        const float value = kType == Type::kBf16 ? bf16_to_float(codes[i]) : half_to_float(codes[i]);
        values[i] = as_float(as_bits(value) ^ flip);
    }
}

void convert_chunk(const uint8_t* bytes, Type type, bool negate, float* values, int count) {
    const uint32_t flip = negate ? 0x80000000u : 0;
    if (type == Type::kBf16) {
        convert_halves<Type::kBf16>(bytes, flip, values);
        return;
    }
    if (type == Type::kF16) {
        convert_halves<Type::kF16>(bytes, flip, values);
        return;
    }
    const uint32_t size = bytes_of(type);
    if (size == 1) {
        const float* table = type == Type::kE4m3 ? e4m3_table() : e5m2_table();
        for (int i = 0; i < 16; ++i) {
            values[i] = as_float(as_bits(table[bytes[i]]) ^ flip);
        }
        return;
    }
    for (int i = 0; i < count; ++i) {
        values[i] = element_value(bytes + static_cast<uint32_t>(i) * size, type, negate);
    }
}

}  // namespace

namespace {

// The pieces of an operand relative to its start: the same for every tile at the same place within
// the 1024 bytes over which swizzles repeat.
struct Pieces {
    std::vector<OperandChunk> chunks;
    uint32_t end = 0;
};

constexpr uint32_t kSwizzlePeriod = 1024;

Pieces make_pieces(const OperandLayout& layout, const Descriptor& d, uint32_t base) {
    const int per_chunk = static_cast<int>(16 / layout.element_bytes);
    const int mn_step = layout.mn_major ? per_chunk : 1;
    const int k_step = layout.mn_major ? 1 : per_chunk;
    Pieces pieces;
    for (int mn = layout.first_row; mn < layout.first_row + layout.rows; mn += mn_step) {
        for (int k = 0; k < layout.k; k += k_step) {
            const uint32_t plain = layout.mn_major ? mn_major_address(d, mn / per_chunk, k)
                                                   : k_major_address(d, mn, k / per_chunk);
            const uint32_t offset = swizzled(plain, d.span) - base;
            pieces.chunks.push_back({offset, mn, k});
            pieces.end = std::max(pieces.end, offset + 16);
        }
    }
    return pieces;
}

const Pieces& find_pieces(const OperandLayout& layout, const Descriptor& d, uint32_t base) {
    using Key = std::tuple<uint64_t, int, int, uint32_t, bool, int>;
    static thread_local std::map<Key, Pieces> known;
    constexpr uint64_t kAboveBase = ~uint64_t{0x3fc0};  // the start within the period, and all the rest
    const Key key{layout.descriptor & kAboveBase, layout.rows,     layout.k,
                  layout.element_bytes,           layout.mn_major, layout.first_row};
    const auto found = known.find(key);
    return found != known.end() ? found->second
                                : known.emplace(key, make_pieces(layout, d, base)).first->second;
}

}  // namespace

OperandChunks operand_chunks(const OperandLayout& layout, const Cta& cta, int line) {
    const Descriptor d(layout.descriptor);
    if (d.base_offset != 0) {
        throw SimError(ErrorKind::kUnsupported,
                       format("matrix descriptor of %s: a base offset of %u is not modelled (align the tile)",
                              layout.name, d.base_offset),
                       line);
    }
    const uint32_t base = d.start / kSwizzlePeriod * kSwizzlePeriod;
    const Pieces& pieces = find_pieces(layout, d, base);
    if (d.start < kSharedBase || base + pieces.end - kSharedBase > cta.shared.size()) {
        throw SimError(
            ErrorKind::kOutOfBounds,
            format("operand %s of wgmma reaches from shared address 0x%x to 0x%x, outside [0x%x, 0x%zx)",
                   layout.name, d.start, base + pieces.end, kSharedBase, kSharedBase + cta.shared.size()),
            line);
    }
    return {&pieces.chunks, base - kSharedBase};
}

void load_b(const Cta& cta, const WgmmaShape& shape, uint64_t descriptor, int line,
            std::vector<float>& values) {
    const uint32_t bytes = bytes_of(shape.b);
    const OperandLayout layout{descriptor, shape.n, shape.k, bytes, shape.transpose_b, "B"};
    const int per_chunk = static_cast<int>(16 / bytes);
    const int step = shape.transpose_b ? shape.k : 1;
    static thread_local std::vector<float> plain;  // [n][k]
    plain.resize(static_cast<size_t>(shape.n) * static_cast<size_t>(shape.k));
    const OperandChunks pieces = operand_chunks(layout, cta, line);
    const uint8_t* shared = cta.shared.data() + pieces.base;
    for (const OperandChunk& chunk : *pieces.chunks) {
        float elements[16] = {};
        convert_chunk(shared + chunk.offset, shape.b, shape.negate_b, elements, per_chunk);
        float* to = plain.data() + chunk.mn * shape.k + chunk.k;
        for (int i = 0; i < per_chunk; ++i) {
            to[i * step] = elements[i];
        }
    }
    values.resize(static_cast<size_t>(shape.n) * static_cast<size_t>(shape.k) * 4);
    float* out = values.data();
    for (int octet = 0; octet < shape.n / 8; ++octet) {
        for (int k = 0; k < shape.k; ++k) {
            const float* column = plain.data() + octet * 8 * shape.k + k;
            for (int parity = 0; parity < 2; ++parity, out += 16) {
                float quad[4];
                for (int i = 0; i < 4; ++i) {
                    quad[i] = column[(i * 2 + parity) * shape.k];
                }
                for (int copy = 0; copy < 4; ++copy) {
                    std::memcpy(out + copy * 4, quad, sizeof quad);
                }
            }
        }
    }
}

namespace {

// [16 rows][k] -> [half][k][lane]: lane l has row l / 4, and l / 4 + 8 in the other half.
void spread_a(const float* rows, int k_count, std::vector<float>& values) {
    values.resize(static_cast<size_t>(k_count) * 64);
    for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < k_count; ++k) {
            float* out = values.data() + (half * k_count + k) * 32;
            for (int row = 0; row < 8; ++row) {
                const float value = rows[(half * 8 + row) * k_count + k];
                for (int i = 0; i < 4; ++i) {
                    out[row * 4 + i] = value;
                }
            }
        }
    }
}

}  // namespace

void load_a_shared(const Cta& cta, const WgmmaShape& shape, uint64_t descriptor, int warp, int line,
                   std::vector<float>& values) {
    const uint32_t bytes = bytes_of(shape.a);
    const OperandLayout layout{descriptor, 16, shape.k, bytes, shape.transpose_a, "A", warp * 16};
    const int per_chunk = static_cast<int>(16 / bytes);
    float rows[16 * 32];
    const OperandChunks pieces = operand_chunks(layout, cta, line);
    for (const OperandChunk& chunk : *pieces.chunks) {
        float elements[16] = {};
        convert_chunk(cta.shared.data() + pieces.base + chunk.offset, shape.a, shape.negate_a, elements,
                      per_chunk);
        for (int i = 0; i < per_chunk; ++i) {
            const int m = chunk.mn - warp * 16 + (shape.transpose_a ? i : 0);
            const int k = chunk.k + (shape.transpose_a ? 0 : i);
            rows[m * shape.k + k] = elements[i];
        }
    }
    spread_a(rows, shape.k, values);
}

// Register j of a lane: rows lane / 4 (+ 8 for odd j), a 4-byte group of columns at lane % 4, in the
// second half of the columns for j >= 2.
void load_a_registers(const Warp& w, const WgmmaShape& shape, std::vector<float>& values) {
    const uint32_t bytes = bytes_of(shape.a);
    const int per_register = static_cast<int>(4 / bytes);
    float rows[16 * 32];
    for (int j = 0; j < 4; ++j) {
        const uint32_t* lanes =
            source<uint32_t>(w, w.program->lists[shape.a_registers + static_cast<uint32_t>(j)]);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int m = lane / 4 + 8 * (j % 2);
            const int k = (lane % 4) * per_register + (j / 2) * shape.k / 2;
            const uint8_t* raw = reinterpret_cast<const uint8_t*>(&lanes[lane]);
            for (int i = 0; i < per_register; ++i) {
                rows[m * shape.k + k + i] =
                    element_value(raw + static_cast<uint32_t>(i) * bytes, shape.a, shape.negate_a);
            }
        }
    }
    spread_a(rows, shape.k, values);
}

}  // namespace sim
