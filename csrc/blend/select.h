/// \file
/// The state of a blend at a sample, and the rule that selects one between two others.
///
/// In: states at two boundaries that some sequence with error below 1 joins. Out: one in between
/// that is joined to both. `megatron_chatflow/blend/engine.py` says why it works.
#pragma once

#include <cstdint>
#include <vector>

#include "quota.h"

namespace chatflow {

/// Counts and quotas of every source before a sample.
struct Boundary {
  int64_t sample = 0;
  /// Draws of each source: its quota rounded down, or up.
  std::vector<int64_t> counts;
  /// The fractional part of each quota, in units of 2^-32.
  std::vector<uint32_t> fractions;
  /// Whether the count is the quota rounded up; only where there is a fraction.
  std::vector<uint8_t> is_ahead;

  int64_t floor(int k) const { return counts[k] - is_ahead[k]; }
};

/// A source whose quota at a boundary is not whole, with the window that contains the boundary.
struct Member {
  int64_t release;
  int64_t deadline;
  int source;
  uint32_t fraction;
  bool is_forced;
  bool is_barred;
};

/// How many sources may be ahead in windows that end late: a cap for every deadline.
class Caps {
 public:
  /// \param members Any order; their fractions sum to a whole number.
  explicit Caps(const std::vector<Member>& members);

  /// Takes the first free slot at or after the window's end, if there is one.
  bool admit(const Member& member);

 private:
  std::vector<int64_t> ends_;
  std::vector<int64_t> free_;
  std::vector<int> next_;
};

/// Selects the state at a sample between two boundaries.
///
/// \param left A boundary before the sample.
/// \param right A boundary after the sample; null when nothing is known there.
/// \throws std::logic_error if the boundaries are not joined by any sequence.
Boundary select(const Quota& quota, const Boundary& left, const Boundary* right, int64_t sample);

}  // namespace chatflow
