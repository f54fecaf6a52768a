// The QKV projection: the GEMM whose epilogue normalises, rotates and quantizes heads for the FP8 forward.
// The producer, the ring and the mainloop are those of kernel.cu. One variant per compilation;
// flash8.backends.hopper.gemm_variants says which -D options there are.

#include "mainloop.cuh"
#include "producer.cuh"
#include "qkv_epilogue.cuh"
#include "qkv_walk.cuh"

namespace flash8::gemm {

struct QkvSharedStorage {
    SharedStorage operands;
    TileAmax amax;
};

static_assert(sizeof(QkvSharedStorage) <= 227 * 1024, "the stages do not fit shared memory");

constexpr KernelInfo describe() {
    KernelInfo info{};
    info.abi_version = kAbiVersion;
    info.info_bytes = sizeof(KernelInfo);
    info.params_bytes = sizeof(QkvParams);
    info.kind = KernelKind::kQkvProjection;
    constexpr char kEntry[] = "flash8_qkv_projection";
    for (unsigned i = 0; i < sizeof(kEntry); ++i) {
        info.entry[i] = kEntry[i];
    }
    info.kBlockM = Config::kBlockM;
    info.kBlockN = info.kHeadDim = info.kHeadDimV = Config::kBlockN;
    info.kStages = Config::kStages;
    info.threads = Config::kThreads;
    info.min_ctas_per_sm = 1;
    info.cluster[0] = info.cluster[1] = info.cluster[2] = 1;
    info.shared_bytes = sizeof(QkvSharedStorage);
    info.producer_registers = Config::Registers::kProducer;
    info.consumer_registers = Config::Registers::kConsumer;
    info.scale_block = Config::kBlockScales ? kScaleBlock : 0;
    info.v_colmajor = 1;
    auto const box = [](unsigned rows) {
        return TmaBox{4, {Config::kBlockK, rows, 1, 1, 1}, ElementType::kUint8, Swizzle::k128B};
    };
    info.tma[0] = box(Config::kBlockM);
    info.tma[1] = box(Config::kBlockN);
    return info;
}

// Both warpgroups have half of the tokens of a block each, and meet once a tile, for its amax.
__device__ void consume(QkvParams const& params, QkvSharedStorage& shared, int warpgroup) {
    Mainloop mainloop(shared.operands, warpgroup);
    QkvEpilogue epilogue(params, shared.amax, mainloop.first_row());
    TokenBlockWalk blocks(params);
    int const k = k_blocks(params.gemm);
    TokenBlock block;
    while (blocks.next(block)) {
        Config::Accumulator sum[Config::kWaves];
        mainloop.run(block.empty() ? 0 : k, 0, sum);  // all columns of a head have one scale of B
        epilogue.finish(block, sum[0]);
    }
}

}  // namespace flash8::gemm

extern "C" __constant__ flash8::KernelInfo kernel_info = flash8::gemm::describe();

extern "C" __global__ void __launch_bounds__(flash8::gemm::Config::kThreads, 1)
    flash8_qkv_projection(flash8::QkvParams const __grid_constant__ params) {
    using namespace flash8;
    using namespace flash8::gemm;
    extern __shared__ __align__(1024) char dynamic_shared[];
    auto& shared = *reinterpret_cast<QkvSharedStorage*>(dynamic_shared);

    int const warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 128), 0);
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&params.gemm.tma_a);
        ptx::prefetch_tensor_map(&params.gemm.tma_b);
        shared.operands.init_pipeline();
        ptx::fence_barrier_init();
    }
    __syncthreads();

    if (warpgroup == 0) {
        ptx::release_registers<Config::Registers::kProducer>();
        if (threadIdx.x == 0) {
            load_operands(params.gemm, shared.operands, LoadedTileWalk(params));
        }
        if constexpr (Config::kBlockScales) {
            if (threadIdx.x / 32 == 1) {
                load_scales(params.gemm, shared.operands, LoadedTileWalk(params));
            }
        }
    } else {
        ptx::acquire_registers<Config::Registers::kConsumer>();
        consume(params, shared, warpgroup - 1);
    }
}
