// Fields of the parameter structs as Python attributes.

#pragma once

#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "params.h"

namespace flash8 {

namespace py = pybind11;

// Python names device memory by its address.
template <class Struct, class Pointee>
auto address_getter(Pointee* Struct::* member) {
    return [member](const Struct& self) { return reinterpret_cast<std::uintptr_t>(self.*member); };
}

template <class Struct, class Pointee>
auto address_setter(Pointee* Struct::* member) {
    return [member](Struct& self, std::uintptr_t address) {
        self.*member = reinterpret_cast<Pointee*>(address);
    };
}

template <class Struct, class Pointee>
void def_address(py::class_<Struct>& type, const char* name, Pointee* Struct::* member) {
    type.def_property(name, address_getter(member), address_setter(member));
}

// Python gives a tensor as (address, batch stride, row stride, head stride), strides in elements.
using TensorTuple = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;
using RowTuple = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

template <class Struct>
void def_tensor(py::class_<Struct>& type, const char* name, TensorRef Struct::* member) {
    type.def_property(
        name,
        [member](const Struct& self) {
            const TensorRef& ref = self.*member;
            return TensorTuple(reinterpret_cast<std::uintptr_t>(ref.ptr), ref.batch_stride, ref.row_stride,
                               ref.head_stride);
        },
        [member](Struct& self, const TensorTuple& given) {
            const auto& [address, batch, row, head] = given;
            self.*member = {reinterpret_cast<void*>(address), batch, row, head};
        });
}

// RowRef or ChannelRef.
template <class Struct, class Ref>
void def_rows(py::class_<Struct>& type, const char* name, Ref Struct::* member) {
    type.def_property(
        name,
        [member](const Struct& self) {
            const Ref& ref = self.*member;
            return RowTuple(reinterpret_cast<std::uintptr_t>(ref.ptr), ref.batch_stride, ref.head_stride);
        },
        [member](Struct& self, const RowTuple& given) {
            const auto& [address, batch, head] = given;
            self.*member = {reinterpret_cast<decltype(Ref::ptr)>(address), batch, head};
        });
}

// What every attention call has.
template <class Call>
void def_call(py::class_<Call>& type) {
    type.def_property_readonly("sequences", [](Call& self) { return &self.sequences; })
        .def_property_readonly("scores", [](Call& self) { return &self.scores; })
        .def_property_readonly("dropout", [](Call& self) { return &self.dropout; })
        .def_property_readonly("scheduler", [](Call& self) { return &self.scheduler; })
        .def_readwrite("heads_q", &Call::heads_q)
        .def_readwrite("heads_kv", &Call::heads_kv)
        .def_readwrite("head_dim", &Call::head_dim)
        .def_readwrite("head_dim_v", &Call::head_dim_v);
}

// A descale is (address, batch stride, head stride, block stride).
using DescaleTuple = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;

template <class Struct>
void def_descale(py::class_<Struct>& type, const char* name, DescaleRef Struct::* member) {
    type.def_property(
        name,
        [member](const Struct& self) {
            const DescaleRef& ref = self.*member;
            return DescaleTuple(reinterpret_cast<std::uintptr_t>(ref.ptr), ref.batch_stride, ref.head_stride,
                                ref.block_stride);
        },
        [member](Struct& self, const DescaleTuple& given) {
            const auto& [address, batch, head, block] = given;
            self.*member = {reinterpret_cast<const float*>(address), batch, head, block};
        });
}

// A GroupRef is (address, batch stride, head stride, block stride).
template <class Struct, class Ref>
void def_group(py::class_<Struct>& type, const char* name, Ref Struct::* member) {
    type.def_property(
        name,
        [member](const Struct& self) {
            const Ref& ref = self.*member;
            return DescaleTuple(reinterpret_cast<std::uintptr_t>(ref.ptr), ref.batch_stride, ref.head_stride,
                                ref.block_stride);
        },
        [member](Struct& self, const DescaleTuple& given) {
            const auto& [address, batch, head, block] = given;
            self.*member = {reinterpret_cast<float*>(address), batch, head, block};
        });
}

}  // namespace flash8
