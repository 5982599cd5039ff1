/// \file
/// Python bindings of the byte-pair encoder.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe_encoder.h"

namespace py = pybind11;

namespace chatflow {
namespace {

/// An encoder that several threads may call: one at a time gets in.
class SharedEncoder {
 public:
  SharedEncoder(const std::vector<py::bytes>& pieces, const std::vector<int32_t>& ids,
                const std::vector<double>& scores, const std::array<int32_t, 256>& byte_ids)
      : encoder_(BpeModel(std::vector<std::string>(pieces.begin(), pieces.end()), ids, scores,
                          byte_ids)) {}

  py::tuple encode_batch(const py::sequence& texts, bool with_prefix, int32_t end_id) {
    std::vector<std::string_view> views;
    views.reserve(texts.size());
    std::vector<py::object> held;  // the views point into these
    held.reserve(texts.size());
    for (const py::handle text : texts) {
      Py_ssize_t num_bytes = 0;
      const char* const data = PyUnicode_AsUTF8AndSize(text.ptr(), &num_bytes);
      if (data == nullptr) throw py::error_already_set();
      held.push_back(py::reinterpret_borrow<py::object>(text));
      views.emplace_back(data, static_cast<size_t>(num_bytes));
    }
    auto ids = std::make_unique<std::vector<int32_t>>();
    py::array_t<int32_t> lengths(static_cast<py::ssize_t>(views.size()));
    int32_t* const length_data = lengths.mutable_data();
    {
      const py::gil_scoped_release release;
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t k = 0; k < views.size(); ++k) {
        room_.resize(std::max(room_.size(), BpeEncoder::max_ids(views[k].size()) + 1));
        int32_t* end = encoder_.encode(views[k], with_prefix, room_.data());
        if (end_id >= 0 && end > room_.data()) *end++ = end_id;
        ids->insert(ids->end(), room_.data(), end);
        length_data[k] = static_cast<int32_t>(end - room_.data());
      }
    }
    return py::make_tuple(to_array(std::move(ids)), std::move(lengths));
  }

 private:
  /// An array that owns the vector.
  static py::array_t<int32_t> to_array(std::unique_ptr<std::vector<int32_t>> ids) {
    std::vector<int32_t>* const owned = ids.release();
    const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int32_t>*>(p); });
    return py::array_t<int32_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
  }

  std::mutex mutex_;
  BpeEncoder encoder_;
  std::vector<int32_t> room_;
};

}  // namespace

void register_bpe(py::module_& module) {
  py::class_<SharedEncoder>(module, "BpeEncoder", "A SentencePiece byte-pair model's encoder.")
      .def(py::init<const std::vector<py::bytes>&, const std::vector<int32_t>&,
                    const std::vector<double>&, const std::array<int32_t, 256>&>(),
           py::arg("pieces"), py::arg("ids"), py::arg("scores"), py::arg("byte_ids"))
      .def("encode_batch", &SharedEncoder::encode_batch, py::arg("texts"), py::arg("with_prefix"),
           py::arg("end_id") = -1,
           "Ids of all texts (int32), one after the other, and the number of each (int32).");
}

}  // namespace chatflow
