#include "packing.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace chatflow {
namespace {

/// A set of small integers that finds its least member from a given one on in a few steps: a bit a
/// member, and above it levels of one bit a word.
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

/// Samples by the room that is left in them; of equal ones, the latest comes first.
class OpenSamples {
 public:
  explicit OpenSamples(int64_t capacity)
      : rooms_(capacity + 1), latest_(static_cast<size_t>(capacity) + 1, -1) {}

  /// Takes out the fullest sample with room for `length`; -1 if there is none.
  int64_t take(int64_t length, int64_t* room) {
    *room = rooms_.find(length);
    if (*room < 0) return -1;
    int64_t& latest = latest_[static_cast<size_t>(*room)];
    const int64_t sample = latest;
    latest = before_[static_cast<size_t>(sample)];
    if (latest < 0) rooms_.erase(*room);
    return sample;
  }

  void put(int64_t sample, int64_t room) {
    if (static_cast<size_t>(sample) >= before_.size()) before_.resize(sample + 1, -1);
    int64_t& latest = latest_[static_cast<size_t>(room)];
    before_[static_cast<size_t>(sample)] = latest;
    latest = sample;
    rooms_.insert(room);
  }

 private:
  OrderedSet rooms_;
  std::vector<int64_t> latest_;
  std::vector<int64_t> before_;
};

/// Documents by descending length, equal ones in their own order.
std::vector<int64_t> longest_first(const int64_t* lengths, int64_t num_documents) {
  std::vector<int64_t> order(static_cast<size_t>(num_documents));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [lengths](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  return order;
}

void number_by_first_document(int64_t* samples, int64_t num_documents, int64_t num_samples) {
  std::vector<int64_t> number(static_cast<size_t>(num_samples), -1);
  int64_t next = 0;
  for (int64_t document = 0; document < num_documents; ++document) {
    if (samples[document] < 0) continue;
    int64_t& assigned = number[static_cast<size_t>(samples[document])];
    if (assigned < 0) assigned = next++;
    samples[document] = assigned;
  }
}

}  // namespace

void best_fit(const int64_t* lengths, int64_t num_documents, int64_t capacity, int64_t* samples) {
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
  OpenSamples open(capacity);
  int64_t num_samples = 0;
  for (const int64_t document : longest_first(lengths, num_documents)) {
    const int64_t length = lengths[document];
    samples[document] = -1;
    if (length == 0) continue;
    int64_t room = 0;
    int64_t sample = open.take(length, &room);
    if (sample < 0) {
      room = capacity;
      sample = num_samples++;
    }
    samples[document] = sample;
    if (room > length) open.put(sample, room - length);
  }
  number_by_first_document(samples, num_documents, num_samples);
}

}  // namespace chatflow
