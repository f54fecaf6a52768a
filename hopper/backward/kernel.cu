// The backward kernel: one producer warpgroup, which also adds up dQ, and two consumer warpgroups. One block
// of keys of one KV head per CTA. One variant per compilation; flash8.backends.hopper.variants says which -D
// options there are.

#include "../arch/named_barriers.cuh"
#include "epilogue.cuh"
#include "fp8_keys.cuh"
#include "key_mean.cuh"
#include "mainloop.cuh"
#include "mainloop_split.cuh"
#include "producer.cuh"

#include <cute/algorithm/clear.hpp>

namespace flash8 {

using Config = BackwardConfig;

constexpr KernelInfo describe() {
    KernelInfo info = Config::describe(KernelKind::kBackward, "flash8_backward", Config::kThreads);
    info.kStages = Config::kStages;
    info.shared_bytes = kSharedBytes;
    info.producer_registers = Config::Registers::kProducer;
    info.consumer_registers = Config::Registers::kConsumer;
    constexpr auto kType =
        std::is_same_v<Config::Element, cutlass::half_t> ? ElementType::kFloat16 : ElementType::kBfloat16;
    auto const box = [](unsigned panel, unsigned rows, Swizzle swizzle) {
        return TmaBox{4, {panel, rows, 1, 1, 1}, kType, swizzle};
    };
    if constexpr (Config::kFp8) {
        auto const box8 = [](unsigned panel, unsigned rows, Swizzle swizzle) {
            return TmaBox{4, {panel, rows, 1, 1, 1}, ElementType::kUint8, swizzle};
        };
        info.tma[0] = box8(Config::kPanelQ8, Config::kBlockM, Config::TileQ8::kSwizzle);
        info.tma[1] = box8(Config::kPanelQ8, Config::kBlockN, Config::TileK8::kSwizzle);
        info.tma[2] = box8(Config::kPanelV8, Config::kBlockN, Config::TileV8::kSwizzle);
    } else {
        info.tma[0] = box(Config::kPanelQ, Config::kBlockM, Config::TileQ::kSwizzle);
        info.tma[1] = box(Config::kPanelK, Config::kBlockN, Config::TileK::kSwizzle);
        info.tma[2] = box(Config::kPanelV, Config::kBlockN, Config::TileV::kSwizzle);
    }
    info.tma[3] = box(Config::kPanelV, Config::kBlockM, Config::TileDo::kSwizzle);
    return info;
}

// K - c in K's place. By all consumer warps, which then see it, and so does the tensor core.
__device__ __forceinline__ void subtract_mean(BackwardParams const& params, SharedStorage<Config>& shared) {
    KeyMean<Config::Element> const mean(params, shared.tile.batch, shared.tile.head_kv);
    if (!mean.given()) {
        return;
    }
    constexpr int kThreads = 128 * Config::kConsumerWarpgroups;
    shared.pipeline_kv.wait(PipelineState<1>{});
    subtract_mean<Config::Element, Config::kBlockN, Config::kHeadDim, Config::kPanelK, kThreads>(
        shared.k, mean, thread_number() - 128);
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kKeysPrepared), kThreads);
}

// A consumer warpgroup: dK and dV of 64 keys, or half their channels.
__device__ __forceinline__ void consume(BackwardParams const& params, SharedStorage<Config>& shared,
                                        int warpgroup) {
    auto dk = cute::make_tensor<float>(LayoutC<Config::kColumnsDk>{});
    auto dv = cute::make_tensor<float>(LayoutC<Config::kColumnsDv>{});
    cute::clear(dk);
    cute::clear(dv);
    if (!shared.tile.blocks.empty()) {
        Probabilities<Config>::keep_visible_queries(params, shared);
        if constexpr (Config::kFp8) {
            WideKeys<Config>::make(params, shared, thread_number() - 128);
        } else if constexpr (!Config::kSoftcap) {
            subtract_mean(params, shared);
        }
        using Loop = std::conditional_t<Config::kSplitChannels, MainloopSplit<Config>, Mainloop<Config>>;
        Loop(params, shared, warpgroup).run(dk, dv);
    }
    store_dk_dv(params, shared, dk, dv);
}

}  // namespace flash8

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::describe();

extern "C" __global__ void __launch_bounds__(flash8::Config::kThreads, 1)
    flash8_backward(flash8::BackwardParams const __grid_constant__ params) {
    using namespace flash8;
    extern __shared__ __align__(1024) char dynamic_shared[];
    auto& shared = *reinterpret_cast<SharedStorage<Config>*>(dynamic_shared);

    int const warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 128), 0);
    if (threadIdx.x < 32) {
        auto const tile = read_key_tile<Config>(params);
        if (threadIdx.x == 0) {
            shared.tile = tile;
            shared.read_seed(params.dropout);
            ptx::prefetch_tensor_map(&params.tma_q);
            ptx::prefetch_tensor_map(&params.tma_k);
            ptx::prefetch_tensor_map(&params.tma_v);
            ptx::prefetch_tensor_map(&params.tma_dout);
            shared.init_pipelines();
            ptx::fence_barrier_init();
        }
    }
    __syncthreads();
    if (!shared.tile.valid()) {
        return;
    }

    if (warpgroup == 0) {
        ptx::release_registers<Config::Registers::kProducer>();
        int const warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 32), 0);
        if (warp == 0 && threadIdx.x == 0) {
            Producer<Config>(params, shared).run();
        } else if (warp == 1) {
            RaggedRows<Config>::run(shared);
        } else if (Config::kStageDq && threadIdx.x == 64) {
            if constexpr (Config::kStageDq) {
                DqReducer<Config>::run(params, shared);
            }
        }
    } else {
        ptx::acquire_registers<Config::Registers::kConsumer>();
        consume(params, shared, warpgroup - 1);
    }
}
