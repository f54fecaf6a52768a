#include <algorithm>
#include <array>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "driver/gil.h"
#include "kernels/launch_quantize.h"

namespace flash8 {

namespace {

using Signs = std::array<std::uint32_t, 8>;

void def_sizes(py::class_<QuantizeParams>& type) {
    using P = QuantizeParams;
    type.def_readwrite("total", &P::total)
        .def_readwrite("batch", &P::batch)
        .def_readwrite("seqlen", &P::seqlen)
        .def_readwrite("heads", &P::heads)
        .def_readwrite("head_dim", &P::head_dim)
        .def_readwrite("rope_rows", &P::rope_rows)
        .def_readwrite("rotary_dim", &P::rotary_dim)
        .def_readwrite("interleaved", &P::interleaved)
        .def_readwrite("hadamard_block", &P::hadamard_block)
        .def_readwrite("hadamard_scale", &P::hadamard_scale)
        .def_readwrite("reverse", &P::reverse)
        .def_property(
            "scale_source", [](const P& self) { return static_cast<int>(self.scale_source); },
            [](P& self, int source) { self.scale_source = static_cast<ScaleSource>(source); })
        .def_property(
            "hadamard_signs",
            [](const P& self) {
                Signs signs{};
                std::copy(std::begin(self.hadamard_signs), std::end(self.hadamard_signs), signs.begin());
                return signs;
            },
            [](P& self, const Signs& signs) { std::copy(signs.begin(), signs.end(), self.hadamard_signs); });
}

}  // namespace

void bind_quantize(py::module_& module) {
    using P = QuantizeParams;
    py::class_<P> type(module, "QuantizeParams", "A quantizer call. What is not set is zero.");
    type.def(py::init([] { return P{}; }));
    type.def("copy", [](const P& self) { return self; });
    def_tensor(type, "x", &P::x);
    def_tensor(type, "out", &P::out);
    def_rows(type, "mean", &P::mean);
    def_rows(type, "mean_rotated", &P::mean_rotated);
    def_address(type, "mean_partial", &P::mean_partial);
    def_group(type, "descale", &P::descale);
    def_group(type, "amax", &P::amax);
    def_address(type, "rope_cos", &P::rope_cos);
    def_address(type, "rope_sin", &P::rope_sin);
    def_address(type, "rope_offsets", &P::rope_offsets);
    def_address(type, "cu_seqlens", &P::cu_seqlens);
    def_address(type, "seqused", &P::seqused);
    def_sizes(type);
    module.def(
        "launch_quantize", &launch_quantize, py::arg("kernel"), py::arg("device"), py::arg("stream"),
        py::arg("call"), ReleaseGil(),
        "Enqueue a quantizer kernel on a stream. Raises ValueError for sizes, strides or addresses that "
        "the kernel cannot take.");
}

}  // namespace flash8
