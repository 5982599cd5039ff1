/// \file
/// The blend of one segment: the source of every sample, from any sample on.
///
/// The counts of the draws differ from the quotas by less than one sample at every prefix. The
/// draws equal those of `megatron_chatflow/blend/engine.py`, which explains the method.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "quota.h"
#include "select.h"

namespace chatflow {

/// Binary logarithm of the number of samples in the tree of a segment.
constexpr int kRootBits = 40;

/// Binary logarithm of the number of samples in a leaf.
int leaf_bits(int num_sources);

/// Draws of one segment. Memory is O(num_sources) plus one leaf. Thread-safe.
class BlendEngine {
 public:
  /// \param table The weights.
  /// \param begin The segment's first sample.
  /// \param base Quotas at `begin`, offsets included, in units of 2^-32 samples.
  /// \param counts Draws of each source before `begin`; each `base` rounded down or up.
  /// \param num_leaf_bits Binary logarithm of the leaf size, for tests; -1 uses `leaf_bits`.
  /// \throws std::invalid_argument if the arguments are inconsistent.
  BlendEngine(WeightTable table, int64_t begin, const std::vector<Int128>& base,
              const std::vector<int64_t>& counts, int num_leaf_bits);

  int num_sources() const { return quota_.num_sources(); }

  /// Draws the samples [begin, end).
  ///
  /// \param source end - begin source numbers.
  /// \param index end - begin indices, each within its source.
  void take(int64_t begin, int64_t end, int16_t* source, int64_t* index);

  /// Draws of each source before a sample; num_sources entries.
  void counts(int64_t sample, int64_t* counts);

  /// The sample at which a source is drawn for the index-th time, or -1 if it lies beyond the tree.
  ///
  /// \param index At least the source's count at the segment's begin.
  int64_t find(int source, int64_t index);

  /// Memory of the engine in bytes.
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
  /// Position within the leaf to which `counts_` belongs.
  int64_t cursor_ = 0;
  std::vector<int64_t> counts_;
};

}  // namespace chatflow
