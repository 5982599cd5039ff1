#include "bpe_encoder.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace chatflow {
namespace {

uint32_t with_space_sign(uint32_t code_point) {
  return code_point == ' ' ? BpeModel::kSpace : code_point;
}

/// For each length, a mask of the bytes of a key that belong to the text.
constexpr std::array<std::array<uint64_t, 3>, 24> make_masks() {
  std::array<std::array<uint64_t, 3>, 24> masks{};
  for (size_t num_bytes = 0; num_bytes < 24; ++num_bytes) {
    for (size_t k = 0; k < num_bytes; ++k) {
      masks[num_bytes][k / 8] |= uint64_t{0xFF} << (8 * (k % 8));
    }
  }
  return masks;
}

constexpr auto kMasks = make_masks();

}  // namespace

BpeEncoder::BpeEncoder(std::shared_ptr<const BpeModel> model)
    : shared_model_(std::move(model)), model_(*shared_model_), entries_(kNumWays << kLogSets) {
  for (uint32_t left = 0; left < 128; ++left) {
    for (uint32_t right = 0; right < 128; ++right) {
      ascii_joins_[left][right] = model_.may_join(with_space_sign(left), with_space_sign(right));
    }
  }
}

int32_t* BpeEncoder::encode(std::string_view text, bool with_prefix, int32_t* ids) {
  if (text.empty()) return ids;
  const size_t num_bytes = text.size() + (with_prefix ? 1 : 0);
  if (buffer_.size() < num_bytes + kPadding) buffer_.resize(num_bytes + kPadding);
  buffer_[0] = ' ';
  std::memcpy(buffer_.data() + (with_prefix ? 1 : 0), text.data(), text.size());
  std::memset(buffer_.data() + num_bytes, 0, kPadding);

  const uint8_t* const end = buffer_.data() + num_bytes;
  const uint8_t* begin = buffer_.data();
  CodePoint last = decode_utf8(begin);
  const uint8_t* at = begin + last.num_bytes;
  while (at < end) {
    const uint32_t byte = *at;
    bool joins;
    if (byte < 0x80 && last.value < 0x80) {
      joins = ascii_joins_[last.value][byte];
      last = {byte, 1};
    } else {
      const CodePoint next = decode_utf8(at);
      joins = model_.may_join(with_space_sign(last.value), with_space_sign(next.value));
      last = next;
    }
    if (!joins) {
      ids = add_stretch(begin, at, ids);
      begin = at;
    }
    at += last.num_bytes;
  }
  return encode_waiting(add_stretch(begin, end, ids));
}

BpeEncoder::Key BpeEncoder::key_of(const uint8_t* begin, size_t num_bytes) {
  Key key;
  std::memcpy(key.data(), begin, sizeof(key));
  const Key& mask = kMasks[num_bytes];
  for (size_t k = 0; k < key.size(); ++k) key[k] &= mask[k];
  key[2] |= static_cast<uint64_t>(num_bytes) << 56;
  return key;
}

/// Encodes a stretch, or defers it until its cache entries have been prefetched.
int32_t* BpeEncoder::add_stretch(const uint8_t* begin, const uint8_t* end, int32_t* ids) {
  const auto num_bytes = static_cast<size_t>(end - begin);
  const CodePoint first = decode_utf8(begin);
  const bool is_character = first.num_bytes == num_bytes;
  if (is_character && num_waiting_ == 0) {
    return emit(model_.symbol_of(with_space_sign(first.value)), begin, end, ids);
  }
  if (num_bytes > kMaxKeyBytes) {
    return encode_uncached(begin, end, encode_waiting(ids));
  }
  Waiting& stretch = waiting_[num_waiting_++];
  stretch.begin = begin;
  stretch.num_bytes = static_cast<uint32_t>(num_bytes);
  if (!is_character) {
    stretch.key = key_of(begin, num_bytes);
    uint64_t hash = (stretch.key[0] ^ (stretch.key[1] * 0x9E3779B97F4A7C15u)) * 0xBF58476D1CE4E5B9u;
    hash = (hash ^ (hash >> 32) ^ stretch.key[2]) * 0x94D049BB133111EBu;
    stretch.set = static_cast<uint32_t>(hash >> (64 - kLogSets));
    __builtin_prefetch(&entries_[stretch.set * kNumWays]);
    __builtin_prefetch(&entries_[stretch.set * kNumWays + 1]);
  }
  return num_waiting_ == kNumWaiting ? encode_waiting(ids) : ids;
}

