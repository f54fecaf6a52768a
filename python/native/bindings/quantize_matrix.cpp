#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "driver/gil.h"
#include "kernels/launch_quantize_matrix.h"

namespace flash8 {

void bind_quantize_matrix(py::module_& module) {
    using P = QuantizeMatrixParams;
    py::class_<P> type(module, "QuantizeMatrixParams",
                       "An operand of a matrix product. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    def_address(type, "x", &P::x);
    def_address(type, "other", &P::other);
    def_address(type, "sum", &P::sum);
    def_address(type, "norm_weight", &P::norm_weight);
    def_address(type, "out", &P::out);
    def_address(type, "scale", &P::scale);
    type.def_readwrite("x_stride", &P::x_stride)
        .def_readwrite("other_stride", &P::other_stride)
        .def_readwrite("sum_stride", &P::sum_stride)
        .def_readwrite("out_stride", &P::out_stride)
        .def_readwrite("scale_stride", &P::scale_stride)
        .def_readwrite("rows", &P::rows)
        .def_readwrite("columns", &P::columns)
        .def_readwrite("by_row", &P::by_row)
        .def_readwrite("row_threads", &P::row_threads)
        .def_readwrite("norm_is_fp32", &P::norm_is_fp32)
        .def_readwrite("norm_eps", &P::norm_eps);
    module.def("launch_quantize_matrix", &launch_quantize_matrix, py::arg("kernel"), py::arg("device"),
               py::arg("stream"), py::arg("call"), ReleaseGil(),
               "Enqueue a kernel that makes an operand of a matrix product. Raises ValueError for sizes, "
               "strides or addresses that the kernel cannot take.");
}

}  // namespace flash8
