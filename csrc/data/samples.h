/// \file
/// Samples cut from flat token files. The reference is `megatron_chatflow/data/samples.py`.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace chatflow {

/// Type of the ids in a token file.
enum class TokenType { kUint8, kInt8, kInt16, kInt32, kInt64, kUint16 };

/// Bytes of one id.
int64_t item_size(TokenType type);

/// A memory-mapped indexed dataset. The creator owns the mappings. The arrays of the index may be
/// unaligned.
struct TokenFile {
  std::string name;    ///< path, for error messages
  const void* tokens;  ///< aligned to its items
  int64_t num_tokens;
  TokenType type;
  const uint8_t* sequence_pointers;  ///< int64, byte offsets into the tokens
  int64_t num_sequences;
  const uint8_t* document_indices;  ///< int64[num_documents + 1], first sequence of each document
  int64_t num_documents;
  const uint8_t* loss_mask;  ///< one byte per token; null if all tokens have loss

  /// The first token of a document; for `num_documents`, the end of the file.
  /// \param document 0 to num_documents
  /// \throws std::invalid_argument the index points outside the file
  int64_t document_begin(int64_t document) const;

  /// Appends to `starts` the first tokens, plus `shift`, of all non-empty documents that begin in
  /// [begin, end), in ascending order.
  /// \throws std::invalid_argument the index is not ascending, or points outside the file
  void document_begins(int64_t begin, int64_t end, int64_t shift,
                       std::vector<int32_t>* starts) const;
};

/// Properties that all samples of a source share.
struct SampleShape {
  int64_t seq_length;  ///< number of inputs; a sample has one more token
  int32_t pad_id;
  int64_t vocab_size;  ///< all ids must be smaller
  bool isolate;        ///< whether each document is its own attention segment
};

/// Consecutive tokens of a file.
struct TokenSpan {
  const TokenFile* file;
  int64_t begin;
  int64_t length;
};

/// One sample: memory for its tokens, provided by the caller, and its segments.
struct Row {
  int32_t* tokens;     ///< seq_length + 1
  uint8_t* loss_mask;  ///< of the tokens; the mask of the labels begins at the second entry
  std::vector<int32_t> cu_seqlens;  ///< begin of each segment, and seq_length
  std::vector<int32_t> starts;      ///< positions at which documents begin
  std::vector<TokenSpan> spans;     ///< source of its tokens
};

/// Reads any sample of an epoch. Thread-safe.
class RowReader {
 public:
  virtual ~RowReader() = default;
  RowReader(const RowReader&) = delete;
  RowReader& operator=(const RowReader&) = delete;

  /// Reads a sample.
  /// \throws std::invalid_argument the sample does not exist, an id is outside the vocabulary, or
  /// an
  ///   index is damaged; the message begins with the label
  /// \throws MappedReadError a file was truncated, or its disk is gone
  void read(int64_t ordinal, Row* row) const;

  /// Asks the system to load all pages of a sample into memory, without waiting. Page faults would
  /// wait for the disk one by one and read far more than the sample.
  /// \throws std::invalid_argument as `read`
  void prefetch(int64_t ordinal, Row* row) const;

  const SampleShape& shape() const { return shape_; }

 protected:
  RowReader(std::string label, std::vector<TokenFile> files, SampleShape shape,
            int64_t num_samples);

  /// Lists the spans of a sample, and the positions at which documents begin.
  virtual void locate(int64_t ordinal, Row* row) const = 0;

  std::vector<TokenFile> files_;
  SampleShape shape_;

 private:
  void read_unguarded(int64_t ordinal, Row* row) const;
  void find_spans(int64_t ordinal, Row* row) const;
  void copy(const TokenSpan& span, int64_t filled, Row* row) const;
  void finish(int64_t filled, Row* row) const;

  std::string label_;
  int64_t num_samples_;
};

/// A view of an int64 array that the caller owns.
struct Int64Span {
  const int64_t* data;
  int64_t size;
};

/// Windows of seq_length + 1 tokens at stride seq_length, over runs of tokens.
class WindowReader : public RowReader {
 public:
  /// \param file int32, file of each run
  /// \param token_begin first token of each run in its file
  /// \param cumulative tokens before each run, and in all runs
  /// \throws std::invalid_argument the runs do not lie within the files
  WindowReader(std::string label, std::vector<TokenFile> files, const int32_t* file,
               Int64Span token_begin, Int64Span cumulative, SampleShape shape, int64_t num_samples);

 protected:
  void locate(int64_t ordinal, Row* row) const override;

 private:
  const int32_t* file_;
  Int64Span token_begin_;
  Int64Span cumulative_;
};

/// Whole documents, concatenated.
class PackedReader : public RowReader {
 public:
  /// \param first_documents documents before each file, and in all files
  /// \param offsets begin of each sample in `documents`
  /// \param documents document numbers, counted over all files
  /// \throws std::invalid_argument `first_documents` does not match the files
  PackedReader(std::string label, std::vector<TokenFile> files, Int64Span first_documents,
               Int64Span offsets, Int64Span documents, SampleShape shape);

 protected:
  void locate(int64_t ordinal, Row* row) const override;

 private:
  /// The tokens of a document, at most `room` of them.
  TokenSpan document_span(int64_t document, int64_t room) const;

  Int64Span first_documents_;
  Int64Span offsets_;
  Int64Span documents_;
};

}  // namespace chatflow
