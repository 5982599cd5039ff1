/// \file
/// Reads the rows of a batch from several sources into given buffers.
/// The reference is `megatron_chatflow/data/loader.py`.
#pragma once

#include <cstdint>
#include <vector>

#include "samples.h"

namespace chatflow {

/// Output buffers in row-major order; each row has seq_length entries, except for the digests.
struct BatchBuffers {
  int64_t* tokens;
  int64_t* labels;
  float* loss_mask;
  int64_t* digests;  ///< two per row: BLAKE2b-128 of tokens (int32, little endian) and loss mask
};

/// Reads rows.
/// \param readers the reader of each row; all have samples of the same length
/// \param ordinals the number of each row's sample in its reader
/// \param num_rows number of rows
/// \param micro_batch_size rows of a micro-batch; divides `num_rows`
/// \return cu_seqlens of each micro-batch: the begin of each segment in its flattened rows, and the
/// end of the last one
/// \throws std::invalid_argument a row cannot be read
std::vector<std::vector<int32_t>> read_rows(const std::vector<const RowReader*>& readers,
                                            const int64_t* ordinals, int64_t num_rows,
                                            int64_t micro_batch_size, const BatchBuffers& buffers);

}  // namespace chatflow
