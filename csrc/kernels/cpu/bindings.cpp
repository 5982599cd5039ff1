/// \file
/// The extension module `megatron_chatflow.kernels._cpu`.
///
/// Functions take addresses and sizes of tensors whose dtypes, shapes and strides `kernels/cpu.py`
/// has checked, and write results in place. They release the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>

#include "launch.h"
#include "shared_group.h"

namespace py = pybind11;

namespace chatflow::cpu {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

template <typename Arguments>
void start(const Arguments& arguments, Size rows, int threads) {
  check(rows >= 0 && threads >= 1, "kernels: rows or threads are too few");
  py::gil_scoped_release release;
  launch(arguments, rows, threads);
}

void exponentiate(Address logits, Address highest, Address sums, Size rows, Size row_size,
                  Size num_valid_tokens, int threads) {
  check(0 <= num_valid_tokens && num_valid_tokens <= row_size,
        "exponentiate: num_valid_tokens is larger than the row");
  start(Exponentiate{at<bf16>(logits), at<float>(highest), at<float>(sums), row_size,
                     num_valid_tokens},
        rows, threads);
}

void rms_norm(Address input, Address weight, Address output, Address scales, Size rows,
              Size row_size, float epsilon, int threads) {
  start(RmsNorm{at<bf16>(input), at<bf16>(weight), at<bf16>(output), at<float>(scales), row_size,
                epsilon},
        rows, threads);
}

void rms_norm_backward(Address gradient, Address input, Address weight, Address scales,
                       Address grad_input, Address grad_weight, Size rows, Size row_size,
                       int threads) {
  start(RmsNormBackward{at<bf16>(gradient), at<bf16>(input), at<bf16>(weight), at<float>(scales),
                        at<bf16>(grad_input), at<float>(grad_weight), row_size},
        rows, threads);
}

void swiglu(Address input, Address output, Size rows, Size row_size, int threads) {
  start(SwiGlu{at<bf16>(input), at<bf16>(output), row_size}, rows, threads);
}

void swiglu_backward(Address gradient, Address input, Address grad_input, Size rows, Size row_size,
                     int threads) {
  start(SwiGluBackward{at<bf16>(gradient), at<bf16>(input), at<bf16>(grad_input), row_size}, rows,
        threads);
}

/// Strides are (document, token, head), in elements.
void rotate(Address input, py::tuple input_strides, Address output, py::tuple output_strides,
            Address cosines, Address sines, float direction, Size rows, Size document_length,
            Size num_heads, Size head_dim, int threads) {
  check(input_strides.size() == 3 && output_strides.size() == 3, "rotate: strides are three");
  check(document_length > 0 && head_dim % 2 == 0, "rotate: empty documents, or an odd head");
  auto stride = [](const py::tuple& strides, int axis) { return strides[axis].cast<Size>(); };
  Rotate arguments{};
  arguments.input = at<bf16>(input);
  arguments.output = at<bf16>(output);
  arguments.cosines = at<float>(cosines);
  arguments.sines = at<float>(sines);
  arguments.direction = direction;
  arguments.num_heads = num_heads;
  arguments.head_dim = head_dim;
  arguments.document_length = document_length;
  arguments.input_document = stride(input_strides, 0);
  arguments.input_token = stride(input_strides, 1);
  arguments.input_head = stride(input_strides, 2);
  arguments.output_document = stride(output_strides, 0);
  arguments.output_token = stride(output_strides, 1);
  arguments.output_head = stride(output_strides, 2);
  start(arguments, rows, threads);
}

void check_causal(Size num_keys, Size num_queries, Size first_query) {
  check(num_queries > 0 && first_query >= 0, "causal softmax: no queries");
  check(first_query + num_queries <= num_keys, "causal softmax: a query lies behind the last key");
  check(num_keys <= kMaxKeys, "causal softmax: too many keys");
}

void causal_softmax(Address scores, Size rows, Size num_keys, Size num_queries, Size first_query,
                    float scale, int threads) {
  check_causal(num_keys, num_queries, first_query);
  start(CausalSoftmax{at<bf16>(scores), num_keys, num_queries, first_query, scale}, rows, threads);
}

void causal_softmax_backward(Address probabilities, Address gradient, Size rows, Size num_keys,
                             Size num_queries, Size first_query, float scale, int threads) {
  check_causal(num_keys, num_queries, first_query);
  start(CausalSoftmaxBackward{at<bf16>(probabilities), at<bf16>(gradient), num_keys, num_queries,
                              first_query, scale},
        rows, threads);
}

std::unique_ptr<SharedGroup> make_group(int file, int rank, int size, int lanes,
                                        double timeout_seconds) {
  check(0 <= rank && rank < size && size <= kMaxInputs && lanes >= 1, "shared group: bad sizes");
  return std::make_unique<SharedGroup>(file, rank, size, lanes, timeout_seconds);
}

/// Collectives release the GIL because watchdog threads must run while a rank waits.
void bind_shared_group(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  module.attr("MAX_GROUP_SIZE") = kMaxInputs;
  py::enum_<Element>(module, "Element").value("BF16", Element::kBf16).value("FP32", Element::kFp32);
  py::enum_<Reduction>(module, "Reduction")
      .value("SUM", Reduction::kSum)
      .value("MAX", Reduction::kMax);
  py::class_<SharedGroup>(module, "SharedGroup")
      .def(py::init(&make_group))
      .def_static("num_bytes", &SharedGroup::num_bytes)
      .def(
          "all_reduce",
          [](SharedGroup& group, Address values, Size count, Element element, Reduction reduction) {
            group.all_reduce(at<void>(values), count, element, reduction);
          },
          Released())
      .def(
          "all_gather",
          [](SharedGroup& group, Address input, Address output, Size bytes) {
            group.all_gather(at<void>(input), at<void>(output), bytes);
          },
          Released())
      .def(
          "reduce_scatter",
          [](SharedGroup& group, Address input, Address output, Size count, Element element,
             Reduction reduction) {
            group.reduce_scatter(at<void>(input), at<void>(output), count, element, reduction);
          },
          Released());
}

}  // namespace
}  // namespace chatflow::cpu

PYBIND11_MODULE(_cpu, module) {
  using namespace chatflow::cpu;
  module.doc() = "CPU kernels for bf16; each equals its reference in kernels/cpu_reference.py.";
  module.attr("MAX_KEYS") = kMaxKeys;
  module.def("instruction_set", [] { return kernels().name; });
  module.def("instruction_sets", [] {
    py::list names;
    for (const Kernels* table : runnable_kernels()) names.append(table->name);
    return names;
  });
  module.def("use_instruction_set", &use_kernels);
  module.def("exponentiate", &exponentiate);
  module.def("rms_norm", &rms_norm);
  module.def("rms_norm_backward", &rms_norm_backward);
  module.def("swiglu", &swiglu);
  module.def("swiglu_backward", &swiglu_backward);
  module.def("rotate", &rotate);
  module.def("causal_softmax", &causal_softmax);
  module.def("causal_softmax_backward", &causal_softmax_backward);
  bind_shared_group(module);
}
