#include <cxxabi.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/bindings.h"
#include "plan_cache/backward_cache.h"
#include "plan_cache/decode_cache.h"
#include "plan_cache/gemm_cache.h"
#include "plan_cache/plan_cache.h"

namespace py = pybind11;

namespace flash8 {

namespace {

TorchTensors::Functions torch_of(py::object exchange_api, py::object tensor, py::object parameter,
                                 py::object empty_like, py::object current_stream,
                                 py::object increment_version) {
    TorchTensors::Functions torch;
    torch.exchange_api = std::move(exchange_api);
    torch.tensor_types = {std::move(tensor), std::move(parameter)};
    torch.empty_like = std::move(empty_like);
    torch.current_stream = std::move(current_stream);
    torch.increment_version = std::move(increment_version);
    return torch;
}

void insert(PlanCache& self, py::handle scope, py::dict arguments, std::shared_ptr<Kernel> kernel, int device,
            int sm_margin, bool dynamic_schedule, const ForwardParams& params, py::object out_like,
            py::object lse_like, py::object options, std::size_t most_plans) {
    CallPlan plan;
    plan.kernel = std::move(kernel);
    plan.device = device;
    plan.sm_margin = sm_margin;
    plan.dynamic_schedule = dynamic_schedule;
    plan.params = params;
    plan.out_like = std::move(out_like);
    plan.lse_like = std::move(lse_like);
    plan.options = std::move(options);
    self.insert({scope, std::move(arguments)}, std::move(plan), most_plans);
}

void insert_backward(BackwardCache& self, py::handle scope, py::tuple saved, py::tuple incoming,
                     py::tuple options, py::tuple names, bool deterministic,
                     std::array<std::shared_ptr<Kernel>, 3> kernels, int device, const BackwardParams& params,
                     const std::array<py::object, 3>& gradients_like, py::object dsinks_like,
                     py::object workspace_like, std::size_t most_plans) {
    BackwardPlan plan;
    plan.kernels = std::move(kernels);
    plan.device = device;
    plan.params = params;
    plan.dq_like = gradients_like[0];
    plan.dk_like = gradients_like[1];
    plan.dv_like = gradients_like[2];
    plan.dsinks_like = std::move(dsinks_like);
    plan.workspace_like = std::move(workspace_like);
    self.insert(
        {scope, std::move(saved), std::move(incoming), std::move(options), std::move(names), deterministic},
        std::move(plan), most_plans);
}

void bind_backward_cache(py::module_& module) {
    py::class_<BackwardCache> type(module, "BackwardCache",
                                   "The plans of backward calls, by all but their addresses.");
    type.def(
        py::init([](py::object exchange_api, py::object tensor, py::object parameter, py::object empty_like,
                    py::object current_stream, py::object increment_version, const py::tuple& field_names) {
            return std::make_unique<BackwardCache>(
                torch_of(std::move(exchange_api), std::move(tensor), std::move(parameter),
                         std::move(empty_like), std::move(current_stream), std::move(increment_version)),
                field_names);
        }),
        py::kw_only(), py::arg("exchange_api").none(true), py::arg("tensor"), py::arg("parameter"),
        py::arg("empty_like"), py::arg("current_stream"), py::arg("increment_version"),
        py::arg("field_names"));
    type.def(
        "run",
        [](const BackwardCache& self, py::handle scope, py::tuple saved, py::tuple incoming,
           py::tuple options, py::tuple names, bool deterministic) {
            return self.run({scope, std::move(saved), std::move(incoming), std::move(options),
                             std::move(names), deterministic});
        },
        "On a hit launches and gives (dQ, dK, dV, gradient of the sinks or None); None on a miss.\n"
        "saved: q, k, v, qv, s_aux, O, LSE, and the options called `names`, which are None in `options`.\n"
        "incoming: the gradients of O and LSE.");
    type.def("insert", &insert_backward, py::arg("scope"), py::arg("saved"), py::arg("incoming"),
             py::arg("options"), py::arg("names"), py::arg("deterministic"), py::kw_only(),
             py::arg("kernels"), py::arg("device"), py::arg("params"), py::arg("gradients_like"),
             py::arg("dsinks_like").none(true), py::arg("workspace_like"), py::arg("most_plans"),
             "Keep the plan of a call, unless its launches point to more than the arguments.");
    type.def("clear", &BackwardCache::clear);
    type.def("__len__", &BackwardCache::size);
}

// run(**arguments), which no dict is made of on a hit. Not by pybind11, which always makes one.
PyObject* run_decode(PyObject* self, PyObject* const* values, Py_ssize_t count, PyObject* names) {
    if (count != 0 || names == nullptr) {
        PyErr_SetString(PyExc_TypeError, "run takes the arguments of a call by name");
        return nullptr;
    }
    try {
        py::object done = py::handle(self).cast<DecodeCache&>().run(names, values);
        if (!done.is_none()) {
            return done.release().ptr();
        }
        py::dict arguments;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
            arguments[PyTuple_GET_ITEM(names, i)] = py::handle(values[i]);
        }
        return arguments.release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (abi::__forced_unwind&) {
        throw;
    } catch (...) {
        py::detail::try_translate_exceptions();
    }
    return nullptr;
}

PyMethodDef kRunDecode = {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run_decode)),
                          METH_FASTCALL | METH_KEYWORDS,
                          "run(**arguments): on a hit launches and gives (O, LSE or None); on a miss gives "
                          "the arguments, by name."};

