/// \file
/// The state of a blend at a sample, and the rule that selects one between two others.
///
/// If a sequence with error below 1 connects the states at two boundaries, the selected state in
/// between is connected to both. `megatron_chatflow/blend/engine.py` explains why.
#pragma once

#include <cstdint>
#include <vector>

#include "quota.h"

namespace chatflow {

/// Counts and quotas of every source before a sample.
struct Boundary {
  int64_t sample = 0;
  /// Number of draws of each source: its quota, rounded down or up.
  std::vector<int64_t> counts;
  /// The fractional part of each quota, in units of 2^-32.
  std::vector<uint32_t> fractions;
  /// Whether the count is the quota rounded up; false if the quota is a whole number.
  std::vector<uint8_t> is_ahead;

  int64_t floor(int k) const { return counts[k] - is_ahead[k]; }
};

/// A source whose quota at a boundary is not a whole number, and the window around the boundary.
struct Member {
  int64_t release;
  int64_t deadline;
  int source;
  uint32_t fraction;
  bool is_forced;
  bool is_barred;
};

/// Limits the number of sources that are ahead in windows that end late, by one cap per deadline.
class Caps {
 public:
  /// \param members In any order; the sum of their fractions is a whole number.
  explicit Caps(const std::vector<Member>& members);

  /// Takes the first free slot at or after the end of the member's window.
  ///
  /// \return Whether there was one.
  bool admit(const Member& member);

 private:
  std::vector<int64_t> ends_;
  std::vector<int64_t> free_;
  std::vector<int> next_;
};

/// Selects the state at a sample between two boundaries.
///
/// \param left A boundary before the sample.
/// \param right A boundary after the sample; null if there is none.
/// \throws std::logic_error if no sequence connects the boundaries.
Boundary select(const Quota& quota, const Boundary& left, const Boundary* right, int64_t sample);

}  // namespace chatflow
