#include "bpe_model.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace chatflow {
namespace {

constexpr size_t kNumBasic = 0x10000;

/// The begin of each character of a piece, and the end of the piece.
std::vector<size_t> borders_of(const std::string& piece) {
  std::vector<size_t> borders;
  for (size_t at = 0; at < piece.size();) {
    const auto first = static_cast<uint8_t>(piece[at]);
    const size_t num_bytes = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    bool valid = (first < 0x80 || first >= 0xC2) && first < 0xF5 && at + num_bytes <= piece.size();
    for (size_t k = 1; valid && k < num_bytes; ++k) {
      valid = (static_cast<uint8_t>(piece[at + k]) & 0xC0) == 0x80;
    }
    if (!valid) throw std::invalid_argument("byte-pair model: a piece is not valid UTF-8");
    borders.push_back(at);
    at += num_bytes;
  }
  borders.push_back(piece.size());
  return borders;
}

uint32_t code_point_at(const std::string& piece, size_t at) {
  return decode_utf8(reinterpret_cast<const uint8_t*>(piece.data()) + at).value;
}

/// Rank of each score: 0 for the highest. Equal scores have equal ranks.
std::vector<uint32_t> ranks_of(const std::vector<double>& scores) {
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&scores](size_t a, size_t b) { return scores[a] > scores[b]; });
  std::vector<uint32_t> ranks(scores.size());
  for (size_t k = 0; k < order.size(); ++k) {
    const bool equal = k > 0 && scores[order[k]] == scores[order[k - 1]];
    ranks[order[k]] = equal ? ranks[order[k - 1]] : static_cast<uint32_t>(k);
  }
  return ranks;
}

}  // namespace

BpeModel::BpeModel(const std::vector<std::string>& pieces, const std::vector<int32_t>& ids,
                   const std::vector<double>& scores, const std::array<int32_t, 256>& byte_ids)
    : byte_ids_(byte_ids),
      ids_(ids),
      ranks_(ranks_of(scores)),
      basic_(kNumBasic, kNone),
      joints_((1u << kLogBits) / 64),
      filter_((1u << kLogFilterBits) / 64) {
  if (pieces.size() != ids.size() || pieces.size() != scores.size()) {
    throw std::invalid_argument("byte-pair model: expected as many ids and scores as pieces");
  }
  std::vector<std::vector<size_t>> borders;
  std::unordered_map<std::string, int32_t> symbols;
  for (size_t k = 0; k < pieces.size(); ++k) {
    borders.push_back(borders_of(pieces[k]));
    const bool is_new = symbols.emplace(pieces[k], static_cast<int32_t>(k)).second;
    if (pieces[k].empty() || !is_new) {
      throw std::invalid_argument("byte-pair model: a piece is empty or occurs twice");
    }
    if (borders[k].size() == 2) add_character(code_point_at(pieces[k], 0), static_cast<int32_t>(k));
  }
  for (size_t k = 0; k < pieces.size(); ++k) {
    for (size_t c = 0; c + 1 < borders[k].size(); ++c) {
      const std::string text = pieces[k].substr(borders[k][c], borders[k][c + 1] - borders[k][c]);
      const auto symbol = static_cast<int32_t>(ids_.size());
      if (symbols.emplace(text, symbol).second) {
        ids_.push_back(kNone);
        add_character(code_point_at(text, 0), symbol);
      }
    }
  }
  if (ids_.size() >= (1u << kSymbolBits)) {
    throw std::invalid_argument("byte-pair model: more than 2^21 pieces and characters");
  }
  std::vector<std::array<int32_t, 3>> merges;
  for (size_t k = 0; k < pieces.size(); ++k) {
    for (size_t c = 1; c + 1 < borders[k].size(); ++c) {
      const uint32_t bit = bit_of(code_point_at(pieces[k], borders[k][c - 1]),
                                  code_point_at(pieces[k], borders[k][c]));
      joints_[bit >> 6] |= uint64_t{1} << (bit & 63);
      const auto left = symbols.find(pieces[k].substr(0, borders[k][c]));
      const auto right = symbols.find(pieces[k].substr(borders[k][c]));
      if (left != symbols.end() && right != symbols.end()) {
        merges.push_back({left->second, right->second, static_cast<int32_t>(k)});
      }
    }
  }
  add_merges(merges);
}

void BpeModel::add_merges(const std::vector<std::array<int32_t, 3>>& merges) {
  uint32_t log_slots = kLogFilterBits - 6;
  while ((size_t{1} << log_slots) < 2 * merges.size()) ++log_slots;
  shift_ = 64 - log_slots;
  slots_.assign(size_t{1} << log_slots, kEmpty);
  for (const auto& [left, right, joint] : merges) {
    const uint64_t key = static_cast<uint64_t>(left) << kSymbolBits | static_cast<uint64_t>(right);
    const uint64_t hash = key * 0x9E3779B97F4A7C15u;
    const uint64_t bit = hash >> (64 - kLogFilterBits);
    filter_[bit >> 6] |= uint64_t{1} << (bit & 63);
    uint64_t slot = hash >> shift_;
    while (slots_[slot] != kEmpty) slot = (slot + 1) & (slots_.size() - 1);
    slots_[slot] = key << kSymbolBits | static_cast<uint64_t>(joint);
  }
}

void BpeModel::add_character(uint32_t code_point, int32_t symbol) {
  if (code_point < basic_.size()) {
    basic_[code_point] = symbol;
  } else {
    astral_[code_point] = symbol;
  }
}

}  // namespace chatflow
