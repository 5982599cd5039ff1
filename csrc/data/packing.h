/// \file
/// Best-fit-decreasing packing of documents into samples.
/// `megatron_chatflow/native/packing.py` defines it.
#pragma once

#include <cstdint>
#include <vector>

namespace chatflow {

/// Packs documents into samples, none of which is cut.
/// \param lengths tokens in each document, 0 to `capacity`
/// \param num_documents number of lengths
/// \param capacity tokens that a sample holds, 0 to 2^31
/// \param samples out: the sample of each document, or -1 for an empty one; samples are numbered in
///   the order of their first documents
/// \throws std::invalid_argument a length or the capacity is out of range
void best_fit(const int64_t* lengths, int64_t num_documents, int64_t capacity, int64_t* samples);

}  // namespace chatflow
