#include "samples.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "mapped.h"

namespace chatflow {
namespace {

int64_t load_int64(const uint8_t* array, int64_t index) {
  int64_t value;
  std::memcpy(&value, array + index * static_cast<int64_t>(sizeof value), sizeof value);
  return value;
}

/// Copies ids and returns whether all of them are in the vocabulary.
template <typename Id>
bool copy_ids(const Id* ids, int64_t length, int64_t vocab_size, int32_t* out) {
  // One pass without branches, so that it is vectorized. A negative id becomes a large number.
  using Unsigned = std::make_unsigned_t<std::common_type_t<Id, int32_t>>;
  Unsigned largest = 0;
  for (int64_t k = 0; k < length; ++k) {
    const auto id = static_cast<Unsigned>(ids[k]);
    largest = std::max(largest, id);
    out[k] = static_cast<int32_t>(id);
  }
  return static_cast<uint64_t>(largest) < static_cast<uint64_t>(vocab_size);
}

template <typename Id>
void copy_checked(const TokenFile& file, int64_t begin, int64_t length, int64_t vocab_size,
                  int32_t* out) {
  const Id* ids = static_cast<const Id*>(file.tokens) + begin;
  if (length == 0 || copy_ids(ids, length, vocab_size, out)) return;
  const Id* bad = std::find_if(ids, ids + length, [vocab_size](Id id) {
    return static_cast<int64_t>(id) < 0 || static_cast<int64_t>(id) >= vocab_size;
  });
  throw std::invalid_argument(file.name + ": token " + std::to_string(begin + (bad - ids)) +
                              " is id " + std::to_string(static_cast<int64_t>(*bad)) +
                              ", outside the vocabulary of " + std::to_string(vocab_size));
}

void copy_tokens(const TokenFile& file, int64_t begin, int64_t length, int64_t vocab_size,
                 int32_t* out) {
  switch (file.type) {
    case TokenType::kUint8:
      return copy_checked<uint8_t>(file, begin, length, vocab_size, out);
    case TokenType::kInt8:
      return copy_checked<int8_t>(file, begin, length, vocab_size, out);
    case TokenType::kInt16:
      return copy_checked<int16_t>(file, begin, length, vocab_size, out);
    case TokenType::kInt32:
      return copy_checked<int32_t>(file, begin, length, vocab_size, out);
    case TokenType::kInt64:
      return copy_checked<int64_t>(file, begin, length, vocab_size, out);
    case TokenType::kUint16:
      return copy_checked<uint16_t>(file, begin, length, vocab_size, out);
  }
}

void check_ascending(const std::string& label, const char* what, Int64Span values, int64_t limit) {
  bool fits = values.size > 0 && values.data[0] == 0 && values.data[values.size - 1] == limit;
  for (int64_t k = 1; fits && k < values.size; ++k) fits = values.data[k - 1] <= values.data[k];
  if (!fits) throw std::invalid_argument(label + ": " + what + " do not fit the files");
}

int64_t last(Int64Span values) { return values.size > 0 ? values.data[values.size - 1] : 0; }

/// The last k with values[k] <= value, skipping equal entries before it.
int64_t find_part(Int64Span values, int64_t value) {
  return std::upper_bound(values.data, values.data + values.size, value) - values.data - 1;
}

void will_need(const uint8_t* data, int64_t num_bytes) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(num_bytes);
  // Errors are ignored, because this is only advice. Memory that is not file-backed is rejected.
  posix_madvise(reinterpret_cast<void*>(begin), end - begin, POSIX_MADV_WILLNEED);
}

}  // namespace

int64_t item_size(TokenType type) {
  switch (type) {
    case TokenType::kUint8:
    case TokenType::kInt8:
      return 1;
    case TokenType::kInt16:
    case TokenType::kUint16:
      return 2;
    case TokenType::kInt32:
      return 4;
    case TokenType::kInt64:
      return 8;
  }
  throw std::invalid_argument("unknown token type");
}

int64_t TokenFile::document_begin(int64_t document) const {
  const int64_t sequence = load_int64(document_indices, document);
  if (sequence >= num_sequences) return num_tokens;
  int64_t token = -1;
  if (sequence >= 0) {
    const int64_t pointer = load_int64(sequence_pointers, sequence);
    token = pointer < 0 ? -1 : pointer / item_size(type);
  }
  if (token < 0 || token > num_tokens) {
    throw std::invalid_argument(name + ": its index points outside the file at " +
                                std::to_string(document));
  }
  return token;
}

