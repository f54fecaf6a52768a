// flash8._native: what Python sees of the native layer.

#include "bindings/bindings.h"

#include "kernels/layout.h"
#include "params.h"

namespace py = pybind11;

namespace flash8 {

namespace {

// struct name -> {"size", "align", "fields": {field name: (offset, size)}}
py::dict layout_dict() {
    py::dict structs;
    for (const StructLayout& layout : struct_layouts()) {
        py::dict fields;
        for (const FieldLayout& field : layout.fields) {
            fields[py::str(field.name)] = py::make_tuple(field.offset, field.size);
        }
        py::dict entry;
        entry["size"] = layout.size;
        entry["align"] = layout.align;
        entry["fields"] = fields;
        structs[py::str(layout.name)] = entry;
    }
    return structs;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native layer of flash8: the CUDA driver, opened when first used.";
    module.attr("__version__") = FLASH8_VERSION;
    module.attr("ABI_VERSION") = kAbiVersion;
    module.def(
        "layout", &layout_dict,
        "Layout of every struct that host and device share: {struct: {'size', 'align', 'fields': {name: "
        "(offset, size)}}}.");
    bind_driver(module);
    bind_kernel(module);
    bind_calls(module);
    bind_backward(module);
    bind_decode(module);
    bind_quantize(module);
    bind_quantize_matrix(module);
    bind_append(module);
    bind_gemm(module);
    bind_qkv(module);
    bind_plan_cache(module);
}

}  // namespace flash8
