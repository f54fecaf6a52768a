#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "driver/gil.h"
#include "kernels/launch_gemm.h"

namespace flash8 {

namespace {

// A scale is (address, row stride, block stride).
void def_scale(py::class_<GemmParams>& type, const char* name, ScaleRef GemmParams::* member) {
    type.def_property(
        name,
        [member](const GemmParams& self) {
            const ScaleRef& ref = self.*member;
            return RowTuple(reinterpret_cast<std::uintptr_t>(ref.ptr), ref.row_stride, ref.block_stride);
        },
        [member](GemmParams& self, const RowTuple& given) {
            const auto& [address, row, block] = given;
            self.*member = {reinterpret_cast<const float*>(address), row, block};
        });
}

}  // namespace

void bind_gemm(py::module_& module) {
    using P = GemmParams;
    py::class_<P> type(module, "GemmParams", "A matrix product. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    def_address(type, "a", &P::a);
    def_address(type, "b", &P::b);
    def_address(type, "out", &P::out);
    def_address(type, "bias", &P::bias);
    def_scale(type, "scale_a", &P::scale_a);
    def_scale(type, "scale_b", &P::scale_b);
    def_address(type, "scale_result", &P::scale_result);
    def_address(type, "group_rows", &P::group_rows);
    type.def_readwrite("a_stride", &P::a_stride)
        .def_readwrite("b_stride", &P::b_stride)
        .def_readwrite("out_stride", &P::out_stride)
        .def_readwrite("m", &P::m)
        .def_readwrite("n", &P::n)
        .def_readwrite("k", &P::k)
        .def_readwrite("out_type", &P::out_type)
        .def_readwrite("bias_type", &P::bias_type)
        .def_readwrite("scale_a_row_shift", &P::scale_a_row_shift)
        .def_readwrite("b_group_stride", &P::b_group_stride)
        .def_readwrite("scale_a_group_stride", &P::scale_a_group_stride)
        .def_readwrite("scale_b_group_stride", &P::scale_b_group_stride)
        .def_readwrite("groups", &P::groups)
        .def_readwrite("rows_per_group", &P::rows_per_group)
        .def_readwrite("splits", &P::splits);
    module.def("launch_gemm", &launch_gemm, py::arg("kernel"), py::arg("device"), py::arg("stream"),
               py::arg("call"), ReleaseGil(),
               "Enqueue a matrix product on a stream. Raises ValueError for sizes, strides or addresses that "
               "the kernel cannot take.");
}

}  // namespace flash8
