/// \file
/// Samples cut from flat token files. `megatron_chatflow/data/samples.py` defines them.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace chatflow {

/// How the ids of a token file are stored.
enum class TokenType { kUint8, kInt8, kInt16, kInt32, kInt64, kUint16 };

/// Bytes of one id.
int64_t item_size(TokenType type);

/// One indexed dataset, mapped; whoever made this keeps the mappings. The arrays of the index need
/// not be aligned.
struct TokenFile {
  std::string name;    ///< the path, for messages
  const void* tokens;  ///< aligned to its items
  int64_t num_tokens;
  TokenType type;
  const uint8_t* sequence_pointers;  ///< int64, bytes into the tokens
  int64_t num_sequences;
  const uint8_t* document_indices;  ///< int64[num_documents + 1], first sequence of each document
  int64_t num_documents;
  const uint8_t* loss_mask;  ///< one a token, or null where all of them carry loss

  /// The token at which a document begins; that after the last document ends the file.
  /// \param document 0 to num_documents
  /// \throws std::invalid_argument the index points outside the file
  int64_t document_begin(int64_t document) const;

  /// Appends to `starts`, moved by `shift`, the tokens in [begin, end) at which documents begin
  /// that are not empty, ascending.
  /// \throws std::invalid_argument the index is not ascending, or points outside the file
  void document_begins(int64_t begin, int64_t end, int64_t shift,
                       std::vector<int32_t>* starts) const;
};

/// What every sample of a source has in common.
struct SampleShape {
  int64_t seq_length;  ///< inputs; a sample has one token more
  int32_t pad_id;
  int64_t vocab_size;  ///< ids must lie below it
  bool isolate;        ///< documents are attention segments of their own
};

/// Consecutive tokens of a file.
struct TokenSpan {
  const TokenFile* file;
  int64_t begin;
  int64_t length;
};

/// One sample: memory for its tokens, which the caller gives, and its segments.
struct Row {
  int32_t* tokens;                  ///< seq_length + 1
  uint8_t* loss_mask;               ///< of the tokens; that of the labels begins at its second
  std::vector<int32_t> cu_seqlens;  ///< begins of the segments, and seq_length
  std::vector<int32_t> starts;      ///< positions at which documents begin
  std::vector<TokenSpan> pieces;    ///< what its tokens are copied from
};

/// Reads any sample of an epoch; safe to share between threads.
class RowReader {
 public:
  virtual ~RowReader() = default;
  RowReader(const RowReader&) = delete;
  RowReader& operator=(const RowReader&) = delete;

  /// Reads a sample.
  /// \throws std::invalid_argument there is none such, an id is outside the vocabulary, or an index
  ///   is damaged; the message begins with the label
  /// \throws MappedReadError a file became shorter, or its disk is gone
  void read(int64_t ordinal, Row* row) const;

  /// Asks the system to bring a sample's pages into memory, all at once and without waiting: a page
  /// fault alone would wait for the disk, and read far more than the sample.
  /// \throws std::invalid_argument as `read` does
  void prefetch(int64_t ordinal, Row* row) const;

  const SampleShape& shape() const { return shape_; }

 protected:
  RowReader(std::string label, std::vector<TokenFile> files, SampleShape shape,
            int64_t num_samples);

  /// Lists a sample's pieces, and where documents begin.
  virtual void locate(int64_t ordinal, Row* row) const = 0;

  std::vector<TokenFile> files_;
  SampleShape shape_;

 private:
  void read_unguarded(int64_t ordinal, Row* row) const;
  void find_pieces(int64_t ordinal, Row* row) const;
  void copy(const TokenSpan& piece, int64_t filled, Row* row) const;
  void finish(int64_t filled, Row* row) const;

  std::string label_;
  int64_t num_samples_;
};

/// An array of int64 that someone else keeps.
struct Int64Span {
  const int64_t* data;
  int64_t size;
};

/// Windows of seq_length + 1 tokens at stride seq_length, over runs of tokens.
class WindowReader : public RowReader {
 public:
  /// \param file int32, the file of each run
  /// \param token_begin first token of each run in its file
  /// \param cumulative tokens in the runs before each, and in all
  /// \throws std::invalid_argument the runs do not lie in the files
  WindowReader(std::string label, std::vector<TokenFile> files, const int32_t* file,
               Int64Span token_begin, Int64Span cumulative, SampleShape shape, int64_t num_samples);

 protected:
  void locate(int64_t ordinal, Row* row) const override;

 private:
  const int32_t* file_;
  Int64Span token_begin_;
  Int64Span cumulative_;
};

/// Whole documents, one after the other.
class PackedReader : public RowReader {
 public:
  /// \param first_documents documents in the files before each, and in all
  /// \param offsets where each sample's documents begin in the list
  /// \param documents numbered over all files
  /// \throws std::invalid_argument `first_documents` does not fit the files
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