int32_t* BpeEncoder::encode_waiting(int32_t* ids) {
  for (size_t k = 0; k < num_waiting_; ++k) ids = encode_waiting(waiting_[k], ids);
  num_waiting_ = 0;
  return ids;
}

int32_t* BpeEncoder::encode_waiting(const Waiting& stretch, int32_t* ids) {
  const uint8_t* const end = stretch.begin + stretch.num_bytes;
  const CodePoint first = decode_utf8(stretch.begin);
  if (first.num_bytes == stretch.num_bytes) {
    return emit(model_.symbol_of(with_space_sign(first.value)), stretch.begin, end, ids);
  }
  Entry* const set = &entries_[stretch.set * kNumWays];
  for (size_t way = 0; way < kNumWays; ++way) {
    const Entry& entry = set[way];
    const Key& key = entry.key;
    if (((key[0] ^ stretch.key[0]) | (key[1] ^ stretch.key[1]) | (key[2] ^ stretch.key[2])) == 0) {
      std::memcpy(ids, entry.ids.data(),
                  sizeof(entry.ids));  // copies all ids, because a fixed size is faster
      ids += entry.num_ids;
      if (way > 0) std::swap(set[0], set[way]);  // keeps the most recently used entry first
      return ids;
    }
  }
  int32_t* const after = encode_uncached(stretch.begin, end, ids);
  const auto num_new = static_cast<size_t>(after - ids);
  if (num_new <= kMaxCachedIds) {
    set[1] = set[0];
    set[0].key = stretch.key;
    set[0].num_ids = static_cast<uint32_t>(num_new);
    std::copy_n(ids, num_new, set[0].ids.begin());
  }
  return after;
}

int32_t* BpeEncoder::encode_uncached(const uint8_t* begin, const uint8_t* end, int32_t* ids) {
  const bool is_short = static_cast<size_t>(end - begin) <= kMaxScanned;
  return is_short ? merge_by_scan(begin, end, ids) : merge_by_heap(begin, end, ids);
}

/// Merges the best pair until there is none, by a scan of all pairs.
int32_t* BpeEncoder::merge_by_scan(const uint8_t* begin, const uint8_t* end, int32_t* ids) {
  std::array<int32_t, kMaxScanned> symbols;
  std::array<const uint8_t*, kMaxScanned + 1> borders;
  std::array<int32_t, kMaxScanned> joints;  // merged symbol of each symbol and the next
  std::array<uint32_t, kMaxScanned> ranks;
  size_t num_symbols = 0;
  for (const uint8_t* at = begin; at < end; ++num_symbols) {
    const CodePoint character = decode_utf8(at);
    symbols[num_symbols] = model_.symbol_of(with_space_sign(character.value));
    borders[num_symbols] = at;
    at += character.num_bytes;
  }
  borders[num_symbols] = end;
  const auto look = [&](size_t k) {
    const bool known = symbols[k] >= 0 && symbols[k + 1] >= 0;
    joints[k] = known ? model_.joint_of(symbols[k], symbols[k + 1]) : BpeModel::kNone;
    ranks[k] = model_.rank_of(joints[k]);
  };
  for (size_t k = 0; k + 1 < num_symbols; ++k) look(k);
  while (num_symbols > 1) {
    size_t best = 0;
    for (size_t k = 1; k + 1 < num_symbols; ++k) {
      if (ranks[k] < ranks[best]) best = k;
    }
    if (ranks[best] == BpeModel::kNoRank) break;
    symbols[best] = joints[best];
    --num_symbols;
    for (size_t k = best + 1; k < num_symbols; ++k) {
      symbols[k] = symbols[k + 1];
      borders[k] = borders[k + 1];
      joints[k - 1] = joints[k];
      ranks[k - 1] = ranks[k];
    }
    borders[num_symbols] = end;
    if (best > 0) look(best - 1);
    if (best + 1 < num_symbols) look(best);
  }
  for (size_t k = 0; k < num_symbols; ++k) ids = emit(symbols[k], borders[k], borders[k + 1], ids);
  return ids;
}

