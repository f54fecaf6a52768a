#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "driver/gil.h"
#include "kernels/launch_qkv.h"

namespace flash8 {

void bind_qkv(py::module_& module) {
    using P = QkvParams;
    py::class_<P> type(module, "QkvParams", "A QKV projection. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    type.def_property_readonly("gemm", [](P& self) { return &self.gemm; });
    def_tensor(type, "q", &P::q);
    def_tensor(type, "k", &P::k);
    def_tensor(type, "v", &P::v);
    def_group(type, "q_descale", &P::q_descale);
    def_group(type, "k_descale", &P::k_descale);
    def_group(type, "v_descale", &P::v_descale);
    def_address(type, "q_norm", &P::q_norm);
    def_address(type, "k_norm", &P::k_norm);
    def_address(type, "rope_cos", &P::rope_cos);
    def_address(type, "rope_sin", &P::rope_sin);
    def_address(type, "rope_offsets", &P::rope_offsets);
    def_address(type, "cu_seqlens", &P::cu_seqlens);
    def_address(type, "seqused", &P::seqused);
    type.def_readwrite("batch", &P::batch)
        .def_readwrite("seqlen", &P::seqlen)
        .def_readwrite("heads_q", &P::heads_q)
        .def_readwrite("heads_kv", &P::heads_kv)
        .def_readwrite("rope_rows", &P::rope_rows)
        .def_readwrite("rotary_dim", &P::rotary_dim)
        .def_readwrite("interleaved", &P::interleaved)
        .def_readwrite("norm_eps", &P::norm_eps);
    module.def("launch_qkv", &launch_qkv, py::arg("kernel"), py::arg("device"), py::arg("stream"),
               py::arg("call"), ReleaseGil(),
               "Enqueue a QKV projection on a stream. Raises ValueError for sizes, strides or addresses that "
               "the kernel cannot take.");
}

}  // namespace flash8
