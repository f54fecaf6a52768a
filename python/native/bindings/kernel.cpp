#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "driver/gil.h"
#include "driver/launch.h"
#include "driver/registry.h"
#include "driver/tensor_map.h"

namespace py = pybind11;

namespace flash8 {

namespace {

py::bytes tensor_map_bytes(const Driver& driver, ElementType element_type, std::uint64_t address,
                           std::vector<std::int64_t> dims, std::vector<std::int64_t> strides,
                           const std::vector<std::uint32_t>& box, Swizzle swizzle) {
    TmaBox tma{static_cast<std::uint32_t>(box.size()), {}, element_type, swizzle};
    if (box.size() > std::size(tma.box)) {
        throw std::invalid_argument("tensor map: the box has rank " + std::to_string(box.size()) +
                                    "; supported are 1 to 5");
    }
    std::copy(box.begin(), box.end(), tma.box);
    const TensorMap map =
        encode_tensor_map(driver, {element_type, address, std::move(dims), std::move(strides)}, tma);
    return py::bytes(map.opaque, sizeof(map.opaque));
}

void bind_tensor_map(py::module_& module) {
    py::native_enum<ElementType>(module, "ElementType", "enum.IntEnum")
        .value("UINT8", ElementType::kUint8)
        .value("FLOAT16", ElementType::kFloat16)
        .value("FLOAT32", ElementType::kFloat32)
        .value("BFLOAT16", ElementType::kBfloat16)
        .finalize();
    py::native_enum<Swizzle>(module, "Swizzle", "enum.IntEnum")
        .value("NONE", Swizzle::kNone)
        .value("B32", Swizzle::k32B)
        .value("B64", Swizzle::k64B)
        .value("B128", Swizzle::k128B)
        .finalize();
    module.def("encode_tensor_map", &tensor_map_bytes, py::arg("driver"), py::kw_only(),
               py::arg("element_type"), py::arg("address"), py::arg("dims"), py::arg("strides"),
               py::arg("box"), py::arg("swizzle") = Swizzle::kNone,
               "The 128 bytes of a TMA descriptor. dims and box count elements, innermost first; strides are "
               "in bytes, one for every dimension but the innermost.");
}

void bind_kernel_info(py::module_& module) {
    py::class_<KernelInfo>(module, "KernelInfo", "What a compiled kernel says of itself.")
        .def_readonly("abi_version", &KernelInfo::abi_version)
        .def_readonly("params_bytes", &KernelInfo::params_bytes)
        .def_property_readonly("kind",
                               [](const KernelInfo& self) { return static_cast<unsigned>(self.kind); })
        .def_property_readonly("entry", [](const KernelInfo& self) { return std::string(self.entry); })
        .def_readonly("block_m", &KernelInfo::kBlockM)
        .def_readonly("block_n", &KernelInfo::kBlockN)
        .def_readonly("head_dim", &KernelInfo::kHeadDim)
        .def_readonly("head_dim_v", &KernelInfo::kHeadDimV)
        .def_readonly("stages", &KernelInfo::kStages)
        .def_property_readonly("v_colmajor", [](const KernelInfo& self) { return self.v_colmajor != 0; })
        .def_property_readonly("paged",
                               [](const KernelInfo& self) { return self.paged != PageChoice::kNone; })
        .def_property_readonly("qv", [](const KernelInfo& self) { return self.qv != 0; })
        .def_property_readonly("appends", [](const KernelInfo& self) { return self.appends != 0; })
        .def_property_readonly("out_e4m3", [](const KernelInfo& self) { return self.out_e4m3 != 0; })
        .def_readonly("max_splits", &KernelInfo::max_splits)
        .def_readonly("threads", &KernelInfo::threads)
        .def_property_readonly("cluster",
                               [](const KernelInfo& self) {
                                   return py::make_tuple(self.cluster[0], self.cluster[1], self.cluster[2]);
                               })
        .def_readonly("shared_bytes", &KernelInfo::shared_bytes);
}

// Any contiguous buffers as parameters, held until the launch has copied them.
class Buffers {
  public:
    explicit Buffers(const py::iterable& parameters) {
        for (const py::handle item : parameters) {
            views_.push_back(py::cast<py::buffer>(item).request());
            const py::buffer_info& view = views_.back();
            if (PyBuffer_IsContiguous(view.view(), 'C') == 0) {
                throw std::invalid_argument("a parameter is not contiguous");
            }
            parameters_.push_back({view.ptr, static_cast<std::size_t>(view.size * view.itemsize)});
        }
    }

    const std::vector<Parameter>& parameters() const { return parameters_; }

