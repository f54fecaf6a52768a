// The kernels of test_gpu_driver.py.

#include "kernel_info.h"

struct ScaleParams {
    float* data;
    int count;
    float factor;
};

extern "C" __constant__ flash8::KernelInfo kernel_info = {flash8::kAbiVersion,
                                                          sizeof(flash8::KernelInfo),
                                                          sizeof(ScaleParams),
                                                          flash8::KernelKind::kOther,
                                                          "scale",
                                                          64,
                                                          64,
                                                          64,
                                                          64,
                                                          1,
                                                          128,
                                                          1,
                                                          {2, 1, 1},
                                                          65536};

extern "C" __global__ void __launch_bounds__(128) scale(const __grid_constant__ ScaleParams params) {
    extern __shared__ float staged[];
    int const i = blockIdx.x * blockDim.x + threadIdx.x;
    staged[threadIdx.x + 16256] = i < params.count ? params.data[i] : 0.0f;
    __syncthreads();
    if (i < params.count) {
        params.data[i] = staged[threadIdx.x + 16256] * params.factor;
    }
}

// Two parameters and no KernelInfo of its own.
extern "C" __global__ void __launch_bounds__(32) add(int* data, int amount) {
    data[threadIdx.x] += amount;
}
