/**
 * @file emulation.h
 * @brief Runs the kernels' own sources on a CPU, thread by thread, for tests without a GPU.
 *
 * Every thread of a block is a fiber with a stack of its own. A warp runs until its threads wait
 * for the block (`__syncthreads`), as far ahead of the others as the kernel lets it, and its lanes
 * take turns in an order that changes at every shuffle. So a barrier that some thread never reaches
 * is an error, and a missing one gives wrong results. Blocks run one after another; memory is the
 * host's.
 */
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

namespace emulation {

struct Index {
  unsigned x = 0;
};

constexpr int kLaunchFailure = 719;  // cudaErrorLaunchFailure
constexpr unsigned kWarpLanes = 32;
constexpr size_t kStackBytes = 128 * 1024;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kDone;
};

/** @brief The block that runs now. */
struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t> exchanged;
  ucontext_t scheduler;
  unsigned current = 0;
  uint64_t random = 88172645463325252u;
  std::function<void()> body;
};

inline Block block;
inline Index thread_index, block_index, block_size, grid_size;

/** @brief Leaves this thread waiting; returns when what it waits for has happened. */
inline void wait(State state) {
  Fiber& fiber = block.fibers[block.current];
  fiber.state = state;
  swapcontext(&fiber.context, &block.scheduler);
}

inline void enter() {
  block.body();
  block.fibers[block.current].state = State::kDone;
}

/** @brief Xorshift (Marsaglia, 2003). */
inline uint64_t draw() {
  block.random ^= block.random << 13;
  block.random ^= block.random >> 7;
  return block.random ^= block.random << 17;
}

/** @brief Frees the threads [begin, end) if all of them wait in `state`. */
inline bool release(unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; ++i) {
    if (block.fibers[i].state != state) return false;
  }
  for (unsigned i = begin; i < end; ++i) {
    block.fibers[i].state = State::kReady;
  }
  return true;
}

/** @brief Runs a warp until its threads are done, wait for the block, or wait for each other. */
inline void run_warp(unsigned begin) {
  unsigned order[kWarpLanes];
  for (unsigned i = 0; i < kWarpLanes; ++i) order[i] = begin + i;
  do {
    for (unsigned i = kWarpLanes - 1; i > 0; --i) {
      std::swap(order[i], order[draw() % (i + 1)]);
    }
    for (unsigned number : order) {
      if (block.fibers[number].state != State::kReady) continue;
      block.current = thread_index.x = number;
      swapcontext(&block.scheduler, &block.fibers[number].context);
    }
  } while (release(begin, begin + kWarpLanes, State::kAtWarp));
}

/** @brief Runs the warps in some order as far as each gets; then frees the block's barrier. */
inline bool turn(std::vector<unsigned>& warps, unsigned num_threads) {
  for (size_t i = warps.size() - 1; i > 0; --i) {
    std::swap(warps[i], warps[draw() % (i + 1)]);
  }
  for (unsigned warp : warps) run_warp(warp * kWarpLanes);
  return release(0, num_threads, State::kAtBlock);
}

inline int run_block(unsigned number, unsigned num_threads) {
  block_index.x = number;
  for (unsigned i = 0; i < num_threads; ++i) {
    Fiber& fiber = block.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
  }
  std::vector<unsigned> warps(num_threads / kWarpLanes);
  for (unsigned i = 0; i < warps.size(); ++i) warps[i] = i;
  while (turn(warps, num_threads)) {
  }
  const auto end = block.fibers.begin() + num_threads;
  const auto is_done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
  return std::all_of(block.fibers.begin(), end, is_done) ? 0 : kLaunchFailure;
}

/** @brief Runs `body` for every thread of every block; an error where a barrier is never complete.
 */
inline int run_grid(unsigned num_blocks, unsigned num_threads, std::function<void()> body) {
  if (num_threads == 0 || num_threads > 1024 || num_threads % kWarpLanes != 0) {
    return kLaunchFailure;
  }
  if (block.fibers.size() < num_threads) {
    block.fibers = std::vector<Fiber>(num_threads);
    block.exchanged.resize(num_threads);
  }
  block.body = std::move(body);
  grid_size.x = num_blocks;
  block_size.x = num_threads;
  for (unsigned number = 0; number < num_blocks; ++number) {
    if (const int error = run_block(number, num_threads)) return error;
  }
  return 0;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

inline void __syncthreads() { emulation::wait(emulation::State::kAtBlock); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&emulation::block.exchanged[emulation::block.current], &value, sizeof(T));
  emulation::wait(emulation::State::kAtWarp);
  T other;
  std::memcpy(&other, &emulation::block.exchanged[emulation::block.current ^ distance], sizeof(T));
  emulation::wait(emulation::State::kAtWarp);
  return other;
}
