// The decode kernel: few rows of Q over a KV cache. One variant per compilation;
// flash8.backends.hopper.decode_variants says which -D options there are.

#include "empty_rows.cuh"
#include "mainloop.cuh"
#include "merge.cuh"
#include "scheduler_metadata.cuh"
#include "team_mainloop.cuh"

#include <type_traits>

namespace flash8 {

using Config = DecodeConfig;
using Loop = std::conditional_t<Config::kTeamWarps == 1, Mainloop<Config>, TeamMainloop<Config>>;

constexpr KernelInfo describe() {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(DecodeParams);
    info.kind = KernelKind::kDecode;
    constexpr char kEntry[] = "flash8_decode";
    for (unsigned i = 0; i < sizeof(kEntry); ++i) {
        info.entry[i] = kEntry[i];
    }
    info.kBlockM = Config::kBlockM;
    info.kBlockN = Config::kBlockN;
    info.kHeadDim = Config::kHeadDim;
    info.kHeadDimV = Config::kHeadDimV;
    info.kStages = Config::kSlots;
    info.threads = Config::kThreads;
    info.min_ctas_per_sm = 1;
    info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
    info.shared_bytes = kSharedBytes;
    info.pack_gqa = 1;
    info.qv = Config::kQv;
    info.appends = Config::kAppend;
    info.scale_block = Config::kKeyScales ? 1 : 0;
    constexpr auto kType = Config::kFp8                               ? ElementType::kUint8
                           : Config::kElement == ElementChoice::kFp16 ? ElementType::kFloat16
                                                                      : ElementType::kBfloat16;
    auto const box = [](int panel) {
        constexpr unsigned kRank = Config::kGather ? 0 : 4;
        Swizzle const swizzle = panel == 128 ? Swizzle::k128B : panel == 64 ? Swizzle::k64B : Swizzle::k32B;
        unsigned const columns = panel / Config::kElementBytes;
        return TmaBox{kRank, {columns, Config::kBlockN, 1, 1, 1}, kType, swizzle};
    };
    info.tma[0] = box(Config::kPanelK);
    info.tma[1] = box(Config::kPanelV);
    return info;
}

__device__ __forceinline__ bool next_segment(DecodeParams const& params, Walk<Config>& stored) {
    Walk<Config> walk = stored;
    bool const more = walk.next(params);
    store_walk(stored, walk);
    return more;
}

}  // namespace flash8

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::describe();

extern "C" __global__ void __launch_bounds__(flash8::Config::kThreads, 1)
    flash8_decode(flash8::DecodeParams const __grid_constant__ params) {
    using namespace flash8;
    extern __shared__ __align__(1024) char dynamic_shared[];
    auto& shared = *reinterpret_cast<SharedStorage<Config>*>(dynamic_shared);

    int const warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 32), 0);
    if constexpr (!Config::kGather) {
        if (threadIdx.x % 32 == 0) {
            for (int slot = 0; slot < Config::kSlots; ++slot) {
                ptx::mbarrier_init(&shared.full[warp][slot], 1);
            }
            ptx::fence_barrier_init();
        }
        __syncwarp();
    }
    Share const share = find_share<Config>(params, shared.share);
    Loop mainloop(params, shared, share, warp);
    Merge<Config> merge(params, shared, warp);
    store_walk(shared.walk[warp], Walk<Config>::over(share));
    while (next_segment(params, shared.walk[warp])) {
        Walk<Config> const& walk = shared.walk[warp];
        // Since the last reads of Q, and of what has been merged, all threads have met.
        if constexpr (Config::kAppend) {
            NewKeys<Config>::make_queries(params, shared, walk.segment, walk.sequence);
            __syncthreads();
        }
        if (warp < Config::kRowTiles) {
            QueryStage<Config>::fill(params, shared, walk.segment, walk.sequence, warp);
        }
        __syncthreads();
        Accumulators<Config> sums;
        mainloop.run(walk, sums);
        merge.finish(walk, sums);
    }
    EmptyRows<Config>(params).store();
}
