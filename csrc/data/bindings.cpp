/// \file
/// The extension module `megatron_chatflow.data._native`: permutations, packing, samples and
/// the loader. The bindings check shapes and types, work on memory that NumPy owns, and
/// release the global interpreter lock while data is copied.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "loader.h"
#include "mapped.h"
#include "packing.h"
#include "permutation.h"
#include "samples.h"

namespace py = pybind11;

namespace chatflow {
namespace {

/// The memory of a 1-D array, which must have this type and be contiguous.
template <typename Item>
const uint8_t* bytes_of(const py::array& array, const char* what, bool aligned) {
  const auto* data = static_cast<const uint8_t*>(array.data());
  const bool fits =
      array.ndim() == 1 && py::isinstance<py::array_t<Item>>(array) &&
      (array.shape(0) < 2 || array.strides(0) == static_cast<py::ssize_t>(sizeof(Item)));
  if (!fits || (aligned && reinterpret_cast<uintptr_t>(data) % alignof(Item) != 0)) {
    throw std::invalid_argument(std::string(what) +
                                ": must be a contiguous 1-D array of the right type");
  }
  return data;
}

template <typename Item>
const Item* items_of(const py::array& array, const char* what) {
  return reinterpret_cast<const Item*>(bytes_of<Item>(array, what, true));
}

Int64Span span_of(const py::array& array, const char* what) {
  return {items_of<int64_t>(array, what), array.shape(0)};
}

TokenType type_of(const py::array& tokens) {
  if (py::isinstance<py::array_t<uint16_t>>(tokens)) return TokenType::kUint16;
  if (py::isinstance<py::array_t<int32_t>>(tokens)) return TokenType::kInt32;
  if (py::isinstance<py::array_t<int64_t>>(tokens)) return TokenType::kInt64;
  if (py::isinstance<py::array_t<uint8_t>>(tokens)) return TokenType::kUint8;
  if (py::isinstance<py::array_t<int8_t>>(tokens)) return TokenType::kInt8;
  if (py::isinstance<py::array_t<int16_t>>(tokens)) return TokenType::kInt16;
  throw std::invalid_argument("tokens: unsupported type of ids");
}

/// A file as passed from Python: name, tokens, sequence pointers, document indices, loss mask or
/// None.
TokenFile file_of(const py::tuple& columns) {
  if (columns.size() != 5)
    throw std::invalid_argument("a token file must be a tuple of five entries");
  const auto tokens = columns[1].cast<py::array>();
  const auto pointers = columns[2].cast<py::array>();
  const auto documents = columns[3].cast<py::array>();
  TokenFile file{};
  file.name = columns[0].cast<std::string>();
  file.type = type_of(tokens);
  if (tokens.ndim() != 1 || (tokens.shape(0) > 1 && tokens.strides(0) != item_size(file.type)) ||
      reinterpret_cast<uintptr_t>(tokens.data()) % static_cast<uintptr_t>(item_size(file.type))) {
    throw std::invalid_argument(file.name + ": tokens must be a contiguous 1-D array");
  }
  file.tokens = tokens.data();
  file.num_tokens = tokens.shape(0);
  file.sequence_pointers = bytes_of<int64_t>(pointers, "sequence_pointers", false);
  file.num_sequences = pointers.shape(0);
  file.document_indices = bytes_of<int64_t>(documents, "document_indices", false);
  file.num_documents = documents.shape(0) - 1;
  if (file.num_documents < 0) throw std::invalid_argument(file.name + ": has no document indices");
  file.loss_mask = nullptr;
  if (!columns[4].is_none()) {
    const auto loss_mask = columns[4].cast<py::array>();
    file.loss_mask = bytes_of<uint8_t>(loss_mask, "loss_mask", false);
    if (loss_mask.shape(0) != file.num_tokens) {
      throw std::invalid_argument(file.name + ": its loss mask is not as long as its tokens");
    }
  }
  return file;
}

std::vector<TokenFile> files_of(const std::vector<py::tuple>& columns) {
  std::vector<TokenFile> files;
  for (const py::tuple& file : columns) files.push_back(file_of(file));
  return files;
}

SampleShape shape_of(int64_t seq_length, int32_t pad_id, int64_t vocab_size, bool isolate) {
  if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("vocab_size is not between 1 and 2^31 - 1");
  }
  return {seq_length, pad_id, vocab_size, isolate};
}

/// A reader, and references to the arrays that it reads.
struct KeptReader {
  std::unique_ptr<RowReader> reader;
  py::object arrays;
};

struct KeptWindowReader : KeptReader {};
struct KeptPackedReader : KeptReader {};

std::unique_ptr<KeptWindowReader> make_window_reader(
    std::string label, const std::vector<py::tuple>& columns, const py::array& file,
    const py::array& token_begin, const py::array& cumulative, int64_t seq_length, int32_t pad_id,
    int64_t vocab_size, bool isolate, int64_t num_samples) {
  const auto* file_numbers = items_of<int32_t>(file, "file");
  if (file.shape(0) != token_begin.shape(0)) throw std::invalid_argument("runs: lengths differ");
  auto kept = std::make_unique<KeptWindowReader>();
  kept->reader = std::make_unique<WindowReader>(
      std::move(label), files_of(columns), file_numbers, span_of(token_begin, "token_begin"),
      span_of(cumulative, "cumulative"), shape_of(seq_length, pad_id, vocab_size, isolate),
      num_samples);
  kept->arrays = py::make_tuple(py::cast(columns), file, token_begin, cumulative);
  return kept;
}

std::unique_ptr<KeptPackedReader> make_packed_reader(
    std::string label, const std::vector<py::tuple>& columns, const py::array& first_documents,
    const py::array& offsets, const py::array& documents, int64_t seq_length, int32_t pad_id,
    int64_t vocab_size, bool isolate) {
  auto kept = std::make_unique<KeptPackedReader>();
  kept->reader = std::make_unique<PackedReader>(
      std::move(label), files_of(columns), span_of(first_documents, "first_documents"),
      span_of(offsets, "offsets"), span_of(documents, "documents"),
      shape_of(seq_length, pad_id, vocab_size, isolate));
  kept->arrays = py::make_tuple(py::cast(columns), first_documents, offsets, documents);
  return kept;
}

template <typename Item>
py::array_t<Item> array_of(const std::vector<Item>& items) {
  return py::array_t<Item>(static_cast<py::ssize_t>(items.size()), items.data());
}

py::tuple read_one(const KeptReader& kept, int64_t ordinal) {
  const int64_t seq_length = kept.reader->shape().seq_length;
  py::array_t<int32_t> tokens(seq_length + 1);
  py::array_t<uint8_t> loss_mask(seq_length + 1);
  Row row{tokens.mutable_data(), loss_mask.mutable_data(), {}, {}, {}};
  {
    py::gil_scoped_release release;
    kept.reader->read(ordinal, &row);
  }
  // The mask covers all tokens. The mask of the labels is a view of it.
  py::array_t<uint8_t> of_labels(seq_length, loss_mask.data() + 1, loss_mask);
  return py::make_tuple(tokens, of_labels, array_of(row.cu_seqlens));
}

template <typename Item>
Item* buffer_of(const py::array& array, std::vector<int64_t> shape, const char* what) {
  bool fits = py::isinstance<py::array_t<Item, py::array::c_style>>(array) && array.writeable() &&
              array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t k = 0; fits && k < shape.size(); ++k) {
    fits = array.shape(static_cast<py::ssize_t>(k)) == shape[k];
  }
  if (!fits)
    throw std::invalid_argument(std::string(what) + ": must be a buffer of the right shape");
  return static_cast<Item*>(const_cast<void*>(array.data()));
}

