/// \file
/// Rows of a batch, read from many sources into given buffers.
/// `megatron_chatflow/data/loader.py` defines it.
#pragma once

#include <cstdint>
#include <vector>

#include "samples.h"

namespace chatflow {

/// Where rows go: row-major, each row seq_length long but for the digests.
struct BatchBuffers {
  int64_t* tokens;
  int64_t* labels;
  float* loss_mask;
  int64_t* digests;  ///< two a row: BLAKE2b-128 of tokens (int32, little endian) and loss mask
};

/// Reads rows.
/// \param readers the reader of each row; all have samples of the same length
/// \param ordinals which of its reader's samples each row is
/// \param num_rows number of rows
/// \param micro_batch_size rows of a micro-batch; divides `num_rows`
/// \return cu_seqlens of each micro-batch: begins of the segments in its flattened rows, and its
/// end
/// \throws std::invalid_argument a row cannot be read
std::vector<std::vector<int32_t>> read_rows(const std::vector<const RowReader*>& readers,
                                            const int64_t* ordinals, int64_t num_rows,
                                            int64_t micro_batch_size, const BatchBuffers& buffers);

}  // namespace chatflow
