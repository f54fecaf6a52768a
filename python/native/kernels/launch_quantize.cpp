#include "kernels/launch_quantize.h"

#include <algorithm>

#include "driver/launch.h"
#include "driver/require.h"

namespace flash8 {

namespace {

constexpr std::int64_t kMaxTiles = 2147483647;
constexpr std::int64_t kChannels = 16;   // of a thread
constexpr std::int64_t kStrideUnit = 8;  // elements of x: 16 bytes of the 16-bit types
constexpr std::int64_t kAccessBytes = 16;
constexpr std::int64_t kMaxHeadDim = 256;

void check_kernel(const Kernel& kernel) {
    require(kernel.info().has_value(), "quantize: ", kernel.name(), " exports no kernel_info");
    const KernelKind kind = kernel.info()->kind;
    require(kind >= KernelKind::kQuantize && kind <= KernelKind::kQuantizeMeanFinish,
            "quantize: ", kernel.name(), " is not a quantizer kernel");
}

void check_sizes(const QuantizeParams& call, const KernelInfo& info) {
    const auto check = [](const char* name, std::int64_t value, std::int64_t least) {
        require(value >= least && value <= kMaxTiles, "quantize: ", name, " is ", value, "; supported are ",
                least, " to 2^31 - 1");
    };
    check("batch", call.batch, 0);
    check("heads", call.heads, 1);
    check("seqlen", call.seqlen, 0);
    check("total", call.total, 0);
    require(call.head_dim >= kChannels &&
                call.head_dim <= std::min<std::int64_t>(info.kHeadDim, kMaxHeadDim) &&
                call.head_dim % kChannels == 0,
            "quantize: head_dim is ", call.head_dim, "; this kernel supports the multiples of ", kChannels,
            " up to ", info.kHeadDim);
}

void check_tensor(const char* name, const TensorRef& ref, std::int64_t unit) {
    const auto address = reinterpret_cast<std::uintptr_t>(ref.ptr);
    require(address != 0 && address % kAccessBytes == 0, "quantize: ", name, " is at address ", address,
            "; it must be a multiple of ", kAccessBytes, " and not null");
    for (const std::int64_t stride : {ref.batch_stride, ref.row_stride, ref.head_stride}) {
        require(stride % unit == 0, "quantize: a stride of ", name, " is ", stride,
                " elements; it must be a multiple of ", unit);
    }
}

void check_steps(const QuantizeParams& call) {
    const std::int64_t block = call.hadamard_block;
    require(block == 0 || (block >= kChannels && (block & (block - 1)) == 0 && call.head_dim % block == 0),
            "quantize: hadamard_block is ", block, "; it must be 0 or a power of two from ", kChannels,
            " that divides head_dim, ", call.head_dim);
    if (call.rope_cos == nullptr) {
        return;
    }
    require(call.rope_sin != nullptr && call.rope_rows >= 1, "quantize: rope_sin is null or rope_rows is ",
            call.rope_rows, "; rope_cos needs both");
    // Pairs that lie apart are exchanged between threads.
    const std::int64_t unit = call.interleaved != 0 ? kChannels : 2 * kChannels;
    require(call.rotary_dim >= unit && call.rotary_dim % unit == 0 && call.rotary_dim <= call.head_dim,
            "quantize: rotary_dim is ", call.rotary_dim, "; it must be a multiple of ", unit,
            " up to head_dim, ", call.head_dim);
}

// What a kernel of this kind reads and writes besides x.
void check_pointers(const QuantizeParams& call, KernelKind kind) {
    const auto need = [](const char* name, const void* pointer) {
        require(pointer != nullptr, "quantize: ", name, " is null; this kernel needs it");
    };
    switch (kind) {
        case KernelKind::kQuantize:
            check_tensor("out", call.out, kAccessBytes);
            need("descale", call.descale.ptr);
            if (call.scale_source == ScaleSource::kAmax) {
                need("amax", call.amax.ptr);
            }
            break;
        case KernelKind::kQuantizeAmax:
            need("amax", call.amax.ptr);
            break;
        case KernelKind::kQuantizeMean:
            need("mean_partial", call.mean_partial);
            break;
        default:
            need("mean_partial", call.mean_partial);
            need("mean", call.mean.ptr);
            break;
    }
}

// Blocks of tokens over all sequences.
std::int64_t blocks_of(const QuantizeParams& call, std::int64_t block) {
    if (call.cu_seqlens != nullptr) {
        return call.total / block + call.batch;
    }
    return call.batch * std::max<std::int64_t>(1, (call.seqlen + block - 1) / block);
}

}  // namespace

void launch_quantize(Kernel& kernel, int device, std::uint64_t stream, const QuantizeParams& call) {
    check_kernel(kernel);
    const KernelInfo& info = *kernel.info();
    check_sizes(call, info);
    if (call.batch == 0) {
        return;
    }
    const bool finishes = info.kind == KernelKind::kQuantizeMeanFinish;
    const std::int64_t blocks = finishes ? call.batch : blocks_of(call, info.kBlockM);
    require(blocks <= kMaxTiles / call.heads, "quantize: there are more than 2^31 - 1 tiles");
    // The kernels count rows in 32 bits, up to the end of the last block.
    const std::int64_t rows =
        call.cu_seqlens != nullptr ? blocks_of(call, info.kBlockM) * info.kBlockM : call.seqlen;
    require(rows <= kMaxTiles - info.kBlockM, "quantize: there are ", rows,
            " rows; supported are less than 2^31");
    if (!finishes) {
        check_tensor("x", call.x, kStrideUnit);
        check_steps(call);
    }
    check_pointers(call, info.kind);
    launch(kernel, device, stream, shape_of(info, {blocks * call.heads, 1, 1}), {{&call, sizeof(call)}});
}

}  // namespace flash8