py::list read_rows_of(const std::vector<const KeptReader*>& kept, const py::array& reader_of_row,
                      const py::array& ordinals, int64_t micro_batch_size, const py::array& tokens,
                      const py::array& labels, const py::array& loss_mask,
                      const py::array& digests) {
  const Int64Span numbers = span_of(reader_of_row, "reader_of_row");
  const Int64Span rows = span_of(ordinals, "ordinals");
  if (tokens.ndim() != 2 || numbers.size != rows.size || micro_batch_size < 1 ||
      rows.size % micro_batch_size != 0) {
    throw std::invalid_argument(
        "read_rows: the number of rows is not a multiple of the micro-batch size");
  }
  const int64_t seq_length = tokens.shape(1);
  if (micro_batch_size > std::numeric_limits<int32_t>::max() / std::max<int64_t>(seq_length, 1)) {
    throw std::invalid_argument("read_rows: a micro-batch has 2^31 tokens or more");
  }
  BatchBuffers buffers{buffer_of<int64_t>(tokens, {rows.size, seq_length}, "tokens"),
                       buffer_of<int64_t>(labels, {rows.size, seq_length}, "labels"),
                       buffer_of<float>(loss_mask, {rows.size, seq_length}, "loss_mask"),
                       buffer_of<int64_t>(digests, {rows.size, 2}, "digests")};
  std::vector<const RowReader*> readers;
  for (int64_t row = 0; row < rows.size; ++row) {
    const int64_t number = numbers.data[row];
    if (number < 0 || number >= static_cast<int64_t>(kept.size()) ||
        kept[static_cast<size_t>(number)]->reader->shape().seq_length != seq_length) {
      throw std::invalid_argument("read_rows: a row has no matching reader");
    }
    readers.push_back(kept[static_cast<size_t>(number)]->reader.get());
  }
  std::vector<std::vector<int32_t>> segments;
  {
    py::gil_scoped_release release;
    segments = read_rows(readers, rows.data, rows.size, micro_batch_size, buffers);
  }
  py::list result;
  for (const std::vector<int32_t>& cu_seqlens : segments) result.append(array_of(cu_seqlens));
  return result;
}

