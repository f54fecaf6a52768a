// Makes scheduler metadata: how many pieces the sequences of a step have, for all of its decode calls. One
// CTA, a sequence a thread.

#include "../kernel_info.h"
#include "schedule_params.h"
#include "scheduler_metadata.cuh"
#include "tile_sizes.cuh"

namespace flash8 {

constexpr int kScheduleThreads = 512;
constexpr int kScheduleWarps = kScheduleThreads / 32;

constexpr KernelInfo describe() {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(ScheduleParams);
    info.kind = KernelKind::kDecodeSchedule;
    constexpr char kEntry[] = "flash8_decode_schedule";
    for (unsigned i = 0; i < sizeof(kEntry); ++i) {
        info.entry[i] = kEntry[i];
    }
    info.kBlockM = 1;  // tiles are a parameter
    info.threads = kScheduleThreads;
    info.min_ctas_per_sm = 1;
    info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
    return info;
}

// What the count of pieces asks of a decode kernel's config.
template <int kM, int kN>
struct CountedTile {
    static constexpr int kBlockM = kM;
    static constexpr int kBlockN = kN;
    using TileMask = Mask<MaskMode::kLocal, kM, kN, true>;
};

// Keys that a call appends before it attends to them.
__device__ int new_keys(ScheduleParams const& params, int batch) {
    int64_t count = params.seqlen_k_new;
    if (params.cu_seqlens_k_new != nullptr) {
        count = int64_t{params.cu_seqlens_k_new[batch + 1]} - params.cu_seqlens_k_new[batch];
    }
    return static_cast<int>(max(int64_t{0}, min(count, int64_t{params.call.sequences.max_seqlen_k})));
}

template <int kM, int kN>
__device__ int pieces_of_tile(DecodeParams const& call, SeqlenInfo const& info) {
    return SequenceWork<CountedTile<kM, kN>>::of(call, info).all_pieces(call);
}

template <int kM>
__device__ int pieces_of_rows(DecodeParams const& call, SeqlenInfo const& info, int block_n) {
    return block_n == 16   ? pieces_of_tile<kM, 16>(call, info)
           : block_n == 32 ? pieces_of_tile<kM, 32>(call, info)
                           : pieces_of_tile<kM, 64>(call, info);
}

__device__ int pieces_of(ScheduleParams const& params, int batch, int block_n) {
    DecodeParams const& call = params.call;
    int const row = first_row(call.sequences, batch, 0);
    SeqlenInfo info = SeqlenInfo::read(call.sequences, batch, row);
    int const room = call.sequences.max_seqlen_k - info.offset_k;
    info.seqlen_k += min(new_keys(params, batch), room - info.seqlen_k);
    return params.block_m == 8    ? pieces_of_rows<8>(call, info, block_n)
           : params.block_m == 16 ? pieces_of_rows<16>(call, info, block_n)
                                  : pieces_of_rows<32>(call, info, block_n);
}

}  // namespace flash8

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::describe();

extern "C" __global__ void __launch_bounds__(flash8::kScheduleThreads, 1)
    flash8_decode_schedule(flash8::ScheduleParams const __grid_constant__ params) {
    using namespace flash8;
    __shared__ int of_warp[kScheduleWarps];
    int const channels_k = warp_channels_k(params.tile_head_dim, params.tile_head_dim_v, params.qv != 0);
    int const channels_v = params.tile_head_dim_v / team_warps(params.tile_head_dim_v);
    int const keys = block_n(max(channels_k, channels_v) * params.element_bytes, params.block_m);
    int const thread = threadIdx.x;
    if (thread == 0) {
        params.scheduler_metadata[0] = scheduler_metadata_tag(params.block_m, keys);
    }
    int const batch = params.call.sequences.batch;
    int before = 0;
#pragma unroll 1
    for (int first = 0; first < batch; first += kScheduleThreads) {
        int const b = first + thread;
        int end = inclusive_sum(b < batch ? pieces_of(params, b, keys) : 0);
        if (thread % 32 == 31) {
            of_warp[thread / 32] = end;
        }
        __syncthreads();
        end += before;
        for (int warp = 0; warp < kScheduleWarps; ++warp) {
            end += warp < thread / 32 ? of_warp[warp] : 0;
            before += of_warp[warp];
        }
        if (b < batch) {
            params.scheduler_metadata[1 + b] = end;
        }
        __syncthreads();  // of_warp is free again
    }
}
