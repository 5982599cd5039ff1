/// \file
/// The jobs of a leaf: when each draw may happen.
///
/// Given the quotas and the states at both ends of a leaf, computes the release and the deadline of
/// every draw in it.
#pragma once

#include <cstdint>
#include <vector>

#include "quota.h"
#include "select.h"

namespace chatflow {

/// A draw that is allowed in the slots [release, deadline), counted from the leaf's first sample.
struct Job {
  uint32_t release;
  uint32_t deadline;
};

/// All draws of a leaf, source after source, each source's in order.
struct LeafJobs {
  std::vector<Job> jobs;
  /// Where each source's jobs begin; num_sources + 1 entries.
  std::vector<uint32_t> begins;
};

/// Finds the jobs of a leaf: a constant number of operations for each job and each iteration.
///
/// \throws std::logic_error if the counts at the ends do not add up to the leaf's size.
LeafJobs jobs_of_leaf(const Quota& quota, const Boundary& left, const Boundary& right);

}  // namespace chatflow
