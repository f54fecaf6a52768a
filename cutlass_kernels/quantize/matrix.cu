// An operand of an FP8 product, and its scales by row or by 128 columns, from a matrix, from RMSNorm of it,
// or from SiLU-multiply.
//
// row_threads neighbouring threads share a row, so a CTA has as many rows as fit. Threads of rows behind the
// last one take part in the barriers, and read and write nothing.

#include "matrix_row.cuh"

namespace flash8::quantize {

struct SharedStorage {
    float warp_sum[MatrixConfig::kWarps];
    uint32_t warp_amax[MatrixConfig::kWarps];
};

__device__ __forceinline__ float combine(float a, float b) {
    return add(a, b);
}

__device__ __forceinline__ uint32_t combine(uint32_t a, uint32_t b) {
    return max(a, b);
}

// Over the first `threads` lanes of every so many, by pairs of neighbours: alike in all of them, since a
// sum of two does not depend on their order.
template <class Value>
__device__ __forceinline__ Value over_lanes(Value value, int threads) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        if (step < threads) {
            value = combine(value, __shfl_xor_sync(0xffffffff, value, step));
        }
    }
    return value;
}

// Over the threads of a row. All threads of the CTA call it, once for each array of slots: nobody waits
// before writing there again.
template <class Value>
__device__ __forceinline__ Value over_row(Value value, int row_threads,
                                          Value (&slots)[MatrixConfig::kWarps]) {
    value = over_lanes(value, row_threads);
    if (row_threads > 32) {
        if (threadIdx.x % 32 == 0) {
            slots[threadIdx.x / 32] = value;
        }
        __syncthreads();
        int const warps = row_threads / 32;
        int const first = threadIdx.x / row_threads * warps;
        value = over_lanes(slots[first + threadIdx.x % warps], warps);
    }
    return value;
}

// What is done with all spans of a row before the next begins.
enum Pass { kSquares, kAmax, kCast };

__device__ __forceinline__ float inverse_rms(QuantizeMatrixParams const& params, SquareSum& squares,
                                             SharedStorage& shared) {
    float const total = over_row(squares.total(), params.row_threads, shared.warp_sum);
    float const mean = multiply(total, reciprocal(static_cast<float>(params.columns)));
    return reciprocal(square_root(add(mean, params.norm_eps)));
}

// The inverse of the row's scale, which is stored.
__device__ __forceinline__ float scale_of_row(MatrixRow const& row, uint32_t amax, SharedStorage& shared) {
    float const scale = descale_of<false>(over_row(amax, row.params.row_threads, shared.warp_amax));
    if (row.lane() == 0 && row.end > 0) {
        row.params.scale[row.index * row.params.scale_stride] = scale;
    }
    return reciprocal(scale);
}

// The inverse of the scale of the 128 columns that a chunk belongs to, which is stored.
__device__ __forceinline__ float scale_of_block(MatrixRow const& row, int span, int chunk) {
    uint32_t const amax = over_lanes(row.amax(chunk), MatrixConfig::kBlockThreads);
    float const scale = descale_of<false>(amax);
    int const column = row.column(span, chunk);
    if (column % kScaleBlock == 0 && column < row.end) {
        row.params.scale[row.index * row.params.scale_stride + column / kScaleBlock] = scale;
    }
    return reciprocal(scale);
}

// One load, and one norm, in the code: the passes are a loop. A row of one span is loaded in the first pass
// and normalised in the second.
__device__ __forceinline__ void quantize_row(MatrixRow& row, SharedStorage& shared) {
    bool const by_row = row.params.by_row != 0;
    int const first = MatrixConfig::kNorm ? kSquares : by_row ? kAmax : kCast;
    int const second = by_row ? kAmax : kCast;
    int const spans = row.spans();
    SquareSum squares;
    uint32_t amax = 0;
    float inverse = 1.0f;
#pragma unroll 1
    for (int pass = first; pass <= kCast; pass = pass == kSquares ? second : pass + 1) {
#pragma unroll 1
        for (int span = 0; span < spans; ++span) {
            bool const anew = spans > 1;
            if (anew || pass == first) {
                row.load(span, pass == kSquares);
            }
            if constexpr (MatrixConfig::kNorm) {
                if (pass == kSquares) {
                    squares.add_span(row);
                } else if (anew || pass == second) {
                    row.normalise(span);
                }
            }
            if (pass == kSquares) {
                continue;
            }
#pragma unroll
            for (int c = 0; c < MatrixRow::kChunks; ++c) {
                if (pass == kAmax) {
                    amax = max(amax, row.amax(c));
                } else {
                    row.store(span, c, by_row ? inverse : scale_of_block(row, span, c));
                }
            }
        }
        if (MatrixConfig::kNorm && pass == kSquares) {
            row.inverse_rms = inverse_rms(row.params, squares, shared);
        } else if (pass == kAmax) {
            inverse = scale_of_row(row, amax, shared);
        }
    }
}

constexpr KernelInfo describe_matrix() {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(QuantizeMatrixParams);
    info.kind = MatrixConfig::kKind;
    constexpr char kEntry[] = "flash8_quantize_matrix";
    for (unsigned i = 0; i < sizeof(kEntry); ++i) {
        info.entry[i] = kEntry[i];
    }
    info.kBlockM = 1;
    info.threads = MatrixConfig::kThreads;
    info.min_ctas_per_sm = MatrixConfig::kMinCtas;
    info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
    info.scale_block = kScaleBlock;
    return info;
}

}  // namespace flash8::quantize

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::quantize::describe_matrix();

extern "C" __global__ void __launch_bounds__(flash8::quantize::MatrixConfig::kThreads,
                                             flash8::quantize::MatrixConfig::kMinCtas)
    flash8_quantize_matrix(flash8::QuantizeMatrixParams const __grid_constant__ params) {
    using namespace flash8::quantize;
    __shared__ SharedStorage shared;
    MatrixRow row(params);
    quantize_row(row, shared);
}
