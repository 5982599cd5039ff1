/// \file
/// Implementation of `shared_group.h`.
#include "shared_group.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

namespace chatflow::cpu {
namespace {

/// The first bytes hold the locks and the data of the process that creates the file.
constexpr std::int64_t kHeaderBytes = 4096;
/// Small enough that the chunks of two processes stay in the cache.
constexpr std::int64_t kChunkBytes = 1 << 18;
constexpr std::int64_t kSlotBytes = 256;

constexpr int kNumSpins = 2000;
constexpr double kYieldSeconds = 5e-3;
constexpr long kNapNanoseconds = 100000;
constexpr int kNapsBetweenLooks = 500;

using Clock = std::chrono::steady_clock;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::int64_t element_bytes(Element element) { return element == Element::kBf16 ? 2 : 4; }

}  // namespace

/// State that one lane of a process publishes to the others. Counters are 128 bytes apart because
/// processors prefetch pairs of cache lines.
struct SharedGroup::Slot {
  std::atomic<std::uint64_t> arrived;        // chunks published since the group was created
  alignas(128) std::uint64_t signatures[2];  // of the current and the previous collective
};

std::int64_t SharedGroup::num_bytes(int size, int lanes) {
  return kHeaderBytes + std::int64_t(size) * lanes * (kSlotBytes + 2 * kChunkBytes);
}

SharedGroup::SharedGroup(int file, int rank, int size, int lanes, double timeout_seconds)
    : file_(file),
      rank_(rank),
      size_(size),
      lanes_(lanes),
      timeout_seconds_(timeout_seconds),
      num_chunks_(lanes, 0) {
  static_assert(sizeof(Slot) <= kSlotBytes);
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
  void* memory = mmap(nullptr, num_bytes(size, lanes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  if (memory == MAP_FAILED || fcntl(file, F_SETLK, &lock) != 0) {
    const std::string reason = std::strerror(errno);
    if (memory != MAP_FAILED) munmap(memory, num_bytes(size, lanes));
    close(file);
    throw std::runtime_error("shared memory: " + reason);
  }
  memory_ = static_cast<char*>(memory);
}

SharedGroup::~SharedGroup() {
  munmap(memory_, num_bytes(size_, lanes_));
  close(file_);
}

SharedGroup::Slot& SharedGroup::slot(int rank, int lane) const {
  return *reinterpret_cast<Slot*>(memory_ + kHeaderBytes + (rank * lanes_ + lane) * kSlotBytes);
}

char* SharedGroup::area(int rank, int lane, std::uint64_t chunk) const {
  const std::int64_t number = 2 * (std::int64_t(rank) * lanes_ + lane) + (chunk & 1);
  return memory_ + kHeaderBytes + std::int64_t(size_) * lanes_ * kSlotBytes + number * kChunkBytes;
}

bool SharedGroup::lives(int rank) const {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(file_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

/// Waits until a process has published the current chunk of a lane: spins first, then yields the
/// core, which the other process may need, then sleeps. The timeout counts sleeps of bounded length
/// instead of wall time, so that suspending the whole job does not expire it.
SharedGroup::Outcome SharedGroup::wait(int rank, int lane) const {
  const Slot& other = slot(rank, lane);
  const std::uint64_t wanted = num_chunks_[lane];
  auto has_arrived = [&] { return other.arrived.load(std::memory_order_acquire) >= wanted; };
  auto outcome = [&] {
    return other.signatures[num_collectives_ & 1] == signature_ ? Outcome::kDone : Outcome::kOther;
  };
  for (int i = 0; i < kNumSpins; ++i) {
    if (has_arrived()) return outcome();
    pause_briefly();
  }
  const auto begin = Clock::now();
  while (std::chrono::duration<double>(Clock::now() - begin).count() < kYieldSeconds) {
    if (has_arrived()) return outcome();
    sched_yield();
  }
  double waited = 0.0;
  for (int naps = 0; waited < timeout_seconds_; ++naps) {
    if (has_arrived()) return outcome();
    // Check once more: the process may have published the chunk before it ended.
    if (naps % kNapsBetweenLooks == 0 && !lives(rank)) {
      return has_arrived() ? outcome() : Outcome::kLeft;
    }
    const auto nap_begin = Clock::now();
    const timespec nap{0, kNapNanoseconds};
    nanosleep(&nap, nullptr);
    waited += std::min(std::chrono::duration<double>(Clock::now() - nap_begin).count(), 0.01);
  }
  return Outcome::kLate;
}

/// Calls `work(begin, end, chunk, is_filling)` twice for each chunk of a lane's share of `count`:
/// to fill this process's area, and after all processes have published the chunk.
template <typename Work>
SharedGroup::Outcome SharedGroup::run_chunks(int lane, std::int64_t count, std::int64_t chunk,
                                             const Work& work) {
  // Shares begin at multiples of a sixteenth of a chunk, so that lanes do not share cache lines.
  const std::int64_t grain = chunk / 16;
  const std::int64_t grains = (count + grain - 1) / grain;
  const std::int64_t first = std::min(count, grains * lane / lanes_ * grain);
  const std::int64_t last = std::min(count, grains * (lane + 1) / lanes_ * grain);
  std::int64_t begin = first;
  do {  // an empty share also runs once, to compare signatures
    const std::int64_t end = std::min(last, begin + chunk);
    const std::uint64_t number = ++num_chunks_[lane];
    work(lane, begin, end, number, true);
    slot(rank_, lane).arrived.store(number, std::memory_order_release);
    for (int rank = 0; rank < size_; ++rank) {
      if (rank == rank_) continue;
      const Outcome outcome = wait(rank, lane);
      if (outcome != Outcome::kDone) return outcome;
    }
    work(lane, begin, end, number, false);
    begin = end;
  } while (begin < last);
  return Outcome::kDone;
}

template <typename Work>
void SharedGroup::run(std::uint64_t kind, std::int64_t count, std::int64_t chunk,
                      const Work& work) {
  if (broken_ != nullptr) throw std::runtime_error(broken_);
  ++num_collectives_;
  signature_ = (std::uint64_t(count) << 8) | kind;
  for (int lane = 0; lane < lanes_; ++lane) {
    slot(rank_, lane).signatures[num_collectives_ & 1] = signature_;
  }
  std::vector<Outcome> outcomes(lanes_, Outcome::kDone);
#pragma omp parallel for num_threads(lanes_) schedule(static, 1)
  for (int lane = 0; lane < lanes_; ++lane) outcomes[lane] = run_chunks(lane, count, chunk, work);
  for (Outcome outcome : outcomes) {
    if (outcome == Outcome::kLeft) {
      broken_ = "a process of this group has ended, so its collectives cannot go on";
    } else if (outcome == Outcome::kLate) {
      broken_ = "a process of this group did not come to a collective in time";
    } else if (outcome == Outcome::kOther) {
      broken_ = "the processes of this group came with different collectives or sizes";
    }
  }
  if (broken_ != nullptr) throw std::runtime_error(broken_);
}

void SharedGroup::all_reduce(void* values, std::int64_t count, Element element,
                             Reduction reduction) {
  const std::int64_t width = element_bytes(element);
  char* own = static_cast<char*>(values);
  auto work = [&](int lane, std::int64_t begin, std::int64_t end, std::uint64_t number,
                  bool is_filling) {
    if (is_filling) {
      std::memcpy(area(rank_, lane, number), own + begin * width, (end - begin) * width);
      return;
    }
    const void* inputs[kMaxInputs];
    for (int rank = 0; rank < size_; ++rank) inputs[rank] = area(rank, lane, number);
    inputs[rank_] = own + begin * width;
    kernels().reduce(Reduce{inputs, size_, own + begin * width, element, reduction}, 0,
                     end - begin);
  };
  run(1 + 2 * std::uint64_t(element) + 4 * std::uint64_t(reduction), count, kChunkBytes / width,
      work);
}

void SharedGroup::all_gather(const void* input, void* output, std::int64_t bytes) {
  const char* own = static_cast<const char*>(input);
  char* all = static_cast<char*>(output);
  run(16, bytes, kChunkBytes,
      [&](int lane, std::int64_t begin, std::int64_t end, std::uint64_t number, bool is_filling) {
        if (is_filling) {
          std::memcpy(area(rank_, lane, number), own + begin, end - begin);
          return;
        }
        for (int rank = 0; rank < size_; ++rank) {
          const char* from = rank == rank_ ? own + begin : area(rank, lane, number);
          std::memmove(all + rank * bytes + begin, from, end - begin);
        }
      });
}

void SharedGroup::reduce_scatter(const void* input, void* output, std::int64_t count,
                                 Element element, Reduction reduction) {
  const std::int64_t width = element_bytes(element);
  // An area holds one cache-line-aligned shard per rank.
  const std::int64_t chunk = kChunkBytes / size_ / 1024 * 1024 / width;
  const char* own = static_cast<const char*>(input);
  auto work = [&](int lane, std::int64_t begin, std::int64_t end, std::uint64_t number,
                  bool is_filling) {
    if (is_filling) {
      for (int rank = 0; rank < size_; ++rank) {
        if (rank == rank_) continue;
        std::memcpy(area(rank_, lane, number) + rank * chunk * width,
                    own + (rank * count + begin) * width, (end - begin) * width);
      }
      return;
    }
    const void* inputs[kMaxInputs];
    for (int rank = 0; rank < size_; ++rank) {
      inputs[rank] = area(rank, lane, number) + rank_ * chunk * width;
    }
    inputs[rank_] = own + (rank_ * count + begin) * width;
    void* to = static_cast<char*>(output) + begin * width;
    kernels().reduce(Reduce{inputs, size_, to, element, reduction}, 0, end - begin);
  };
  run(32 + 2 * std::uint64_t(element) + 4 * std::uint64_t(reduction), count, chunk, work);
}

}  // namespace chatflow::cpu
