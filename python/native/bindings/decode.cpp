#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "driver/gil.h"
#include "kernels/launch_decode.h"
#include "kernels/launch_schedule.h"

namespace py = pybind11;

namespace flash8 {

namespace {

void bind_schedule(py::module_& module) {
    using P = ScheduleParams;
    py::class_<P> type(module, "ScheduleParams", "Scheduler metadata to be made. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    type.def_property_readonly("call", [](P& self) { return &self.call; })
        .def_readwrite("seqlen_k_new", &P::seqlen_k_new)
        .def_readwrite("block_m", &P::block_m)
        .def_readwrite("tile_head_dim", &P::tile_head_dim)
        .def_readwrite("tile_head_dim_v", &P::tile_head_dim_v)
        .def_readwrite("qv", &P::qv)
        .def_readwrite("element_bytes", &P::element_bytes);
    def_address(type, "scheduler_metadata", &P::scheduler_metadata);
    def_address(type, "cu_seqlens_k_new", &P::cu_seqlens_k_new);
    module.def("launch_schedule", &launch_schedule, py::arg("kernel"), py::arg("device"), py::arg("stream"),
               py::arg("call"), ReleaseGil(),
               "Enqueue the kernel that makes scheduler metadata on a stream. Raises ValueError for sizes or "
               "addresses that it cannot take.");
}

}  // namespace

void bind_decode(py::module_& module) {
    using P = DecodeParams;
    py::class_<P> type(module, "DecodeParams", "A decode call. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    def_tensor(type, "q", &P::q);
    def_tensor(type, "qv", &P::qv);
    def_tensor(type, "k", &P::k);
    def_tensor(type, "v", &P::v);
    def_tensor(type, "o", &P::o);
    def_rows(type, "lse", &P::lse);
    def_descale(type, "q_descale", &P::q_descale);
    def_descale(type, "k_descale", &P::k_descale);
    def_descale(type, "v_descale", &P::v_descale);
    def_rows(type, "k_mean", &P::k_mean);
    def_rows(type, "v_mean", &P::v_mean);
    def_address(type, "partials", &P::partials);
    def_address(type, "tickets", &P::tickets);
    def_address(type, "tree_mask", &P::tree_mask);
    def_address(type, "scheduler_metadata", &P::scheduler_metadata);
    type.def_property_readonly("sequences", [](P& self) { return &self.sequences; })
        .def_property_readonly("scores", [](P& self) { return &self.scores; })
        .def_property_readonly("pages", [](P& self) { return &self.pages; })
        .def_property_readonly("append", [](P& self) { return &self.append; })
        .def_readwrite("heads_q", &P::heads_q)
        .def_readwrite("heads_kv", &P::heads_kv)
        .def_readwrite("head_dim", &P::head_dim)
        .def_readwrite("head_dim_v", &P::head_dim_v)
        .def_readwrite("q_is_e4m3", &P::q_is_e4m3)
        .def_readwrite("heads_per_q_descale", &P::heads_per_q_descale)
        .def_readwrite("tree_mask_stride", &P::tree_mask_stride)
        .def_readwrite("split_keys", &P::split_keys)
        .def_readwrite("k_scale_rows", &P::k_scale_rows)
        .def_readwrite("v_scale_rows", &P::v_scale_rows);
    module.def(
        "decode_workspace",
        [](const Kernel& kernel, int device, const P& call, int sm_margin) {
            const DecodeWorkspace workspace = decode_workspace(kernel, device, call, sm_margin);
            py::dict sizes;
            sizes["partials"] = workspace.partials;
            sizes["tickets"] = workspace.tickets;
            return sizes;
        },
        py::arg("kernel"), py::arg("device"), py::arg("call"), py::arg("sm_margin") = 0,
        "Bytes of the workspace of a call, by the name of the field that points to them.");
    module.def("launch_decode", &launch_decode, py::arg("kernel"), py::arg("device"), py::arg("stream"),
               py::arg("call"), py::arg("sm_margin") = 0, ReleaseGil(),
               "Enqueue the decode kernel on a stream. Fills in tensor maps and grid. Raises ValueError for "
               "sizes, strides or addresses that the kernel cannot take.");
    bind_schedule(module);
}

}  // namespace flash8
