/// \file
/// Collectives between processes of one machine through shared memory.
///
/// Results are bitwise identical in all processes: sums are computed in fp32 in rank order and
/// rounded once.
///
/// Each process copies a chunk of its tensor into its own area, increments its counter, waits for
/// the counters of all other processes, and reads their areas. Areas are double-buffered and
/// writers never wait for readers: a counter that has reached chunk k also means that its process
/// has finished reading chunk k - 1. A tensor is split over lanes, one per thread, and each lane
/// has its own counters.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace chatflow::cpu {

class SharedGroup {
 public:
  /// Size of the shared memory file in bytes.
  static std::int64_t num_bytes(int size, int lanes);

  /// Maps the file and locks byte `rank` of it. The kernel releases the lock when the process
  /// ends for any reason, which is how other processes detect that.
  /// \param file owned descriptor; no other descriptor of this process may refer to the file
  /// \param lanes threads per process; equal in all processes
  /// \param timeout_seconds maximum wait for a process that is alive
  /// \throws std::runtime_error the file cannot be mapped or locked
  SharedGroup(int file, int rank, int size, int lanes, double timeout_seconds);
  ~SharedGroup();
  SharedGroup(const SharedGroup&) = delete;
  SharedGroup& operator=(const SharedGroup&) = delete;

  // All processes of the group call these in the same order with the same sizes. They throw
  // std::runtime_error if a process has ended, calls another collective, or times out. After an
  // error every further call throws.

  /// Overwrites `values` with the sum or maximum over the group.
  void all_reduce(void* values, std::int64_t count, Element element, Reduction reduction);
  /// Concatenates the inputs of all ranks in `output`.
  void all_gather(const void* input, void* output, std::int64_t bytes);
  /// Writes shard `rank` of the reduced inputs to `output`.
  /// \param count elements of `output`; `input` has `count` elements for each rank
  void reduce_scatter(const void* input, void* output, std::int64_t count, Element element,
                      Reduction reduction);

 private:
  struct Slot;
  enum class Outcome { kDone, kLeft, kOther, kLate };

  Slot& slot(int rank, int lane) const;
  char* area(int rank, int lane, std::uint64_t chunk) const;
  bool lives(int rank) const;
  Outcome wait(int rank, int lane) const;
  template <typename Work>
  Outcome run_chunks(int lane, std::int64_t count, std::int64_t chunk, const Work& work);
  template <typename Work>
  void run(std::uint64_t kind, std::int64_t count, std::int64_t chunk, const Work& work);

  int file_, rank_, size_, lanes_;
  double timeout_seconds_;
  char* memory_ = nullptr;
  std::uint64_t num_collectives_ = 0, signature_ = 0;
  std::vector<std::uint64_t> num_chunks_;  // per lane, of this process
  const char* broken_ = nullptr;
};

}  // namespace chatflow::cpu
