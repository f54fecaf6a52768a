#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "driver/driver.h"
#include "driver/gil.h"
#include "driver/memory.h"

namespace py = pybind11;

namespace flash8 {

namespace {

std::string device_repr(const DeviceInfo& device) {
    return "DeviceInfo(ordinal=" + std::to_string(device.ordinal) + ", name='" + device.name +
           "', compute_capability=(" + std::to_string(device.major) + ", " + std::to_string(device.minor) +
           "))";
}

// DriverError carries the driver's own name and code of the error, which plain registration cannot.
void bind_errors(py::module_& module) {
    py::register_exception<DriverNotFound>(module, "DriverNotFoundError", PyExc_RuntimeError);
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> driver_error;
    driver_error.call_once_and_store_result(
        [&] { return py::object(py::exception<DriverError>(module, "DriverError", PyExc_RuntimeError)); });
    py::register_exception_translator([](std::exception_ptr pending) {
        try {
            std::rethrow_exception(pending);
        } catch (const DriverError& error) {
            const py::object type = driver_error.get_stored();
            py::object instance = type(error.what());
            instance.attr("entry") = error.entry();
            instance.attr("code") = error.code();
            instance.attr("name") = error.name();
            PyErr_SetObject(type.ptr(), instance.ptr());
        }
    });
}

void bind_probe(py::module_& module) {
    py::class_<DeviceInfo>(module, "DeviceInfo", "One device of the driver.")
        .def_readonly("ordinal", &DeviceInfo::ordinal)
        .def_readonly("name", &DeviceInfo::name)
        .def_property_readonly("compute_capability",
                               [](const DeviceInfo& self) { return py::make_tuple(self.major, self.minor); })
        .def_readonly("multiprocessors", &DeviceInfo::multiprocessors)
        .def_readonly("max_shared_bytes", &DeviceInfo::max_shared_bytes)
        .def("__repr__", &device_repr);

    py::class_<DriverProbe>(module, "DriverProbe", "What the CUDA driver of this machine offers.")
        .def_readonly("available", &DriverProbe::available)
        .def_readonly("reason", &DriverProbe::reason, "Why the driver is not available; empty otherwise.")
        .def_readonly("path", &DriverProbe::path)
        .def_readonly("version", &DriverProbe::version, "1000 * major + 10 * minor; 0 without a driver.")
        .def_readonly("devices", &DriverProbe::devices);

    module.def("probe_driver", &Driver::probe, ReleaseGil(),
               "Look for the driver that FLASH8_DRIVER names, libcuda.so.1 by default. Never raises.");
}

void write_buffer(DeviceMemory& memory, const py::buffer& data, std::size_t offset) {
    const py::buffer_info view = data.request();
    if (PyBuffer_IsContiguous(view.view(), 'C') == 0) {
        throw std::invalid_argument("data is not contiguous");
    }
    const GilRelease release;
    memory.write(view.ptr, static_cast<std::size_t>(view.size * view.itemsize), offset);
}

py::bytes read_bytes(const DeviceMemory& memory, std::optional<std::size_t> bytes, std::size_t offset) {
    const std::size_t wanted = bytes.value_or(memory.bytes() - std::min(offset, memory.bytes()));
    memory.check_span(wanted, offset);
    std::string data(wanted, '\0');
    {
        const GilRelease release;
        memory.read(data.data(), data.size(), offset);
    }
    return data;
}

void bind_memory(py::module_& module) {
    py::class_<DeviceMemory>(module, "DeviceMemory", "Bytes on a device, freed with the object.")
        .def(py::init<std::shared_ptr<const Driver>, std::size_t, int>(), py::arg("driver").none(false),
             py::arg("bytes"), py::arg("device") = 0, ReleaseGil())
        .def_property_readonly("address", &DeviceMemory::address)
        .def_property_readonly("bytes", &DeviceMemory::bytes)
        .def("write", &write_buffer, py::arg("data"), py::arg("offset") = 0)
        .def("read", &read_bytes, py::arg("bytes") = py::none(), py::arg("offset") = 0);

    py::class_<Stream>(module, "Stream", "A stream, destroyed with the object.")
        .def(py::init<std::shared_ptr<const Driver>, int>(), py::arg("driver").none(false),
             py::arg("device") = 0, ReleaseGil())
        .def_property_readonly("handle", &Stream::handle)
        .def("synchronize", &Stream::synchronize, ReleaseGil());
}

}  // namespace

void bind_driver(py::module_& module) {
    bind_errors(module);
    bind_probe(module);
    py::class_<Driver, std::shared_ptr<Driver>>(module, "Driver", "One opened CUDA driver.")
        .def(py::init(
                 [](const std::string& path) { return std::const_pointer_cast<Driver>(Driver::load(path)); }),
             py::arg("path"), ReleaseGil())
        .def_static(
            "process", [] { return std::const_pointer_cast<Driver>(Driver::process()); }, ReleaseGil(),
            "The driver of this process: FLASH8_DRIVER as it was at the first call, else libcuda.so.1.")
        .def_property_readonly("path", &Driver::path)
        .def_property_readonly("version", &Driver::version)
        .def("devices", &Driver::devices, ReleaseGil())
        .def(
            "synchronize", [](const Driver& self, int device) { synchronize(self, device); },
            py::arg("device") = 0, ReleaseGil(), "Wait for everything enqueued on the device.");
    bind_memory(module);
}

}  // namespace flash8
