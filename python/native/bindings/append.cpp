#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "driver/gil.h"
#include "kernels/launch_append.h"

namespace flash8 {

namespace {

void bind_rows(py::module_& module) {
    using R = AppendedRows;
    py::class_<R> type(module, "AppendedRows", "The new rows of Q, K or V.");
    def_tensor(type, "x", &R::x);
    def_tensor(type, "out", &R::out);
    def_rows(type, "mean", &R::mean);
    def_descale(type, "descale", &R::descale);
    def_address(type, "cu_seqlens", &R::cu_seqlens);
    def_address(type, "norm_weight", &R::norm_weight);
    type.def_readwrite("tokens", &R::tokens)
        .def_readwrite("seqlen", &R::seqlen)
        .def_readwrite("heads", &R::heads)
        .def_readwrite("head_dim", &R::head_dim)
        .def_readwrite("descale_by_slot", &R::descale_by_slot)
        .def_readwrite("rotates", &R::rotates)
        .def_readwrite("advances", &R::advances)
        .def_readwrite("norm_is_fp32", &R::norm_is_fp32)
        .def_readwrite("norm_eps", &R::norm_eps);
}

void bind_rotary(py::module_& module) {
    using R = RotaryParams;
    py::class_<R> type(module, "RotaryParams", "Tables of rotary embedding, and where sequences begin.");
    def_address(type, "cos", &R::cos);
    def_address(type, "sin", &R::sin);
    def_address(type, "offsets", &R::offsets);
    type.def_readwrite("cos_stride", &R::cos_stride)
        .def_readwrite("sin_stride", &R::sin_stride)
        .def_readwrite("positions", &R::positions)
        .def_readwrite("rotary_dim", &R::rotary_dim)
        .def_readwrite("interleaved", &R::interleaved)
        .def_readwrite("is_fp32", &R::is_fp32);
}

void bind_place(py::module_& module) {
    using P = PlaceParams;
    py::class_<P> type(module, "PlaceParams", "Where new tokens go in the caches.");
    def_address(type, "cache_seqlens", &P::cache_seqlens);
    def_address(type, "page_table", &P::page_table);
    def_address(type, "kv_batch_idx", &P::kv_batch_idx);
    type.def_readwrite("page_table_stride", &P::page_table_stride)
        .def_readwrite("table_rows", &P::table_rows)
        .def_readwrite("max_pages", &P::max_pages)
        .def_readwrite("num_slots", &P::num_slots)
        .def_readwrite("slot_tokens", &P::slot_tokens);
}

}  // namespace

void bind_append(py::module_& module) {
    using P = AppendParams;
    bind_rows(module);
    bind_rotary(module);
    bind_place(module);
    py::class_<P> type(module, "AppendParams", "An append to a KV cache. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    type.def_property_readonly("q", [](P& self) { return &self.rows[0]; })
        .def_property_readonly("k", [](P& self) { return &self.rows[1]; })
        .def_property_readonly("v", [](P& self) { return &self.rows[2]; })
        .def_property_readonly("rotary", [](P& self) { return &self.rotary; })
        .def_property_readonly("place", [](P& self) { return &self.place; })
        .def_readwrite("batch", &P::batch);
    def_address(type, "lengths", &P::lengths);
    module.def("launch_append", &launch_append, py::arg("kernel"), py::arg("device"), py::arg("stream"),
               py::arg("call"), ReleaseGil(),
               "Enqueue the appending kernel on a stream. Raises ValueError for sizes, strides or addresses "
               "that it cannot take.");
}

}  // namespace flash8