void TokenFile::document_begins(int64_t begin, int64_t end, int64_t shift,
                                std::vector<int32_t>* starts) const {
  int64_t low = 0;
  int64_t high = num_documents;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (document_begin(middle) < begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  int64_t previous = begin - 1;
  for (int64_t document = low; document < num_documents; ++document) {
    const int64_t token = document_begin(document);
    if (token >= end) return;
    if (token < previous || token < begin) {
      throw std::invalid_argument(name + ": its index goes back at document " +
                                  std::to_string(document));
    }
    if (token != previous) starts->push_back(static_cast<int32_t>(token + shift));
    previous = token;
  }
}

RowReader::RowReader(std::string label, std::vector<TokenFile> files, SampleShape shape,
                     int64_t num_samples)
    : files_(std::move(files)), shape_(shape), label_(std::move(label)), num_samples_(num_samples) {
  if (shape.seq_length < 1 || shape.seq_length > int64_t{1} << 30) {
    throw std::invalid_argument(label_ + ": seq_length " + std::to_string(shape.seq_length) +
                                " is not between 1 and 2^30");
  }
}

void RowReader::find_spans(int64_t ordinal, Row* row) const {
  if (ordinal < 0 || ordinal >= num_samples_) {
    throw std::invalid_argument(label_ + ": sample " + std::to_string(ordinal) + " is not one of " +
                                std::to_string(num_samples_));
  }
  row->starts.clear();
  row->spans.clear();
  try {
    locate(ordinal, row);
    for (const TokenSpan& span : row->spans) {
      if (span.begin > span.file->num_tokens - span.length) {
        throw std::invalid_argument(span.file->name + ": ends before token " +
                                    std::to_string(span.begin + span.length));
      }
    }
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(label_ + ": " + error.what());
  }
}

void RowReader::prefetch(int64_t ordinal, Row* row) const {
  // `read` reports errors.
  if (!mapped::guarded([&] { find_spans(ordinal, row); })) return;
  for (const TokenSpan& span : row->spans) {
    const int64_t item = item_size(span.file->type);
    const auto* tokens = static_cast<const uint8_t*>(span.file->tokens);
    will_need(tokens + span.begin * item, span.length * item);
    if (span.file->loss_mask != nullptr) {
      will_need(span.file->loss_mask + span.begin, span.length);
    }
  }
}

void RowReader::read(int64_t ordinal, Row* row) const {
  if (mapped::guarded([&] { read_unguarded(ordinal, row); })) return;
  std::string message = label_ + ": sample " + std::to_string(ordinal) + " cannot be read any more";
  for (const TokenSpan& span : row->spans) message += ", in " + span.file->name;
  throw MappedReadError(message + ": a file became shorter, or its disk or server is gone");
}

void RowReader::read_unguarded(int64_t ordinal, Row* row) const {
  find_spans(ordinal, row);
  int64_t filled = 0;
  try {
    for (const TokenSpan& span : row->spans) {
      copy(span, filled, row);
      filled += span.length;
    }
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(label_ + ": " + error.what());
  }
  finish(filled, row);
}

void RowReader::copy(const TokenSpan& span, int64_t filled, Row* row) const {
  const TokenFile& file = *span.file;
  copy_tokens(file, span.begin, span.length, shape_.vocab_size, row->tokens + filled);
  uint8_t* mask = row->loss_mask + filled;
  if (file.loss_mask == nullptr) {
    std::fill(mask, mask + span.length, uint8_t{1});
  } else {
    const uint8_t* from = file.loss_mask + span.begin;
    std::transform(from, from + span.length, mask,
                   [](uint8_t value) { return static_cast<uint8_t>(value != 0); });
  }
}

void RowReader::finish(int64_t filled, Row* row) const {
  const int64_t num_tokens = shape_.seq_length + 1;
  std::fill(row->tokens + filled, row->tokens + num_tokens, shape_.pad_id);
  std::fill(row->loss_mask + filled, row->loss_mask + num_tokens, uint8_t{0});
  std::vector<int32_t>& cu_seqlens = row->cu_seqlens;
  cu_seqlens.assign(1, 0);
  const auto seq_length = static_cast<int32_t>(shape_.seq_length);
  if (shape_.isolate) {
    row->starts.push_back(static_cast<int32_t>(filled));  // begin of the padding
    for (const int32_t start : row->starts) {
      if (start <= seq_length) row->loss_mask[start] = 0;
      if (start > cu_seqlens.back() && start < seq_length) cu_seqlens.push_back(start);
    }
  }
  cu_seqlens.push_back(seq_length);
}

WindowReader::WindowReader(std::string label, std::vector<TokenFile> files, const int32_t* file,
                           Int64Span token_begin, Int64Span cumulative, SampleShape shape,
                           int64_t num_samples)
    : RowReader(label, std::move(files), shape, num_samples),
      file_(file),
      token_begin_(token_begin),
      cumulative_(cumulative) {
  const int64_t total = last(cumulative);
  check_ascending(label, "runs", cumulative, total);
  bool fits = cumulative.size == token_begin.size + 1 &&
              num_samples <= (total + shape.seq_length - 1) / shape.seq_length;
  for (int64_t run = 0; fits && run < token_begin.size; ++run) {
    fits = file[run] >= 0 && file[run] < static_cast<int64_t>(files_.size()) &&
           token_begin.data[run] >= 0;
  }
  if (!fits) throw std::invalid_argument(label + ": runs do not fit the files");
}

void WindowReader::locate(int64_t ordinal, Row* row) const {
  int64_t position = ordinal * shape_.seq_length;
  int64_t remaining = std::min(shape_.seq_length + 1, last(cumulative_) - position);
  int64_t filled = 0;
  for (int64_t run = find_part(cumulative_, position); remaining > 0; ++run) {
    const TokenFile& file = files_[static_cast<size_t>(file_[run])];
    const int64_t begin = token_begin_.data[run] + (position - cumulative_.data[run]);
    const int64_t length = std::min(remaining, cumulative_.data[run + 1] - position);
    if (shape_.isolate) file.document_begins(begin, begin + length, filled - begin, &row->starts);
    row->spans.push_back({&file, begin, length});
    position += length;
    remaining -= length;
    filled += length;
  }
}

PackedReader::PackedReader(std::string label, std::vector<TokenFile> files,
                           Int64Span first_documents, Int64Span offsets, Int64Span documents,
                           SampleShape shape)
    : RowReader(label, std::move(files), shape, offsets.size - 1),
      first_documents_(first_documents),
      offsets_(offsets),
      documents_(documents) {
  bool fits = first_documents.size == static_cast<int64_t>(files_.size()) + 1;
  for (int64_t k = 0; fits && k < first_documents.size; ++k) {
    const int64_t before =
        k == 0 ? 0 : first_documents.data[k - 1] + files_[static_cast<size_t>(k - 1)].num_documents;
    fits = first_documents.data[k] == before;
  }
  if (!fits) throw std::invalid_argument(label + ": numbers of documents do not fit the files");
}

void PackedReader::locate(int64_t ordinal, Row* row) const {
  const int64_t begin = offsets_.data[ordinal];
  const int64_t end = offsets_.data[ordinal + 1];
  if (begin < 0 || begin > end || end > documents_.size) {
    throw std::invalid_argument("damaged packing: sample " + std::to_string(ordinal) +
                                " has documents " + std::to_string(begin) + " to " +
                                std::to_string(end));
  }
  const int64_t capacity = shape_.seq_length + 1;
  int64_t filled = 0;
  for (int64_t place = begin; place < end; ++place) {
    const TokenSpan span = document_span(documents_.data[place], capacity - filled);
    if (span.length == 0) continue;
    row->spans.push_back(span);
    row->starts.push_back(static_cast<int32_t>(filled));
    filled += span.length;
    // Documents are far apart in memory. Prefetch this one while the next ones are looked up.
    __builtin_prefetch(static_cast<const uint8_t*>(span.file->tokens) +
                       span.begin * item_size(span.file->type));
  }
}

TokenSpan PackedReader::document_span(int64_t document, int64_t room) const {
  if (document < 0 || document >= last(first_documents_)) {
    throw std::invalid_argument("damaged packing: there is no document " +
                                std::to_string(document));
  }
  const int64_t number = find_part(first_documents_, document);
  const TokenFile& file = files_[static_cast<size_t>(number)];
  const int64_t local = document - first_documents_.data[number];
  const int64_t begin = file.document_begin(local);
  const int64_t length = std::min(file.document_begin(local + 1) - begin, room);
  if (length < 0) {
    throw std::invalid_argument(file.name + ": its index goes back at document " +
                                std::to_string(local + 1));
  }
  return {&file, begin, length};
}

}  // namespace chatflow
