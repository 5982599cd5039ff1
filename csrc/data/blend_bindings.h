/// @file
/// Python bindings of the blend: the engine of a segment, and where windows end.
#ifndef MEGATRON_CHATFLOW_CSRC_DATA_BLEND_BINDINGS_H_
#define MEGATRON_CHATFLOW_CSRC_DATA_BLEND_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace megatron_chatflow {

/// Adds the blend to the extension module.
void RegisterBlend(pybind11::module_& module);

}  // namespace megatron_chatflow

#endif  // MEGATRON_CHATFLOW_CSRC_DATA_BLEND_BINDINGS_H_
