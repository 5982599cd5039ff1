/// \file
/// The extension module `megatron_chatflow.tokenizer._native`: the byte-pair encoder.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe_encoder.h"
#include "json_text.h"

namespace py = pybind11;

namespace chatflow {
namespace {

/// An array that owns a vector.
template <typename T>
py::array to_array(std::vector<T>&& values) {
  auto* const owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

/// Concatenated ids of texts, in 16 or 32 bits.
class Output {
 public:
  Output(bool narrow, int32_t end_id) : is_narrow_(narrow), end_id_(end_id) {}

  /// Encodes a text and appends its ids.
  void add(BpeEncoder* encoder, std::string_view text, bool with_prefix) {
    room_.resize(std::max(room_.size(), BpeEncoder::max_ids(text.size()) + 1));
    int32_t* end = encoder->encode(text, with_prefix, room_.data());
    if (end_id_ >= 0 && end > room_.data()) *end++ = end_id_;
    if (is_narrow_) {
      narrow_.insert(narrow_.end(), room_.data(), end);
    } else {
      wide_.insert(wide_.end(), room_.data(), end);
    }
    lengths_.push_back(static_cast<int32_t>(end - room_.data()));
  }

  py::array ids() { return is_narrow_ ? to_array(std::move(narrow_)) : to_array(std::move(wide_)); }
  py::array lengths() { return to_array(std::move(lengths_)); }

 private:
  bool is_narrow_;
  int32_t end_id_;
  std::vector<int32_t> room_;
  std::vector<uint16_t> narrow_;
  std::vector<int32_t> wide_;
  std::vector<int32_t> lengths_;
};

/// A thread-safe encoder. Each call uses its own `BpeEncoder` from a pool.
class SharedEncoder {
 public:
  SharedEncoder(const std::vector<py::bytes>& pieces, const std::vector<int32_t>& ids,
                const std::vector<double>& scores, const std::array<int32_t, 256>& byte_ids)
      : model_(std::make_shared<const BpeModel>(
            std::vector<std::string>(pieces.begin(), pieces.end()), ids, scores, byte_ids)) {}

  py::tuple encode_batch(const py::sequence& texts, bool with_prefix, int32_t end_id, bool narrow) {
    std::vector<std::string_view> views;
    std::vector<py::object> held;  // owns the memory of the views
    for (const py::handle text : texts) {
      Py_ssize_t num_bytes = 0;
      const char* const data = PyUnicode_AsUTF8AndSize(text.ptr(), &num_bytes);
      if (data == nullptr) throw py::error_already_set();
      held.push_back(py::reinterpret_borrow<py::object>(text));
      views.emplace_back(data, static_cast<size_t>(num_bytes));
    }
    Output output(narrow, end_id);
    {
      const py::gil_scoped_release release;
      const Loan loan(this);
      for (const std::string_view text : views) output.add(loan.encoder(), text, with_prefix);
    }
    return py::make_tuple(output.ids(), output.lengths());
  }

  py::object encode_json_lines(const py::bytes& data, const std::string& key, bool with_prefix,
                               int32_t end_id, bool narrow) {
    const std::string_view rest = data;
    Output output(narrow, end_id);
    int64_t num_text_bytes = 0;
    bool understood = false;
    {
      const py::gil_scoped_release release;
      const Loan loan(this);
      understood =
          add_lines(rest, JsonText(key), with_prefix, loan.encoder(), &output, &num_text_bytes);
    }
    if (!understood) return py::none();
    return py::make_tuple(output.ids(), output.lengths(), num_text_bytes);
  }

 private:
  /// Borrows an encoder for the duration of a call.
  class Loan {
   public:
    explicit Loan(SharedEncoder* owner) : owner_(owner) {
      {
        const std::lock_guard<std::mutex> lock(owner_->mutex_);
        if (!owner_->idle_.empty()) {
          encoder_ = std::move(owner_->idle_.back());
          owner_->idle_.pop_back();
        }
      }
      if (!encoder_) encoder_ = std::make_unique<BpeEncoder>(owner_->model_);
    }
    ~Loan() {
      const std::lock_guard<std::mutex> lock(owner_->mutex_);
      owner_->idle_.push_back(std::move(encoder_));
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    BpeEncoder* encoder() const { return encoder_.get(); }

   private:
    SharedEncoder* owner_;
    std::unique_ptr<BpeEncoder> encoder_;
  };

  static bool add_lines(std::string_view rest, JsonText reader, bool with_prefix,
                        BpeEncoder* encoder, Output* output, int64_t* num_text_bytes) {
    while (!rest.empty()) {
      const size_t end = std::min(rest.find('\n'), rest.size());
      const std::string_view line = rest.substr(0, end);
      rest.remove_prefix(std::min(end + 1, rest.size()));
      if (line.find_first_not_of(" \t\r\v\f") == std::string_view::npos) continue;
      std::string_view text;
      if (!reader.find(line, &text)) return false;
      output->add(encoder, text, with_prefix);
      *num_text_bytes += static_cast<int64_t>(text.size());
    }
    return true;
  }

  std::shared_ptr<const BpeModel> model_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<BpeEncoder>> idle_;
};

}  // namespace

}  // namespace chatflow

PYBIND11_MODULE(_native, module) {
  using namespace chatflow;
  module.doc() = "Byte-pair encoding in C++ with the ids of the sentencepiece library.";
  py::class_<SharedEncoder>(module, "BpeEncoder", "Encoder of a SentencePiece byte-pair model.")
      .def(py::init<const std::vector<py::bytes>&, const std::vector<int32_t>&,
                    const std::vector<double>&, const std::array<int32_t, 256>&>(),
           py::arg("pieces"), py::arg("ids"), py::arg("scores"), py::arg("byte_ids"))
      .def("encode_batch", &SharedEncoder::encode_batch, py::arg("texts"), py::arg("with_prefix"),
           py::arg("end_id") = -1, py::arg("narrow") = false,
           "Ids of all texts (int32, narrow: uint16), one after the other, and the number of each "
           "(int32).")
      .def("encode_json_lines", &SharedEncoder::encode_json_lines, py::arg("data"), py::arg("key"),
           py::arg("with_prefix"), py::arg("end_id") = -1, py::arg("narrow") = false,
           "The same of the string under the key of every line, and the strings' bytes in UTF-8; "
           "None if a line needs a full JSON parser.");
}
