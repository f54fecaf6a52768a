// D = A * B^T with mainloop and epilogue of CUTLASS's collective builders, and CUTLASS's own launcher: a
// kernel that nobody here has written. BF16, ping-pong consumers, clusters of two CTAs along M that share
// tiles of B by multicast, D by TMA.
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/numeric_types.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

using namespace cute;

namespace {

using Element = cutlass::bfloat16_t;
using Tile = Shape<_64, _128, _64>;
using Cluster = Shape<_2, _1, _1>;
constexpr int kAlignment = 8;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor,
    kAlignment, Element, cutlass::layout::RowMajor, kAlignment,
    cutlass::epilogue::TmaWarpSpecialized>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment,
    Element, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

}  // namespace

// A (m, k) and B (n, k) row-major, D (m, n) row-major, on the device. 0, or a cutlass::Status.
extern "C" __attribute__((visibility("default"))) int collective_gemm(const void* a, const void* b, void* d,
                                                                      int m, int n, int k, float alpha,
                                                                      int multiprocessors) {
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const Element*>(a),
         cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, make_shape(m, k, 1)),
         static_cast<const Element*>(b),
         cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, make_shape(n, k, 1))},
        {{alpha, 0.0f},
         nullptr,
         cutlass::make_cute_packed_stride(typename Kernel::StrideC{}, make_shape(m, n, 1)),
         static_cast<Element*>(d),
         cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, make_shape(m, n, 1))},
        cutlass::KernelHardwareInfo{0, multiprocessors, multiprocessors / 2}};
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(arguments);
    if (status == cutlass::Status::kSuccess) {
        status = gemm.initialize(arguments);
    }
    if (status == cutlass::Status::kSuccess) {
        status = gemm.run();
    }
    return static_cast<int>(status);
}
