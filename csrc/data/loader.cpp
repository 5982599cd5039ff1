#include "loader.h"

#include <array>
#include <cstring>

#include "blake2b.h"

namespace chatflow {
namespace {

void write_row(const Row& row, size_t seq_length, int64_t number, const BatchBuffers& buffers) {
  const size_t first = static_cast<size_t>(number) * seq_length;
  const int32_t* tokens = row.tokens;
  for (size_t k = 0; k < seq_length; ++k) buffers.tokens[first + k] = tokens[k];
  for (size_t k = 0; k < seq_length; ++k) buffers.labels[first + k] = tokens[k + 1];
  const uint8_t* loss_mask = row.loss_mask + 1;
  for (size_t k = 0; k < seq_length; ++k) buffers.loss_mask[first + k] = loss_mask[k];
  Blake2b128 hash;
  hash.update(tokens, (seq_length + 1) * sizeof(int32_t));
  hash.update(loss_mask, seq_length);
  std::array<uint8_t, 16> digest;
  hash.finish(digest.data());
  std::memcpy(buffers.digests + 2 * number, digest.data(), digest.size());
}

}  // namespace

std::vector<std::vector<int32_t>> read_rows(const std::vector<const RowReader*>& readers,
                                            const int64_t* ordinals, int64_t num_rows,
                                            int64_t micro_batch_size, const BatchBuffers& buffers) {
  std::vector<std::vector<int32_t>> segments;
  std::vector<int32_t> tokens;
  std::vector<uint8_t> loss_mask;
  Row row{};
  for (int64_t number = 0; number < num_rows; ++number) {
    readers[static_cast<size_t>(number)]->prefetch(ordinals[number], &row);
  }
  for (int64_t number = 0; number < num_rows; ++number) {
    const RowReader& reader = *readers[static_cast<size_t>(number)];
    const auto seq_length = static_cast<size_t>(reader.shape().seq_length);
    tokens.resize(seq_length + 1);
    loss_mask.resize(seq_length + 1);
    row.tokens = tokens.data();
    row.loss_mask = loss_mask.data();
    reader.read(ordinals[number], &row);
    write_row(row, seq_length, number, buffers);
    const int64_t place = number % micro_batch_size;
    if (place == 0) segments.emplace_back(1, 0);
    std::vector<int32_t>& cu_seqlens = segments.back();
    const auto shift = static_cast<int32_t>(place * reader.shape().seq_length);
    // The begin of a row equals the end of the previous one, which the list already contains.
    for (size_t k = 1; k < row.cu_seqlens.size(); ++k) {
      cu_seqlens.push_back(shift + row.cu_seqlens[k]);
    }
  }
  return segments;
}

}  // namespace chatflow
