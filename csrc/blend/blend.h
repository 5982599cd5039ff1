/// \file
/// The blend of one segment: the source of every sample, from any sample on.
///
/// In: a weight table, the segment's first sample, quotas and counts there. Out: draws whose counts
/// lie less than one sample from the quotas at every prefix, equal to those of
/// `megatron_chatflow/blend/engine.py`, which explains the method.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "quota.h"
#include "select.h"

namespace chatflow {

/// A segment's tree spans 2^40 samples.
constexpr int kRootBits = 40;

/// Binary logarithm of the number of samples in a leaf.
int leaf_bits(int num_sources);

/// Draws of one segment. Memory is O(num_sources) and one leaf; calls may come from any thread.
class BlendEngine {
 public:
  /// \param table The weights.
  /// \param begin The segment's first sample.
  /// \param base Quotas at `begin`, offsets included, in units of 2^-32 samples.
  /// \param counts Draws of each source before `begin`; each `base` rounded down or up.
  /// \param num_leaf_bits Another leaf size than the sequence's own, to test with; -1 for its own.
  /// \throws std::invalid_argument if the arguments do not fit each other.
  BlendEngine(WeightTable table, int64_t begin, const std::vector<Int128>& base,
              const std::vector<int64_t>& counts, int num_leaf_bits);

  int num_sources() const { return quota_.num_sources(); }

  /// Draws the samples [begin, end).
  ///
  /// \param source end - begin source numbers.
  /// \param index Which of its source's samples each is.
  void take(int64_t begin, int64_t end, int16_t* source, int64_t* index);

  /// Draws of each source before a sample; num_sources entries.
  void counts(int64_t sample, int64_t* counts);

  /// The sample that is the source's index-th, or -1 where the tree has none.
  ///
  /// \param index At least the source's count at the segment's begin.
  int64_t find(int source, int64_t index);

  /// Bytes that the engine holds.
  std::size_t num_bytes();

 private:
  void reset();
  void seek(int64_t sample);
  void draw_current_leaf();
  void check_range(int64_t begin, int64_t end) const;

  std::mutex mutex_;
  Quota quota_;
  int64_t leaf_size_;
  Boundary root_begin_;
  Boundary root_end_;
  /// The leaf's left boundary, and the right ends of the nodes above it, nearest last.
  Boundary left_;
  std::vector<Boundary> rights_;
  std::vector<uint16_t> drawn_;
  /// How far `counts_` has come within the leaf.
  int64_t cursor_ = 0;
  std::vector<int64_t> counts_;
};

}  // namespace chatflow
