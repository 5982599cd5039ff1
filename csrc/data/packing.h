/// \file
/// Best-fit-decreasing packing of documents into samples.
/// The reference is `megatron_chatflow/data/packing.py`.
#pragma once

#include <cstdint>

namespace chatflow {

/// Assigns whole documents to samples.
///
/// Works in place: besides the caller's array, it needs one item per document and one per sample.
/// \tparam Item int32_t, or int64_t if the capacity or the number of documents requires it
/// \param lengths in: tokens in each document, 0 to `capacity`; out: its sample, or -1 if it is
///   empty; samples are numbered in the order of their first documents
/// \param num_documents number of lengths
/// \param capacity tokens that a sample holds, 0 to 2^31
/// \return the number of samples
/// \throws std::invalid_argument a length or the capacity is out of range
template <typename Item>
int64_t best_fit(Item* lengths, int64_t num_documents, int64_t capacity);

/// Lists the documents of every sample in ascending order.
/// \param samples the sample of each document, or -1 for none
/// \param num_documents number of entries in `samples`
/// \param num_samples number of samples; all entries of `samples` are smaller
/// \param offsets out: num_samples + 1 entries, the begin of each sample in `documents`
/// \param documents out: one entry for each document that has a sample
template <typename Item>
void group_by_sample(const Item* samples, int64_t num_documents, int64_t num_samples,
                     int64_t* offsets, int64_t* documents);

}  // namespace chatflow
