// What all bindings share: errors and signals between C++ and Python, and addresses of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

#include "common/errors.h"

namespace moe_ep {

inline const char* python_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kConfig: return "ConfigError";
    case ErrorKind::kState: return "StateError";
    case ErrorKind::kUnavailable: return "BackendUnavailable";
    case ErrorKind::kCapacity: return "CapacityError";
    case ErrorKind::kTimeout: return "PeerTimeout";
    case ErrorKind::kLost: return "PeerLost";
    case ErrorKind::kMismatch: return "PeerMismatch";
    case ErrorKind::kDevice: return "EpError";
  }
  return "EpError";
}

inline void translate_error(std::exception_ptr thrown) {
  namespace py = pybind11;
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const Error& error) {
    const py::object type = py::module_::import("moe_ep_plugin.errors").attr(python_name(error.kind()));
    // A message may quote another process's text, cut anywhere.
    const py::object text = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(error.what(), static_cast<py::ssize_t>(std::strlen(error.what())), "replace"));
    PyErr_SetObject(type.ptr(), text.ptr());
  }
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Lets Ctrl-C end a wait.
inline void check_python_signals() {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace moe_ep
