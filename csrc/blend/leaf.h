/// \file
/// The source of every sample between two neighbouring boundaries, by earliest deadline first.
#pragma once

#include <cstdint>
#include <vector>

#include "quota.h"
#include "select.h"

namespace chatflow {

/// Draws a leaf.
///
/// Draw j of source k is allowed in the slots from its release (the last sample with W_k <= j) to
/// before its deadline (the first sample with W_k >= j + 1), both clipped to the leaf. Each slot is
/// assigned to the released job with the earliest deadline; ties go to the lowest source number.
///
/// \param drawn Source of each sample from left.sample to before right.sample; resized.
/// \throws std::logic_error if a slot has no job or a job has no slot, which `select` rules out.
void draw_leaf(const Quota& quota, const Boundary& left, const Boundary& right,
               std::vector<uint16_t>* drawn);

}  // namespace chatflow
