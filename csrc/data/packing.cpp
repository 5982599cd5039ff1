#include "packing.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace chatflow {
namespace {

/// A set of small integers with a fast search for the least member that is not below a given value.
/// It has one bit per integer, and levels above with one bit per word.
class OrderedSet {
 public:
  explicit OrderedSet(int64_t num_values) {
    do {
      num_values = (num_values + 63) / 64;
      levels_.emplace_back(static_cast<size_t>(num_values), 0);
    } while (num_values > 1);
  }

  void insert(int64_t value) {
    for (auto& level : levels_) {
      level[static_cast<size_t>(value >> 6)] |= uint64_t{1} << (value & 63);
      value >>= 6;
    }
  }

  void erase(int64_t value) {
    for (auto& level : levels_) {
      uint64_t& word = level[static_cast<size_t>(value >> 6)];
      word &= ~(uint64_t{1} << (value & 63));
      if (word != 0) return;
      value >>= 6;
    }
  }

  /// The least member that is not below `value`, or -1.
  int64_t find(int64_t value) const {
    for (size_t height = 0; height < levels_.size(); ++height) {
      const auto word = static_cast<size_t>(value >> 6);
      if (word >= levels_[height].size()) return -1;
      const uint64_t rest = levels_[height][word] >> (value & 63);
      if (rest != 0) return descend(height, value + __builtin_ctzll(rest));
      value = (value >> 6) + 1;
    }
    return -1;
  }

 private:
  int64_t descend(size_t height, int64_t value) const {
    while (height > 0) {
      --height;
      value = (value << 6) + __builtin_ctzll(levels_[height][static_cast<size_t>(value)]);
    }
    return value;
  }

  std::vector<std::vector<uint64_t>> levels_;
};

/// Samples by their remaining capacity; among equal ones, the latest comes first.
template <typename Item>
class OpenSamples {
 public:
  /// \param before memory for one item per sample
  OpenSamples(int64_t capacity, Item* before)
      : rooms_(capacity + 1), latest_(static_cast<size_t>(capacity) + 1, -1), before_(before) {}

  /// Removes and returns the fullest sample with room for `length`; -1 if there is none.
  Item take(int64_t length, int64_t* room) {
    *room = rooms_.find(length);
    if (*room < 0) return -1;
    Item& latest = latest_[static_cast<size_t>(*room)];
    const Item sample = latest;
    latest = before_[sample];
    if (latest < 0) rooms_.erase(*room);
    return sample;
  }

  void put(Item sample, int64_t room) {
    Item& latest = latest_[static_cast<size_t>(room)];
    before_[sample] = latest;
    latest = sample;
    rooms_.insert(room);
  }

 private:
  OrderedSet rooms_;
  std::vector<Item> latest_;
  Item* before_;  // for each sample, the previous one with the same remaining capacity
};

/// Memory whose pages are allocated on the first write.
template <typename Item>
std::unique_ptr<Item[]> uninitialized(int64_t size) {
  return std::unique_ptr<Item[]>(new Item[static_cast<size_t>(size)]);
}

/// Documents sorted by length; those of equal length keep their order.
template <typename Item>
struct ByLength {
  std::vector<int64_t> ends;  ///< end of the documents of each length in `order`
  std::unique_ptr<Item[]> order;
};

template <typename Item>
ByLength<Item> sort_by_length(const Item* lengths, int64_t num_documents, int64_t capacity) {
  ByLength<Item> sorted{std::vector<int64_t>(static_cast<size_t>(capacity) + 1, 0),
                        uninitialized<Item>(num_documents)};
  for (int64_t document = 0; document < num_documents; ++document) {
    ++sorted.ends[static_cast<size_t>(lengths[document])];
  }
  int64_t begin = 0;
  for (int64_t& end : sorted.ends) begin += std::exchange(end, begin);
  // Each entry is the begin of its documents until they have been placed.
  for (int64_t document = 0; document < num_documents; ++document) {
    int64_t& place = sorted.ends[static_cast<size_t>(lengths[document])];
    sorted.order[static_cast<size_t>(place++)] = static_cast<Item>(document);
  }
  return sorted;
}

/// \param number memory for one item per sample
template <typename Item>
void number_by_first_document(Item* samples, int64_t num_documents, int64_t num_samples,
                              Item* number) {
  std::fill(number, number + num_samples, Item{-1});
  Item next = 0;
  for (int64_t document = 0; document < num_documents; ++document) {
    if (samples[document] < 0) continue;
    Item& assigned = number[samples[document]];
    if (assigned < 0) assigned = next++;
    samples[document] = assigned;
  }
}

}  // namespace

template <typename Item>
int64_t best_fit(Item* lengths, int64_t num_documents, int64_t capacity) {
  if (capacity < 0 || capacity > int64_t{1} << 31) {
    throw std::invalid_argument("packing: capacity " + std::to_string(capacity) +
                                " is not between 0 and 2^31");
  }
  for (int64_t document = 0; document < num_documents; ++document) {
    if (lengths[document] < 0 || lengths[document] > capacity) {
      throw std::invalid_argument("packing: a length is not between 0 and " +
                                  std::to_string(capacity));
    }
  }
  const std::unique_ptr<Item[]> of_samples = uninitialized<Item>(num_documents);
  Item num_samples = 0;
  {
    const ByLength<Item> sorted = sort_by_length(lengths, num_documents, capacity);
    OpenSamples<Item> open(capacity, of_samples.get());
    for (int64_t length = capacity; length > 0; --length) {
      const int64_t end = sorted.ends[static_cast<size_t>(length)];
      for (int64_t k = sorted.ends[static_cast<size_t>(length - 1)]; k < end; ++k) {
        int64_t room = 0;
        Item sample = open.take(length, &room);
        if (sample < 0) {
          room = capacity;
          sample = num_samples++;
        }
        lengths[sorted.order[static_cast<size_t>(k)]] = sample;
        if (room > length) open.put(sample, room - length);
      }
    }
    for (int64_t k = 0; k < sorted.ends[0]; ++k) {
      lengths[sorted.order[static_cast<size_t>(k)]] = -1;
    }
  }
  number_by_first_document(lengths, num_documents, num_samples, of_samples.get());
  return num_samples;
}

template <typename Item>
void group_by_sample(const Item* samples, int64_t num_documents, int64_t num_samples,
                     int64_t* offsets, int64_t* documents) {
  std::fill(offsets, offsets + num_samples + 1, int64_t{0});
  for (int64_t document = 0; document < num_documents; ++document) {
    if (samples[document] >= 0) ++offsets[samples[document]];
  }
  int64_t begin = 0;
  for (int64_t k = 0; k <= num_samples; ++k) begin += std::exchange(offsets[k], begin);
  for (int64_t document = 0; document < num_documents; ++document) {
    if (samples[document] >= 0) documents[offsets[samples[document]]++] = document;
  }
  // Each offset now is the end of its sample, which is the begin of the next one.
  std::copy_backward(offsets, offsets + num_samples, offsets + num_samples + 1);
  offsets[0] = 0;
}

template int64_t best_fit(int32_t*, int64_t, int64_t);
template int64_t best_fit(int64_t*, int64_t, int64_t);
template void group_by_sample(const int32_t*, int64_t, int64_t, int64_t*, int64_t*);
template void group_by_sample(const int64_t*, int64_t, int64_t, int64_t*, int64_t*);

}  // namespace chatflow
