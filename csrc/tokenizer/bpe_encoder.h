/// \file
/// Encodes text to the ids of a SentencePiece byte-pair model. The ids equal those of the library,
/// and encoding is many times faster.
///
/// SentencePiece merges neighbours over the whole text, best score first. Two characters that are
/// adjacent in no piece are never merged, so the text can be split between them into independent
/// stretches, mostly words. The ids of short stretches are cached.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "bpe_model.h"

namespace chatflow {

/// Encodes one text at a time. Not thread-safe.
class BpeEncoder {
 public:
  explicit BpeEncoder(std::shared_ptr<const BpeModel> model);

  /// Maximum number of ids of a text.
  static size_t max_ids(size_t num_bytes) { return 3 * (num_bytes + 1) + kMaxCachedIds; }

  /// Writes the ids of a text.
  /// \param text Valid UTF-8; spaces count as the model's space sign.
  /// \param with_prefix Whether to put a space before a text that is not empty.
  /// \param ids Output, with room for max_ids(text.size()) ids.
  /// \return The end of the written ids.
  int32_t* encode(std::string_view text, bool with_prefix, int32_t* ids);

 private:
  static constexpr size_t kMaxKeyBytes = 23;
  static constexpr size_t kMaxCachedIds = 9;
  static constexpr size_t kLogSets = 16;
  static constexpr size_t kNumWays = 2;
  static constexpr size_t kNumWaiting = 16;
  static constexpr size_t kPadding = 32;  // bytes that may be read beyond the end of a text
  static constexpr size_t kMaxScanned = 40;

  /// A stretch of text, zero-padded, with its length in the last byte.
  using Key = std::array<uint64_t, 3>;

  /// A stretch and its ids: one cache line.
  struct alignas(64) Entry {
    Key key{};
    std::array<int32_t, kMaxCachedIds> ids{};
    uint32_t num_ids = 0;
  };

  /// A stretch whose set of cache entries is being prefetched.
  struct Waiting {
    const uint8_t* begin;
    uint32_t num_bytes;
    uint32_t set;
    Key key;
  };

  /// A pair of neighbours in a long stretch.
  struct Candidate {
    uint32_t rank;
    uint32_t left;
    int32_t left_symbol;
    int32_t right_symbol;
    int32_t symbol;
  };

  /// A symbol of a long stretch, in a doubly linked list.
  struct Link {
    int32_t symbol;
    uint32_t begin;
    uint32_t end;
    int32_t previous;
    int32_t next;
  };

  int32_t* add_stretch(const uint8_t* begin, const uint8_t* end, int32_t* ids);
  int32_t* encode_waiting(int32_t* ids);
  int32_t* encode_waiting(const Waiting& stretch, int32_t* ids);
  int32_t* encode_uncached(const uint8_t* begin, const uint8_t* end, int32_t* ids);
  int32_t* merge_by_scan(const uint8_t* begin, const uint8_t* end, int32_t* ids);
  int32_t* merge_by_heap(const uint8_t* begin, const uint8_t* end, int32_t* ids);
  void push_candidate(int32_t left, int32_t right);
  int32_t* emit(int32_t symbol, const uint8_t* begin, const uint8_t* end, int32_t* ids) const;
  static Key key_of(const uint8_t* begin, size_t num_bytes);

  std::shared_ptr<const BpeModel> shared_model_;
  const BpeModel& model_;
  std::array<std::array<bool, 128>, 128> ascii_joins_{};
  std::vector<Entry> entries_;
  std::vector<uint8_t> buffer_;
  std::array<Waiting, kNumWaiting> waiting_;
  size_t num_waiting_ = 0;
  std::vector<Link> links_;
  std::vector<Candidate> heap_;
};

}  // namespace chatflow
