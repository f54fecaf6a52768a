// The parts of the module flash8._native.

#pragma once

#include <pybind11/pybind11.h>

namespace flash8 {

void bind_driver(pybind11::module_& module);           // errors, the driver, memory, streams
void bind_kernel(pybind11::module_& module);           // tensor maps, libraries, kernels, the registry
void bind_calls(pybind11::module_& module);            // forward calls, and what attention calls share
void bind_backward(pybind11::module_& module);         // backward calls
void bind_decode(pybind11::module_& module);           // decode calls, and their scheduler metadata
void bind_quantize(pybind11::module_& module);         // quantizer calls
void bind_quantize_matrix(pybind11::module_& module);  // operands of products
void bind_append(pybind11::module_& module);           // appends to a cache
void bind_gemm(pybind11::module_& module);             // matrix products
void bind_qkv(pybind11::module_& module);              // QKV projections
void bind_plan_cache(pybind11::module_& module);       // the plans of attention calls

}  // namespace flash8