/// Merges the best pair until there is none, with a heap of pairs that may contain stale ones.
int32_t* BpeEncoder::merge_by_heap(const uint8_t* begin, const uint8_t* end, int32_t* ids) {
  links_.clear();
  for (const uint8_t* at = begin; at < end;) {
    const CodePoint character = decode_utf8(at);
    const auto from = static_cast<uint32_t>(at - begin);
    const auto number = static_cast<int32_t>(links_.size());
    at += character.num_bytes;
    links_.push_back({model_.symbol_of(with_space_sign(character.value)), from,
                      from + character.num_bytes, number - 1, at < end ? number + 1 : -1});
  }
  const auto later = [](const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.left > b.left;
  };
  heap_.clear();
  for (size_t k = 0; k + 1 < links_.size(); ++k) {
    push_candidate(static_cast<int32_t>(k), static_cast<int32_t>(k) + 1);
  }
  std::make_heap(heap_.begin(), heap_.end(), later);
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end(), later);
    const Candidate best = heap_.back();
    heap_.pop_back();
    Link& left = links_[best.left];
    if (left.symbol != best.left_symbol || left.next < 0) continue;
    Link& right = links_[left.next];
    if (right.symbol != best.right_symbol) continue;
    left.symbol = best.symbol;
    left.end = right.end;
    right.symbol = BpeModel::kNone;
    left.next = right.next;
    if (left.next >= 0) links_[left.next].previous = static_cast<int32_t>(best.left);
    for (const auto& [from, to] : {std::pair(left.previous, static_cast<int32_t>(best.left)),
                                   std::pair(static_cast<int32_t>(best.left), left.next)}) {
      const size_t num_before = heap_.size();
      if (from >= 0 && to >= 0) push_candidate(from, to);
      if (heap_.size() > num_before) std::push_heap(heap_.begin(), heap_.end(), later);
    }
  }
  for (int32_t k = 0; k >= 0; k = links_[k].next) {
    ids = emit(links_[k].symbol, begin + links_[k].begin, begin + links_[k].end, ids);
  }
  return ids;
}

void BpeEncoder::push_candidate(int32_t left, int32_t right) {
  const int32_t left_symbol = links_[left].symbol, right_symbol = links_[right].symbol;
  if (left_symbol < 0 || right_symbol < 0) return;
  const int32_t joint = model_.joint_of(left_symbol, right_symbol);
  if (joint == BpeModel::kNone) return;
  heap_.push_back(
      {model_.rank_of(joint), static_cast<uint32_t>(left), left_symbol, right_symbol, joint});
}

/// Writes the id of a symbol, or the ids of its bytes if it has none.
int32_t* BpeEncoder::emit(int32_t symbol, const uint8_t* begin, const uint8_t* end,
                          int32_t* ids) const {
  const int32_t id = symbol < 0 ? BpeModel::kNone : model_.id_of(symbol);
  if (id >= 0) {
    *ids++ = id;
  } else if (*begin == ' ') {  // the space character itself, if the vocabulary lacks it
    for (const uint8_t byte : {0xE2, 0x96, 0x81}) *ids++ = model_.byte_id(byte);
  } else {
    for (; begin < end; ++begin) *ids++ = model_.byte_id(*begin);
  }
  return ids;
}

}  // namespace chatflow
