/// \file
/// Python's view of tree_hash.h.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "tree_hash.h"

namespace py = pybind11;

namespace chatflow {
namespace {

py::bytes hash_leaves_of(const py::buffer& data) {
  const py::buffer_info info = data.request();
  if (info.ndim != 1 || info.itemsize != 1 || (info.size > 1 && info.strides[0] != 1)) {
    throw std::invalid_argument("hash_leaves: takes bytes that lie one behind the other");
  }
  const auto num_bytes = static_cast<size_t>(info.size);
  std::string digests((num_bytes + kHashLeafBytes - 1) / kHashLeafBytes * kHashDigestBytes, '\0');
  {
    py::gil_scoped_release release;
    hash_leaves(static_cast<const uint8_t*>(info.ptr), num_bytes,
                reinterpret_cast<uint8_t*>(&digests[0]));
  }
  return py::bytes(digests);
}

}  // namespace

void register_hash(py::module_& module) {
  module.def("hash_leaves", &hash_leaves_of, py::arg("data"));
}

}  // namespace chatflow