  private:
    std::vector<py::buffer_info> views_;
    std::vector<Parameter> parameters_;
};

void launch_kernel(Kernel& kernel, const Dim3& grid, const py::iterable& parameters,
                   const std::optional<Dim3>& block, const std::optional<Dim3>& cluster,
                   const std::optional<std::int64_t>& shared_bytes, std::uint64_t stream, int device,
                   bool overlap_previous) {
    LaunchShape shape;
    shape.grid = grid;
    if (kernel.info()) {
        shape = shape_of(*kernel.info(), grid);
    } else if (!block) {
        throw std::invalid_argument(kernel.name() + " exports no kernel_info; pass block");
    }
    shape.block = block.value_or(shape.block);
    shape.cluster = cluster.value_or(shape.cluster);
    shape.shared_bytes = shared_bytes.value_or(shape.shared_bytes);
    shape.overlap_previous = overlap_previous;
    const Buffers buffers(parameters);
    const GilRelease release;
    launch(kernel, device, stream, shape, buffers.parameters());
}

void bind_library(py::module_& module) {
    py::class_<Library, std::shared_ptr<Library>>(module, "Library",
                                                  "A cubin, or PTX, in the driver's hands.")
        .def(py::init([](std::shared_ptr<const Driver> driver, const py::bytes& image) {
                 const std::string copy = image;
                 const GilRelease release;
                 return std::make_shared<Library>(std::move(driver), copy);
             }),
             py::arg("driver").none(false), py::arg("image"))
        .def("info", &Library::info, "The kernel_info that the image exports.")
        .def(
            "kernel",
            [](std::shared_ptr<const Library> self, const std::optional<std::string>& name) {
                return name ? std::make_shared<Kernel>(std::move(self), *name)
                            : std::make_shared<Kernel>(std::move(self));
            },
            py::arg("name") = py::none(), ReleaseGil(),
            "The kernel of that name, or the one that kernel_info describes.");
}

const char* const kLaunchDoc =
    "Enqueue the kernel on a stream (a driver handle; 0 is the default stream) and return.\n\n"
    "parameters: one contiguous buffer per kernel parameter. block, cluster and shared_bytes come from the\n"
    "kernel's kernel_info unless given. Raises ValueError for what no device can run, DriverError when the\n"
    "driver refuses.";

void bind_kernel_class(py::module_& module) {
    py::class_<Kernel, std::shared_ptr<Kernel>>(module, "Kernel", "One kernel, on every device.")
        .def_property_readonly("name", &Kernel::name)
        .def_property_readonly("info", [](const Kernel& self) { return self.info(); })
        .def(
            "registers", [](Kernel& self, int device) { return self.attribute(device, cu::kNumRegs); },
            py::arg("device") = 0, ReleaseGil(), "Registers of a thread.")
        .def(
            "local_bytes",
            [](Kernel& self, int device) { return self.attribute(device, cu::kLocalSizeBytes); },
            py::arg("device") = 0, ReleaseGil(), "Local memory of a thread: spills and arrays.")
        .def(
            "multiprocessors",
            [](const Kernel& self, int device) { return self.driver().primary(device).multiprocessors; },
            py::arg("device") = 0, ReleaseGil(), "Of the device.")
        .def("is_captured", &Kernel::is_captured, py::arg("device"), py::arg("stream"),
             "Whether a launch on this stream becomes part of a CUDA graph instead of running.")
        .def("launch", &launch_kernel, py::arg("grid"), py::arg("parameters"), py::kw_only(),
             py::arg("block") = py::none(), py::arg("cluster") = py::none(),
             py::arg("shared_bytes") = py::none(), py::arg("stream") = 0, py::arg("device") = 0,
             py::arg("overlap_previous") = false, kLaunchDoc);
}

void bind_registry(py::module_& module) {
    py::class_<Registry>(module, "Registry", "Kernels by key, loaded once for all threads.")
        .def(py::init([](std::shared_ptr<const Driver> driver, py::function resolver) {
                 return std::make_unique<Registry>(
                     std::move(driver),
                     [resolver = std::move(resolver)](const std::string& key, Registry::Image image) {
                         const GilAcquire acquire;
                         const py::str name(key), kind(image == Registry::Image::kCubin ? "cubin" : "ptx");
                         return static_cast<std::string>(py::bytes(call_python(resolver, name, kind)));
                     });
             }),
             py::arg("driver").none(false), py::arg("resolver"),
             "resolver(key, image) gives the image, 'cubin' or 'ptx', as bytes. It is called once per key, "
             "again if "
             "it raised; 'ptx' is asked for only when the driver says that the cubin is not for its device.")
        .def("get", &Registry::get, py::arg("key"), ReleaseGil());
}

}  // namespace

void bind_kernel(py::module_& module) {
    bind_tensor_map(module);
    bind_kernel_info(module);
    bind_library(module);
    bind_kernel_class(module);
    bind_registry(module);
}

}  // namespace flash8
