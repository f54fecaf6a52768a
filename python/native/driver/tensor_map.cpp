#include "driver/tensor_map.h"

#include <array>
#include <stdexcept>
#include <string>

#include "driver/require.h"

namespace flash8 {

namespace {

constexpr std::size_t kMaxRank = 5;
constexpr int kInterleaveNone = 0;
constexpr int kL2Promotion128B = 2;
constexpr int kFillZero = 0;
constexpr std::int64_t kStrideUnit = 16;
constexpr std::int64_t kMaxStride = std::int64_t{1} << 40;

int swizzle_bytes(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::kNone:
            return 0;
        case Swizzle::k32B:
            return 32;
        case Swizzle::k64B:
            return 64;
        case Swizzle::k128B:
            return 128;
    }
    throw std::invalid_argument("tensor map: swizzle is " + std::to_string(static_cast<unsigned>(swizzle)) +
                                "; supported are 0 (none), 1 (32 bytes), 2 (64 bytes), 3 (128 bytes)");
}

std::int64_t row_bytes(const TiledTensor& tensor) {
    return tensor.dims[0] * element_bytes(tensor.element_type);
}

void check_tensor(const TiledTensor& tensor) {
    const std::size_t rank = tensor.dims.size();
    require(rank >= 1 && rank <= kMaxRank, "tensor map: the tensor has ", rank,
            " dimensions; TMA supports 1 to 5");
    require(tensor.strides.size() == rank - 1, "tensor map: there are ", tensor.strides.size(), " strides; ",
            rank, " dimensions need ", rank - 1);
    require(tensor.address != 0 && tensor.address % 16 == 0, "tensor map: address is ", tensor.address,
            "; it must be a multiple of 16 and not null");
    for (std::size_t i = 0; i < rank; ++i) {
        require(tensor.dims[i] >= 1 && tensor.dims[i] <= (std::int64_t{1} << 32), "tensor map: dims[", i,
                "] is ", tensor.dims[i], "; supported are 1 to 2^32");
    }
    const std::int64_t row = row_bytes(tensor);
    for (std::size_t i = 0; i + 1 < rank; ++i) {
        const std::int64_t stride = tensor.strides[i];
        require(stride >= 0 && stride % kStrideUnit == 0 && stride < kMaxStride, "tensor map: strides[", i,
                "] is ", stride, " bytes; it must be a multiple of 16 below 2^40");
        require(stride >= row, "tensor map: strides[", i, "] is ", stride, " bytes, less than a row of ",
                row);
    }
}

void check_box(const TiledTensor& tensor, const TmaBox& box) {
    const std::size_t rank = tensor.dims.size();
    require(box.rank == rank, "tensor map: the box has rank ", box.rank, ", the tensor ", rank,
            " dimensions");
    require(box.element_type == tensor.element_type,
            "tensor map: the box and the tensor differ in element type");
    for (std::size_t i = 0; i < rank; ++i) {
        require(box.box[i] >= 1 && box.box[i] <= 256, "tensor map: box[", i, "] is ", box.box[i],
                "; supported are 1 to 256");
    }
    const int inner_bytes = static_cast<int>(box.box[0]) * element_bytes(tensor.element_type);
    require(inner_bytes % 16 == 0, "tensor map: box[0] is ", box.box[0], ", ", inner_bytes,
            " bytes; it must be a multiple of 16 bytes");
    const int limit = swizzle_bytes(box.swizzle);
    require(limit == 0 || inner_bytes <= limit, "tensor map: box[0] is ", box.box[0], ", ", inner_bytes,
            " bytes; a swizzle of ", limit, " bytes supports no wider box");
}

}  // namespace

int element_bytes(ElementType type) {
    switch (type) {
        case ElementType::kUint8:
            return 1;
        case ElementType::kFloat16:
        case ElementType::kBfloat16:
            return 2;
        case ElementType::kFloat32:
            return 4;
    }
    throw std::invalid_argument("tensor map: element type is " + std::to_string(static_cast<unsigned>(type)) +
                                "; supported are 0 (uint8), 6 (float16), 7 (float32), 9 (bfloat16)");
}

std::int64_t stride_in_bytes(std::int64_t elements, ElementType type) {
    const std::int64_t bytes = element_bytes(type);
    require(elements >= 0 && elements < kMaxStride / bytes, "tensor map: a stride is ", elements,
            " elements of ", bytes, " bytes; supported are 0 to 2^40 bytes");
    return elements * bytes;
}

void settle_strides(TiledTensor& tensor) {
    std::int64_t inside = (row_bytes(tensor) + kStrideUnit - 1) / kStrideUnit * kStrideUnit;
    for (std::size_t i = 0; i < tensor.strides.size(); ++i) {
        if (tensor.dims[i + 1] == 1) {
            tensor.strides[i] = inside;
        }
        inside = tensor.strides[i];
    }
}

TensorMap encode_tensor_map(const Driver& driver, const TiledTensor& tensor, const TmaBox& box) {
    element_bytes(tensor.element_type);
    check_tensor(tensor);
    check_box(tensor, box);
    std::array<std::uint64_t, kMaxRank> dims{};
    std::array<std::uint64_t, kMaxRank> strides{};
    constexpr std::array<std::uint32_t, kMaxRank> kElementStrides{1, 1, 1, 1, 1};
    for (std::size_t i = 0; i < tensor.dims.size(); ++i) {
        dims[i] = static_cast<std::uint64_t>(tensor.dims[i]);
    }
    for (std::size_t i = 0; i < tensor.strides.size(); ++i) {
        strides[i] = static_cast<std::uint64_t>(tensor.strides[i]);
    }
    TensorMap map{};
    driver.call(&cu::Entries::tensor_map_encode_tiled, &map, static_cast<int>(tensor.element_type), box.rank,
                reinterpret_cast<void*>(tensor.address), dims.data(), strides.data(), box.box,
                kElementStrides.data(), kInterleaveNone, static_cast<int>(box.swizzle), kL2Promotion128B,
                kFillZero);
    // A copy: the driver must have written to a variable of this frame. GCC 12 gives the temporary that a
    // result goes to an alignment of 32 bytes only.
    return TensorMap(map);
}

}  // namespace flash8
