#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "driver/gil.h"
#include "kernels/launch_forward.h"

namespace py = pybind11;

namespace flash8 {

namespace {

void bind_sequences(py::module_& module) {
    using S = SequenceParams;
    py::class_<S> type(module, "SequenceParams", "Where sequences lie; addresses of int32 device memory.");
    def_address(type, "cu_seqlens_q", &S::cu_seqlens_q);
    def_address(type, "cu_seqlens_k", &S::cu_seqlens_k);
    def_address(type, "seqused_q", &S::seqused_q);
    def_address(type, "seqused_k", &S::seqused_k);
    def_address(type, "leftpad_k", &S::leftpad_k);
    def_address(type, "kv_batch_idx", &S::kv_batch_idx);
    type.def_readwrite("total_q", &S::total_q)
        .def_readwrite("total_k", &S::total_k)
        .def_readwrite("batch", &S::batch)
        .def_readwrite("batch_k", &S::batch_k)
        .def_readwrite("max_seqlen_q", &S::max_seqlen_q)
        .def_readwrite("max_seqlen_k", &S::max_seqlen_k);
}

void bind_scores(py::module_& module) {
    using S = ScoreParams;
    py::class_<S> type(module, "ScoreParams", "From q.k to probabilities.");
    def_address(type, "sinks", &S::sinks);
    def_address(type, "alibi_slopes", &S::alibi_slopes);
    type.def_readwrite("softmax_scale", &S::softmax_scale)
        .def_readwrite("softcap", &S::softcap)
        .def_readwrite("window_left", &S::window_left)
        .def_readwrite("window_right", &S::window_right)
        .def_readwrite("attention_chunk", &S::attention_chunk)
        .def_readwrite("alibi_batch_stride", &S::alibi_batch_stride);
}

void bind_pages(py::module_& module) {
    using S = PageParams;
    py::class_<S> type(module, "PageParams", "A paged KV cache.");
    def_address(type, "page_table", &S::page_table);
    type.def_readwrite("page_table_stride", &S::page_table_stride)
        .def_readwrite("page_size", &S::page_size)
        .def_readwrite("num_pages", &S::num_pages)
        .def_readwrite("max_pages", &S::max_pages);
}

void bind_dropout(py::module_& module) {
    using S = DropoutParams;
    py::class_<S> type(module, "DropoutParams", "Which probabilities are kept.");
    def_address(type, "seed", &S::seed);
    type.def_readwrite("threshold", &S::threshold).def_readwrite("keep_scale", &S::keep_scale);
}

void bind_scheduler(py::module_& module) {
    using S = SchedulerParams;
    py::class_<S> type(module, "SchedulerParams", "How tiles are handed out.");
    def_address(type, "tile_count", &S::tile_count);
    type.def_readwrite("heads_per_section", &S::heads_per_section)
        .def_readwrite("longest_first", &S::longest_first);
}

// Addresses of the scales that are written and of the one that is given, and the row stride.
using OutScaleTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t>;

void bind_forward(py::module_& module) {
    using P = ForwardParams;
    py::class_<P> type(module, "ForwardParams", "A forward call. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    def_tensor(type, "q", &P::q);
    def_tensor(type, "k", &P::k);
    def_tensor(type, "v", &P::v);
    def_tensor(type, "o", &P::o);
    def_rows(type, "lse", &P::lse);
    def_descale(type, "q_descale", &P::q_descale);
    def_descale(type, "k_descale", &P::k_descale);
    def_descale(type, "v_descale", &P::v_descale);
    def_rows(type, "k_mean", &P::k_mean);
    def_rows(type, "v_mean", &P::v_mean);
    def_rows(type, "v_channel_descale", &P::v_channel_descale);
    def_call(type);
    type.def_property_readonly("pages", [](P& self) { return &self.pages; });
    type.def_property(
        "out_scale",
        [](const P& self) {
            const OutScaleRef& ref = self.out_scale;
            return OutScaleTuple(reinterpret_cast<std::uintptr_t>(ref.ptr),
                                 reinterpret_cast<std::uintptr_t>(ref.given), ref.row_stride);
        },
        [](P& self, const OutScaleTuple& values) {
            const auto& [address, given, row] = values;
            self.out_scale = {reinterpret_cast<float*>(address), reinterpret_cast<const float*>(given), row};
        });
    type.def_readwrite("o_type", &P::o_type).def_readwrite("heads_per_q_descale", &P::heads_per_q_descale);
    module.def("launch_forward", &launch_forward, py::arg("kernel"), py::arg("device"), py::arg("stream"),
               py::arg("call"), py::arg("sm_margin") = 0, ReleaseGil(),
               "Enqueue the forward kernel on a stream. Fills in tensor maps, scheduler and grid. Raises "
               "ValueError for sizes, strides or addresses that the kernel cannot take.");
}

}  // namespace

void bind_calls(py::module_& module) {
    bind_sequences(module);
    bind_scores(module);
    bind_pages(module);
    bind_dropout(module);
    bind_scheduler(module);
    bind_forward(module);
}

}  // namespace flash8