Permutation permutation_of(int64_t size, const py::array& keys) {
  const auto* words = items_of<uint64_t>(keys, "keys");
  if (keys.shape(0) != kNumRounds) throw std::invalid_argument("permutation: needs 16 keys");
  std::array<uint64_t, kNumRounds> copied;
  std::copy(words, words + kNumRounds, copied.begin());
  return Permutation(size, copied);
}

py::array_t<int64_t> permute(const py::array& places, int64_t size, const py::array& keys) {
  const Int64Span given = span_of(places, "places");
  const Permutation permutation = permutation_of(size, keys);
  py::array_t<int64_t> images(given.size);
  int64_t* out = images.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t k = 0; k < given.size; ++k) out[k] = permutation(given.data[k]);
  }
  return images;
}

template <typename Item>
py::tuple best_fit_in_place(py::array_t<Item>& lengths, int64_t capacity) {
  Item* items = lengths.mutable_data();
  const int64_t num_documents = lengths.size();
  int64_t num_samples = 0;
  {
    py::gil_scoped_release release;
    num_samples = best_fit(items, num_documents, capacity);
  }
  const auto num_packed =
      std::count_if(items, items + num_documents, [](Item sample) { return sample >= 0; });
  py::array_t<int64_t> offsets(num_samples + 1);
  py::array_t<int64_t> documents(num_packed);
  int64_t* first = offsets.mutable_data();
  int64_t* listed = documents.mutable_data();
  {
    py::gil_scoped_release release;
    group_by_sample(items, num_documents, num_samples, first, listed);
  }
  return py::make_tuple(offsets, documents);
}

py::tuple best_fit_of(py::array& lengths, int64_t capacity) {
  const bool fits = lengths.ndim() == 1 && (lengths.flags() & py::array::c_style) != 0;
  if (fits && py::isinstance<py::array_t<int32_t>>(lengths)) {
    auto items = py::reinterpret_borrow<py::array_t<int32_t>>(lengths);
    return best_fit_in_place(items, capacity);
  }
  if (fits && py::isinstance<py::array_t<int64_t>>(lengths)) {
    auto items = py::reinterpret_borrow<py::array_t<int64_t>>(lengths);
    return best_fit_in_place(items, capacity);
  }
  throw std::invalid_argument("lengths: must be a contiguous 1-D array of int32 or int64");
}

}  // namespace
}  // namespace chatflow

PYBIND11_MODULE(_native, module) {
  using namespace chatflow;
  module.doc() =
      "C++ implementation of the data path. The references are in megatron_chatflow.data.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const MappedReadError& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    }
  });
  module.def("permute", &permute, py::arg("places"), py::arg("size"), py::arg("keys"));
  module.def(
      "permute_one",
      [](int64_t place, int64_t size, const py::array& keys) {
        return permutation_of(size, keys)(place);
      },
      py::arg("place"), py::arg("size"), py::arg("keys"));
  module.def("best_fit", &best_fit_of, py::arg("lengths"), py::arg("capacity"));
  py::class_<KeptReader>(module, "RowReader").def("read", &read_one, py::arg("ordinal"));
  py::class_<KeptWindowReader, KeptReader>(module, "WindowReader")
      .def(py::init(&make_window_reader));
  py::class_<KeptPackedReader, KeptReader>(module, "PackedReader")
      .def(py::init(&make_packed_reader));
  module.def("read_rows", &read_rows_of);
}
