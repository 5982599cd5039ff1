/// \file
/// Tables of a SentencePiece byte-pair model: symbols of characters, and merges of pairs.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace chatflow {

/// A code point, and its number of bytes in UTF-8.
struct CodePoint {
  uint32_t value;
  uint32_t num_bytes;
};

/// Reads one code point of valid UTF-8.
inline CodePoint decode_utf8(const uint8_t* text) {
  const uint32_t first = text[0];
  if (first < 0x80) return {first, 1};
  if (first < 0xE0) return {(first & 0x1F) << 6 | (text[1] & 0x3Fu), 2};
  if (first < 0xF0) {
    return {(first & 0x0F) << 12 | (text[1] & 0x3Fu) << 6 | (text[2] & 0x3Fu), 3};
  }
  return {
      (first & 0x07) << 18 | (text[1] & 0x3Fu) << 12 | (text[2] & 0x3Fu) << 6 | (text[3] & 0x3Fu),
      4};
}

/// A byte-pair model with byte fallback and without user-defined or unused pieces.
///
/// A *symbol* is a piece of the vocabulary, or a character that is not a piece but occurs in one.
class BpeModel {
 public:
  static constexpr uint32_t kSpace = 0x2581;  ///< The character that represents a space in pieces.
  static constexpr int32_t kNone = -1;
  static constexpr uint32_t kNoRank = UINT32_MAX;

  /// \param pieces UTF-8 of the ordinary pieces.
  /// \param ids The id of each piece.
  /// \param scores The score of each piece; the highest is merged first.
  /// \param byte_ids The id of the piece of each byte.
  /// \throws std::invalid_argument Sizes differ, a piece is empty, given twice, or not UTF-8, or
  ///     there are more than 2^21 pieces and characters.
  BpeModel(const std::vector<std::string>& pieces, const std::vector<int32_t>& ids,
           const std::vector<double>& scores, const std::array<int32_t, 256>& byte_ids);

  /// The symbol of a character, or kNone.
  int32_t symbol_of(uint32_t code_point) const {
    if (code_point < basic_.size()) return basic_[code_point];
    const auto found = astral_.find(code_point);
    return found == astral_.end() ? kNone : found->second;
  }

  /// The id of a symbol, or kNone if it is a character that is not a piece.
  int32_t id_of(int32_t symbol) const { return ids_[symbol]; }

  /// The id of a byte.
  int32_t byte_id(uint8_t byte) const { return byte_ids_[byte]; }

  /// Whether two characters may be adjacent in a piece. There are false positives, but no false
  /// negatives.
  bool may_join(uint32_t left, uint32_t right) const {
    const uint32_t bit = bit_of(left, right);
    return joints_[bit >> 6] >> (bit & 63) & 1;
  }

  /// The symbol that two neighbours merge into, or kNone if they do not merge.
  int32_t joint_of(int32_t left, int32_t right) const {
    const uint64_t key = static_cast<uint64_t>(left) << kSymbolBits | static_cast<uint64_t>(right);
    const uint64_t hash = key * 0x9E3779B97F4A7C15u;
    const uint64_t bit = hash >> (64 - kLogFilterBits);
    if ((filter_[bit >> 6] >> (bit & 63) & 1) == 0)
      return kNone;  // true for most pairs, and fits into a closer cache
    for (uint64_t slot = hash >> shift_;; slot = (slot + 1) & (slots_.size() - 1)) {
      if (slots_[slot] == kEmpty) return kNone;
      if (slots_[slot] >> kSymbolBits == key) {
        return static_cast<int32_t>(slots_[slot] & ((1u << kSymbolBits) - 1));
      }
    }
  }

  /// Priority of the merge into a symbol: lower ranks first, equal ranks from left to right.
  uint32_t rank_of(int32_t joint) const { return joint < 0 ? kNoRank : ranks_[joint]; }

 private:
  static constexpr uint64_t kEmpty = UINT64_MAX;
  static constexpr uint32_t kSymbolBits = 21;  // three symbols fit into 64 bits
  static constexpr uint32_t kLogBits = 18;
  static constexpr uint32_t kLogFilterBits = 20;

  static uint32_t bit_of(uint32_t left, uint32_t right) {
    return (left * 0x9E3779B1u + right * 0x85EBCA77u) >> (32 - kLogBits);
  }

  void add_character(uint32_t code_point, int32_t symbol);
  void add_merges(const std::vector<std::array<int32_t, 3>>& merges);

  std::array<int32_t, 256> byte_ids_;
  std::vector<int32_t> ids_;
  std::vector<uint32_t> ranks_;
  std::vector<int32_t> basic_;
  std::unordered_map<uint32_t, int32_t> astral_;
  std::vector<uint64_t> joints_;
  std::vector<uint64_t> filter_;
  std::vector<uint64_t> slots_;  // left, right and merged symbol of each merge
  uint32_t shift_ = 0;
};

}  // namespace chatflow
