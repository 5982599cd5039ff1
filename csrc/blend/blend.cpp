#include "blend.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "leaf.h"

namespace chatflow {
namespace {

/// The state at the begin of a segment.
Boundary first_boundary(int64_t begin, const std::vector<Int128>& base,
                        const std::vector<int64_t>& counts) {
  if (counts.size() != base.size())
    throw std::invalid_argument("blend: expected one count per source");
  Boundary first;
  first.sample = begin;
  first.counts = counts;
  Int128 excess = 0;
  for (std::size_t k = 0; k < base.size(); ++k) {
    const Int128 ahead = counts[k] - (base[k] >> kGridBits);
    first.fractions.push_back(static_cast<uint32_t>(base[k]));
    first.is_ahead.push_back(ahead == 1);
    excess += (static_cast<Int128>(counts[k]) << kGridBits) - base[k];
    if (ahead != 0 && !(ahead == 1 && first.fractions[k] != 0)) {
      throw std::invalid_argument("blend: a count must be its quota rounded down or up");
    }
  }
  if (excess != 0) throw std::invalid_argument("blend: the sums of counts and quotas differ");
  return first;
}

std::size_t bytes_of(const Boundary& boundary) {
  return boundary.counts.capacity() * sizeof(int64_t) +
         boundary.fractions.capacity() * sizeof(uint32_t) + boundary.is_ahead.capacity();
}

}  // namespace

int leaf_bits(int num_sources) {
  if (num_sources <= 128) return 14;
  return num_sources <= 2048 ? 16 : 20;
}

BlendEngine::BlendEngine(WeightTable table, int64_t begin, const std::vector<Int128>& base,
                         const std::vector<int64_t>& counts, int num_leaf_bits)
    : quota_(std::move(table), begin, base),
      leaf_size_(
          int64_t{1} << (num_leaf_bits < 0 ? leaf_bits(quota_.num_sources()) : num_leaf_bits)),
      root_begin_(first_boundary(begin, base, counts)) {
  if (num_leaf_bits > 20) throw std::invalid_argument("blend: num_leaf_bits must be at most 20");
  root_end_ = select(quota_, root_begin_, nullptr, begin + (int64_t{1} << kRootBits));
  reset();
}

void BlendEngine::take(int64_t begin, int64_t end, int16_t* source, int64_t* index) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_range(begin, end);
  while (begin < end) {
    seek(begin);
    const int64_t from = begin - left_.sample;
    if (from < cursor_) {
      counts_ = left_.counts;
      cursor_ = 0;
    }
    for (; cursor_ < from; ++cursor_) ++counts_[drawn_[cursor_]];
    const int64_t stop = std::min<int64_t>(end - left_.sample, drawn_.size());
    for (; cursor_ < stop; ++cursor_) {
      const uint16_t k = drawn_[cursor_];
      *source++ = static_cast<int16_t>(k);
      *index++ = counts_[k]++;
    }
    begin = left_.sample + stop;
  }
}

void BlendEngine::counts(int64_t sample, int64_t* counts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_range(sample, sample);
  if (sample == root_end_.sample) {
    std::copy(root_end_.counts.begin(), root_end_.counts.end(), counts);
    return;
  }
  seek(sample);
  std::copy(left_.counts.begin(), left_.counts.end(), counts);
  for (int64_t slot = 0; slot < sample - left_.sample; ++slot) ++counts[drawn_[slot]];
}

int64_t BlendEngine::find(int source, int64_t index) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (source < 0 || source >= num_sources() || index < root_begin_.counts[source]) {
    throw std::invalid_argument("blend: the draw does not lie in this segment");
  }
  if (root_end_.counts[source] <= index) return -1;
  reset();
  while (rights_.back().sample - left_.sample > leaf_size_) {
    const int64_t middle = left_.sample + (rights_.back().sample - left_.sample) / 2;
    Boundary boundary = select(quota_, left_, &rights_.back(), middle);
    if (boundary.counts[source] > index) {
      rights_.push_back(std::move(boundary));
    } else {
      left_ = std::move(boundary);
    }
  }
  draw_current_leaf();
  int64_t missing = index - left_.counts[source];
  int64_t slot = 0;
  while (drawn_[slot] != source || missing-- > 0) ++slot;
  return left_.sample + slot;
}

std::size_t BlendEngine::num_bytes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t bytes = sizeof(*this) + quota_.num_bytes() + drawn_.capacity() * sizeof(uint16_t) +
                      counts_.capacity() * sizeof(int64_t) + bytes_of(left_) +
                      bytes_of(root_begin_) + bytes_of(root_end_);
  for (const Boundary& right : rights_) bytes += sizeof(right) + bytes_of(right);
  return bytes;
}

/// Discards the current leaf, so that the next `seek` starts at the root.
void BlendEngine::reset() {
  left_ = root_begin_;
  rights_.assign(1, root_end_);
  drawn_.clear();
  counts_ = left_.counts;
  cursor_ = 0;
}

/// Moves to the leaf that contains a sample.
void BlendEngine::seek(int64_t sample) {
  if (sample < left_.sample) reset();
  if (sample < left_.sample + static_cast<int64_t>(drawn_.size())) return;
  while (rights_.back().sample <= sample) {
    left_ = std::move(rights_.back());
    rights_.pop_back();
  }
  while (rights_.back().sample - left_.sample > leaf_size_) {
    const int64_t middle = left_.sample + (rights_.back().sample - left_.sample) / 2;
    Boundary boundary = select(quota_, left_, &rights_.back(), middle);
    if (sample < middle) {
      rights_.push_back(std::move(boundary));
    } else {
      left_ = std::move(boundary);
    }
  }
  draw_current_leaf();
}

void BlendEngine::draw_current_leaf() {
  drawn_.clear();  // so that no stale draws remain if `draw_leaf` throws
  draw_leaf(quota_, left_, rights_.back(), &drawn_);
  counts_ = left_.counts;
  cursor_ = 0;
}

void BlendEngine::check_range(int64_t begin, int64_t end) const {
  if (begin < root_begin_.sample || begin > end || end > root_end_.sample) {
    throw std::invalid_argument("blend: samples lie outside the segment's tree");
  }
}

}  // namespace chatflow
