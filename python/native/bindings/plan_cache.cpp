#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "plan_cache/plan_cache.h"

namespace py = pybind11;

namespace flash8 {

void bind_plan_cache(py::module_& module) {
    py::class_<PlanCache> type(module, "PlanCache",
                               "Forward calls that are like one before, and the plans of their launches.");
    type.def(py::init([](py::object exchange_api, py::object tensor, py::object parameter,
                         py::object empty_like, py::object current_stream, py::object tile_count,
                         const std::vector<std::string>& option_names) {
                 PlanCache::Torch torch{std::move(exchange_api),
                                        {std::move(tensor), std::move(parameter)},
                                        std::move(empty_like),
                                        std::move(current_stream),
                                        std::move(tile_count)};
                 return std::make_unique<PlanCache>(std::move(torch), option_names);
             }),
             py::kw_only(), py::arg("exchange_api").none(true), py::arg("tensor"), py::arg("parameter"),
             py::arg("empty_like"), py::arg("current_stream"), py::arg("tile_count"),
             py::arg("option_names"));
    type.def(
        "run",
        [](PlanCache& self, py::handle scope, py::tuple inputs, py::tuple options, py::object window,
           bool want_lse, bool grad_enabled) {
            return self.run({scope, std::move(inputs), std::move(options), std::move(window)}, want_lse,
                            grad_enabled);
        },
        "(O, LSE or None, note or None) of a call that is like a cached one, or None.\n"
        "LSE is there if it is wanted; it and the note are where autograd has to know of the call.");
    type.def(
        "contains",
        [](const PlanCache& self, py::handle scope, py::tuple inputs, py::tuple options, py::object window) {
            return self.contains({scope, std::move(inputs), std::move(options), std::move(window)});
        },
        "Whether a call like this one has been given to remember.");
    type.def(
        "insert",
        [](PlanCache& self, py::handle scope, py::tuple inputs, py::tuple options, py::object window,
           std::shared_ptr<Kernel> kernel, int device, int sm_margin, bool dynamic_schedule,
           const ForwardParams& params, py::object out_like, py::object lse_like, py::object note,
           std::size_t most_plans) {
            CallPlan plan{std::move(kernel),   device,         sm_margin,
                          dynamic_schedule,    params,         std::move(out_like),
                          std::move(lse_like), std::move(note)};
            self.insert({scope, std::move(inputs), std::move(options), std::move(window)}, std::move(plan),
                        most_plans);
        },
        py::arg("scope"), py::arg("inputs"), py::arg("options"), py::arg("window"), py::kw_only(),
        py::arg("kernel").none(false), py::arg("device"), py::arg("sm_margin"), py::arg("dynamic_schedule"),
        py::arg("params"), py::arg("out_like"), py::arg("lse_like"), py::arg("note"), py::arg("most_plans"),
        "Keep the plan of a call, unless its launch points to anything but the arguments themselves.");
    type.def("clear", &PlanCache::clear);
    type.def("__len__", &PlanCache::size);
}

}  // namespace flash8