void insert_decode(DecodeCache& self, const py::dict& arguments, std::shared_ptr<Kernel> kernel, int device,
                   int sm_margin, const DecodeParams& params, py::object out_like, py::object lse_like,
                   std::size_t partial_bytes, bool returns_lse, std::optional<AppendPlan> append,
                   std::size_t most_plans) {
    DecodePlan plan;
    plan.kernel = std::move(kernel);
    plan.device = device;
    plan.sm_margin = sm_margin;
    plan.params = params;
    plan.out_like = std::move(out_like);
    plan.lse_like = std::move(lse_like);
    plan.partial_bytes = partial_bytes;
    plan.returns_lse = returns_lse;
    plan.append = std::move(append);
    self.insert(arguments, std::move(plan), most_plans);
}

void bind_append_plan(py::module_& module) {
    using Launches = std::vector<std::pair<std::shared_ptr<Kernel>, AppendParams>>;
    py::class_<AppendPlan>(module, "AppendPlan",
                           "What a call over a KV cache launches before attention. A kernel "
                           "of None, without lengths_like: all is within the decode kernel.")
        .def(py::init([](Launches launches, py::object lengths_like, py::object rotated_like) {
                 std::vector<AppendPlan::Launch> plan;
                 for (auto& [kernel, params] : launches) {
                     plan.push_back({std::move(kernel), params});
                 }
                 const bool within = plan.size() == 1 && !plan.front().kernel;
                 const bool ahead = std::all_of(plan.begin(), plan.end(), [](const AppendPlan::Launch& x) {
                     return x.kernel != nullptr;
                 });
                 if (!(lengths_like.is_none() ? within : ahead)) {
                     throw py::value_error(
                         "launches must have kernels with lengths_like, and be one of None without");
                 }
                 return AppendPlan(std::move(plan), std::move(lengths_like), std::move(rotated_like));
             }),
             py::arg("launches"), py::arg("lengths_like").none(true), py::arg("rotated_like").none(true));
}

void bind_decode_cache(py::module_& module) {
    bind_append_plan(module);
    py::class_<DecodeCache> type(module, "DecodeCache",
                                 "The plans of calls over a KV cache, by all but their addresses.");
    type.def(py::init([](py::object exchange_api, py::object tensor, py::object parameter,
                         py::object empty_like, py::object current_stream, py::object increment_version,
                         py::object kernels, py::object is_grad_enabled, py::object workspace) {
                 return std::make_unique<DecodeCache>(
                     torch_of(std::move(exchange_api), std::move(tensor), std::move(parameter),
                              std::move(empty_like), std::move(current_stream), std::move(increment_version)),
                     std::move(kernels), std::move(is_grad_enabled), std::move(workspace));
             }),
             py::kw_only(), py::arg("exchange_api").none(true), py::arg("tensor"), py::arg("parameter"),
             py::arg("empty_like"), py::arg("current_stream"), py::arg("increment_version"),
             py::arg("kernels"), py::arg("is_grad_enabled"), py::arg("workspace"));
    type.attr("run") = py::reinterpret_steal<py::object>(
        PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &kRunDecode));
    type.def(
        "has_key", [](DecodeCache& self, const py::dict& arguments) { return self.has_key(arguments); },
        "Whether the plan of such a call can be kept.");
    type.def("insert", &insert_decode, py::arg("arguments"), py::kw_only(), py::arg("kernel").none(false),
             py::arg("device"), py::arg("sm_margin"), py::arg("params"), py::arg("out_like"),
             py::arg("lse_like"), py::arg("partial_bytes"), py::arg("returns_lse"),
             py::arg("append").none(true), py::arg("most_plans"),
             "Keep the plan of a call, unless its launch points to more than the arguments.");
    type.def("clear", &DecodeCache::clear);
    type.def("__len__", &DecodeCache::size);
}

