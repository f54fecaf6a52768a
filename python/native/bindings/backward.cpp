#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "driver/gil.h"
#include "kernels/launch_backward.h"

namespace py = pybind11;

namespace flash8 {

namespace {

void bind_params(py::module_& module) {
    using P = BackwardParams;
    py::class_<P> type(module, "BackwardParams", "A backward call. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    def_tensor(type, "q", &P::q);
    def_tensor(type, "k", &P::k);
    def_tensor(type, "v", &P::v);
    def_tensor(type, "o", &P::o);
    def_tensor(type, "dout", &P::dout);
    def_tensor(type, "dq", &P::dq);
    def_tensor(type, "dk", &P::dk);
    def_tensor(type, "dv", &P::dv);
    def_rows(type, "lse", &P::lse);
    def_rows(type, "dlse", &P::dlse);
    def_rows(type, "k_mean", &P::k_mean);
    def_rows(type, "v_mean", &P::v_mean);
    def_descale(type, "q_descale", &P::q_descale);
    def_descale(type, "k_descale", &P::k_descale);
    def_descale(type, "v_descale", &P::v_descale);
    def_address(type, "row_stats", &P::row_stats);
    def_address(type, "dq_accum", &P::dq_accum);
    def_address(type, "dq_semaphore", &P::dq_semaphore);
    def_address(type, "dsinks_partial", &P::dsinks_partial);
    def_address(type, "dsinks", &P::dsinks);
    def_address(type, "dkv_partial", &P::dkv_partial);
    type.def_readwrite("head_splits", &P::head_splits);
    def_address(type, "q16", &P::q16);
    def_address(type, "key_mean", &P::key_mean);
    type.def_readwrite("heads_per_q_descale", &P::heads_per_q_descale);
    def_call(type);
}

py::dict workspace(const Kernel& kernel, const BackwardParams& call) {
    const BackwardWorkspace bytes = backward_workspace(kernel, call);
    py::dict parts;
    parts["row_stats"] = bytes.row_stats;
    parts["dq_accum"] = bytes.dq_accum;
    parts["dq_semaphore"] = bytes.dq_semaphore;
    if (bytes.dsinks_partial > 0) {
        parts["dsinks_partial"] = bytes.dsinks_partial;
    }
    if (bytes.dkv_partial > 0) {
        parts["dkv_partial"] = bytes.dkv_partial;
    }
    if (bytes.q16 > 0) {
        parts["q16"] = bytes.q16;
        parts["key_mean"] = bytes.key_mean;
    }
    return parts;
}

}  // namespace

void bind_backward(py::module_& module) {
    bind_params(module);
    module.attr("WORKSPACE_UNIT") = kWorkspaceUnit;
    module.def("backward_workspace", &workspace, py::arg("kernel"), py::arg("call"),
               "The bytes of each part of a call's workspace, by the name of the address that BackwardParams "
               "has for it: a multiple of WORKSPACE_UNIT.");
    module.def(
        "launch_backward",
        [](Kernel& preprocess, Kernel& kernel, Kernel& postprocess, int device, std::uint64_t stream,
           const BackwardParams& call) {
            launch_backward({preprocess, kernel, postprocess}, device, stream, call);
        },
        py::arg("preprocess"), py::arg("kernel"), py::arg("postprocess"), py::arg("device"),
        py::arg("stream"), py::arg("call"), ReleaseGil(),
        "Enqueue the three kernels of the backward on a stream. Fills in tensor maps, blocks and grids. "
        "Raises "
        "ValueError for sizes, strides or addresses that the kernels cannot take.");
}

}  // namespace flash8
