#include "plan_cache/plan_cache.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace flash8 {

namespace {

PlanCache::Torch torch_of(py::object exchange_api, py::object tensor, py::object parameter,
                          py::object empty_like, py::object current_stream, py::object tile_count) {
    PlanCache::Torch torch;
    torch.exchange_api = std::move(exchange_api);
    torch.tensor_types = {std::move(tensor), std::move(parameter)};
    torch.empty_like = std::move(empty_like);
    torch.current_stream = std::move(current_stream);
    torch.tile_count = std::move(tile_count);
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

}  // namespace

void bind_plan_cache(py::module_& module) {
    py::class_<PlanCache> type(module, "PlanCache",
                               "The plans of forward calls, by all but their addresses.");
    type.def(py::init([](py::object exchange_api, py::object tensor, py::object parameter,
                         py::object empty_like, py::object current_stream, py::object tile_count) {
                 return std::make_unique<PlanCache>(
                     torch_of(std::move(exchange_api), std::move(tensor), std::move(parameter),
                              std::move(empty_like), std::move(current_stream), std::move(tile_count)));
             }),
             py::kw_only(), py::arg("exchange_api").none(true), py::arg("tensor"), py::arg("parameter"),
             py::arg("empty_like"), py::arg("current_stream"), py::arg("tile_count"));
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
