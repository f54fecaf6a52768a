// A kernel with its launchers in host code: what nvcc makes of <<<>>> and of a launch with a cluster.

#include <cuda_runtime.h>

__global__ void add(float* x, float value, int count) {
    int const i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        x[i] += value;
    }
}

__global__ void add_rank(float* x) {
    extern __shared__ float shared[];
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    shared[threadIdx.x] = static_cast<float>(rank);
    x[blockIdx.x * blockDim.x + threadIdx.x] += shared[threadIdx.x];
}

extern "C" int launch_add(float* x, float value, int count) {
    add<<<(count + 127) / 128, 128>>>(x, value, count);
    return cudaGetLastError();
}

extern "C" int launch_add_rank(float* x, int ctas) {
    int const bytes = 64 * 1024;  // more than without the attribute
    cudaError_t const status =
        cudaFuncSetAttribute(add_rank, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) {
        return status;
    }
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {2, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = ctas;
    config.blockDim = 32;
    config.dynamicSmemBytes = bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, add_rank, x);
}