void insert_gemm(GemmCache& self, py::handle scope, py::dict arguments, std::shared_ptr<Kernel> kernel,
                 int device, const GemmParams& params, py::object out_like, std::size_t most_plans) {
    self.insert({scope, std::move(arguments)}, {std::move(kernel), device, params, std::move(out_like)},
                most_plans);
}

void bind_gemm_cache(py::module_& module) {
    py::class_<GemmCache> type(module, "GemmCache",
                               "The plans of scaled matrix products, by all but their addresses.");
    type.def(py::init([](py::object exchange_api, py::object tensor, py::object parameter,
                         py::object empty_like, py::object current_stream, py::object increment_version) {
                 return std::make_unique<GemmCache>(torch_of(
                     std::move(exchange_api), std::move(tensor), std::move(parameter), std::move(empty_like),
                     std::move(current_stream), std::move(increment_version)));
             }),
             py::kw_only(), py::arg("exchange_api").none(true), py::arg("tensor"), py::arg("parameter"),
             py::arg("empty_like"), py::arg("current_stream"), py::arg("increment_version"));
    type.def(
        "run",
        [](GemmCache& self, py::handle scope, py::dict arguments) {
            return self.run({scope, std::move(arguments)});
        },
        "On a hit launches and gives out; None on a miss.");
    type.def(
        "has_key",
        [](GemmCache& self, py::handle scope, py::dict arguments) {
            return self.has_key({scope, std::move(arguments)});
        },
        "Whether the plan of such a call can be kept.");
    type.def("insert", &insert_gemm, py::arg("scope"), py::arg("arguments"), py::kw_only(),
             py::arg("kernel").none(false), py::arg("device"), py::arg("params"), py::arg("out_like"),
             py::arg("most_plans"),
             "Keep the plan of a call, unless its launch points to more than the arguments.");
    type.def("clear", &GemmCache::clear);
    type.def("__len__", &GemmCache::size);
}

}  // namespace

void bind_plan_cache(py::module_& module) {
    bind_backward_cache(module);
    bind_decode_cache(module);
    bind_gemm_cache(module);
    py::class_<PlanCache> type(module, "PlanCache",
                               "The plans of forward calls, by all but their addresses.");
    type.def(
        py::init([](py::object exchange_api, py::object tensor, py::object parameter, py::object empty_like,
                    py::object current_stream, py::object increment_version, py::object tile_count) {
            return std::make_unique<PlanCache>(
                torch_of(std::move(exchange_api), std::move(tensor), std::move(parameter),
                         std::move(empty_like), std::move(current_stream), std::move(increment_version)),
                std::move(tile_count));
        }),
        py::kw_only(), py::arg("exchange_api").none(true), py::arg("tensor"), py::arg("parameter"),
        py::arg("empty_like"), py::arg("current_stream"), py::arg("increment_version"),
        py::arg("tile_count"));
    type.def(
        "run",
        [](PlanCache& self, py::handle scope, py::dict arguments, bool want_lse, bool grad_enabled) {
            return self.run({scope, std::move(arguments)}, want_lse, grad_enabled);
        },
        "On a hit launches and gives (O, LSE or None, options or None); None on a miss.\n"
        "LSE is there if it is wanted; it and the options are where autograd has to know of the call.");
    type.def(
        "has_key",
        [](PlanCache& self, py::handle scope, py::dict arguments) {
            return self.has_key({scope, std::move(arguments)});
        },
        "Whether the plan of such a call can be kept.");
    type.def("insert", &insert, py::arg("scope"), py::arg("arguments"), py::kw_only(),
             py::arg("kernel").none(false), py::arg("device"), py::arg("sm_margin"),
             py::arg("dynamic_schedule"), py::arg("params"), py::arg("out_like"), py::arg("lse_like"),
             py::arg("options"), py::arg("most_plans"),
             "Keep the plan of a call. It is a miss still if its launch points to more than the arguments.");
    type.def("clear", &PlanCache::clear);
    type.def("__len__", &PlanCache::size);
}

}  // namespace flash8
