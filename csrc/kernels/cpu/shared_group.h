/// \file
/// Collectives of processes on one machine, through memory that they share.
///
/// In: a memory file that every process of a group has open, and tensors. Out: sums, highest
/// values or all parts of them in every process, the same bits in each: sums are taken in fp32 in
/// the order of ranks and rounded once.
///
/// Every process copies a chunk of its tensor into its own area, says so by a counter, and reads
/// the others' areas once their counters say the same. An area holds two chunks in turn, so that
/// nobody waits for readers: a counter that has reached chunk k says as well that its process has
/// read all of chunk k - 1. A tensor is cut over lanes, one a thread, each with its own counters.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace chatflow::cpu {

class SharedGroup {
 public:
  /// Bytes that the memory file has to have.
  static std::int64_t num_bytes(int size, int lanes);

  /// Maps the file and marks this process as living, by a lock on byte `rank` of the file, which
  /// the system takes away when the process ends, however it ends.
  /// \param file closed by the destructor, and on failure; nothing else in this process may open it
  /// \param lanes threads of each process; the same in all
  /// \param timeout_seconds how long a process that lives is waited for
  /// \throws std::runtime_error the file cannot be mapped or locked
  SharedGroup(int file, int rank, int size, int lanes, double timeout_seconds);
  ~SharedGroup();
  SharedGroup(const SharedGroup&) = delete;
  SharedGroup& operator=(const SharedGroup&) = delete;

  // Every process of the group calls these in the same order with the same sizes.
  // All throw std::runtime_error: a process has ended, came with another collective, or did not
  // come in time. After that the group is of no more use, and says so.

  /// Overwrites `values` by the sum or the highest over the group.
  void all_reduce(void* values, std::int64_t count, Element element, Reduction reduction);
  /// `output` becomes the inputs of all ranks, one after another.
  void all_gather(const void* input, void* output, std::int64_t bytes);
  /// `output` becomes part `rank` of the reduced inputs.
  /// \param count elements of `output`; `input` has as many for each rank
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
  std::vector<std::uint64_t> num_chunks_;  // by lane; this process's own counters
  const char* broken_ = nullptr;
};

}  // namespace chatflow::cpu
