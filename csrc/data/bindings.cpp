/// \file
/// The extension module `megatron_chatflow.native._data`: one line for each part.
#include <pybind11/pybind11.h>

namespace chatflow {

void register_blend(pybind11::module_& module);
void register_bpe(pybind11::module_& module);
void register_hash(pybind11::module_& module);
void register_samples(pybind11::module_& module);

}  // namespace chatflow

PYBIND11_MODULE(_data, module) {
  module.doc() = "Data path in C++; each part equals its reference in megatron_chatflow.native.";
  chatflow::register_blend(module);
  chatflow::register_bpe(module);
  chatflow::register_hash(module);
  chatflow::register_samples(module);
}
