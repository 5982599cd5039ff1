/// \file
/// The draws between two neighbouring boundaries, by earliest deadline.
///
/// In: quotas and the states at both ends. Out: the source of every sample in between.
#pragma once

#include <cstdint>
#include <vector>

#include "quota.h"
#include "select.h"

namespace chatflow {

/// Draws a leaf.
///
/// Source k's draw number j may take a slot from its release, the last sample with W_k <= j, to
/// before its deadline, the first with W_k >= j + 1, both clipped to the leaf. Every slot goes to
/// the released job with the earliest deadline; of equal ones to the lowest source.
///
/// \param drawn Source of each sample from left.sample to before right.sample; resized.
/// \throws std::logic_error if a slot finds no job or a job no slot, which `select` excludes.
void draw_leaf(const Quota& quota, const Boundary& left, const Boundary& right,
               std::vector<uint16_t>* drawn);

}  // namespace chatflow
