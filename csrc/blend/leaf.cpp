#include "leaf.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "leaf_jobs.h"

namespace chatflow {
namespace {

constexpr uint16_t kNoSource = 0xFFFF;

/// Maintains the minimum of one key per source, in a tree with four children per node.
template <typename Key>
class Tournament {
 public:
  static constexpr Key kAbsent = std::numeric_limits<Key>::max();

  explicit Tournament(int num_sources) {
    std::size_t size = 4;
    while (size < static_cast<std::size_t>(num_sources)) size *= 4;
    for (;; size /= 4) {
      levels_.push_back(std::vector<Key>(size, kAbsent));
      if (size == 4) break;
    }
  }

  void set(int source, Key key) {
    std::size_t at = static_cast<std::size_t>(source);
    levels_[0][at] = key;
    for (std::size_t level = 1; level < levels_.size(); ++level) {
      at /= 4;
      levels_[level][at] = least(&levels_[level - 1][at * 4]);
    }
  }

  Key winner() const { return least(levels_.back().data()); }

 private:
  static Key least(const Key* keys) {
    return std::min(std::min(keys[0], keys[1]), std::min(keys[2], keys[3]));
  }

  std::vector<std::vector<Key>> levels_;
};

int bits_of(int64_t largest) {
  int bits = 0;
  while (largest >> bits != 0) ++bits;
  return bits;
}

/// Earliest deadline first; a key is a deadline and, in its low bits, the source.
template <typename Key>
void draw_by_deadline(const LeafJobs& leaf, int source_bits, std::vector<uint16_t>* drawn) {
  const uint32_t size = static_cast<uint32_t>(leaf.jobs.size());
  const int num_sources = static_cast<int>(leaf.begins.size()) - 1;
  const Key source_mask = (Key{1} << source_bits) - 1;
  Tournament<Key> tournament(num_sources);
  // Each source has at most one open or waiting job. Waiting ones are linked in a list for their
  // slot.
  std::vector<uint32_t> job(leaf.begins.begin(), leaf.begins.end() - 1);
  std::vector<uint16_t> waiting(size, kNoSource);
  std::vector<uint16_t> following(num_sources, kNoSource);
  const auto key_of = [&](int k) {
    return static_cast<Key>(Key{leaf.jobs[job[k]].deadline} << source_bits | static_cast<Key>(k));
  };
  const auto wait = [&](int k, uint32_t release) {
    if (release >= size) throw std::logic_error("blend: a job is released after its leaf");
    following[k] = waiting[release];
    waiting[release] = static_cast<uint16_t>(k);
  };
  for (int k = 0; k < num_sources; ++k) {
    if (job[k] != leaf.begins[k + 1]) wait(k, leaf.jobs[job[k]].release);
  }
  for (uint32_t slot = 0; slot < size; ++slot) {
    for (uint16_t k = waiting[slot]; k != kNoSource; k = following[k]) tournament.set(k, key_of(k));
    const Key winner = tournament.winner();
    if (winner == Tournament<Key>::kAbsent) throw std::logic_error("blend: a slot has no job");
    const int k = static_cast<int>(winner & source_mask);
    if (winner >> source_bits <= slot)
      throw std::logic_error("blend: a job is drawn after its deadline");
    (*drawn)[slot] = static_cast<uint16_t>(k);
    ++job[k];
    if (job[k] != leaf.begins[k + 1] && leaf.jobs[job[k]].release <= slot + 1) {
      tournament.set(k, key_of(k));
      continue;
    }
    tournament.set(k, Tournament<Key>::kAbsent);
    if (job[k] != leaf.begins[k + 1]) wait(k, leaf.jobs[job[k]].release);
  }
}

}  // namespace

void draw_leaf(const Quota& quota, const Boundary& left, const Boundary& right,
               std::vector<uint16_t>* drawn) {
  const LeafJobs leaf = jobs_of_leaf(quota, left, right);
  const int64_t size = right.sample - left.sample;
  drawn->resize(size);
  const int source_bits = bits_of(quota.num_sources() - 1);
  if (bits_of(size) + source_bits < 32) {
    draw_by_deadline<uint32_t>(leaf, source_bits, drawn);
  } else {
    draw_by_deadline<uint64_t>(leaf, source_bits, drawn);
  }
}

}  // namespace chatflow
