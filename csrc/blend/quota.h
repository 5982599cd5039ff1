/// \file
/// Quotas of a piecewise linear weight schedule in closed form, and their inverses.
///
/// The input is a table of cumulative weight levels on a grid of 2^32: rows at knots, and intervals
/// that are linear between two rows. The quota W_k(i) is the sum of source k's weights over the
/// samples before i. It is computed for any sample in O(log) time. The reference that defines every
/// number is `megatron_chatflow/blend/quota.py`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace chatflow {

__extension__ typedef __int128 Int128;
__extension__ typedef unsigned __int128 UInt128;

constexpr int kGridBits = 32;
/// The sum of all weights of one sample.
constexpr int64_t kGrid = int64_t{1} << kGridBits;
/// A sample number that no run reaches.
constexpr int64_t kNever = int64_t{1} << 62;

/// Iterations on which every level is linear, up to the begin of the next interval.
///
/// At iteration t a level is a + floor((e - a) * (step * (t - begin) + phase) / span), where a and
/// e lie between two rows of the table at the given portions of 2^32, rounded down.
struct Interval {
  int64_t begin;
  int64_t row_begin;
  int64_t row_end;
  int64_t portion_begin;
  int64_t portion_end;
  int64_t step;
  int64_t phase;
  int64_t span;

  bool is_constant() const { return row_begin == row_end; }
};

/// Every weight of a schedule on a grid of iterations.
struct WeightTable {
  /// The sample with which iteration 0 begins.
  int64_t origin;
  /// Samples that have the same weights.
  int64_t samples_per_iteration;
  int num_sources;
  /// Rows of num_sources + 1 cumulative levels, each rising from 0 to 2^32.
  std::vector<int64_t> levels;
  /// The first begins at iteration 0; the last is constant and never ends.
  std::vector<Interval> intervals;

  /// \throws std::invalid_argument if the table violates an assumption of the arithmetic.
  void check() const;
};

/// A level along one interval: begin + floor(rise * place / span).
struct Line {
  int64_t begin;
  int64_t rise;
};

/// A sample, with the iteration and interval that contain it.
struct Place {
  int64_t sample;
  int64_t iteration;
  int interval;
};

/// Quotas from a given first sample on, in units of 2^-32 samples.
class Quota {
 public:
  /// \param table The weights.
  /// \param begin The first sample counted; at least table.origin.
  /// \param base W_k(begin) for every source.
  /// \throws std::invalid_argument if `WeightTable::check` does, or an argument is out of range.
  Quota(WeightTable table, int64_t begin, const std::vector<Int128>& base);

  int num_sources() const { return table_.num_sources; }
  const WeightTable& table() const { return table_; }

  /// The iteration and interval of a sample.
  Place place_of(int64_t sample) const;

  /// W_k(sample) of every source, into `quotas`, which has num_sources entries.
  void quotas_at(const Place& place, Int128* quotas) const;

  /// The least sample i of [from, limit] with W_k(i) - W_k(from) >= need, or limit.
  ///
  /// \param at W_k(from).
  /// \param need From 1 to 2^32.
  int64_t forward(int k, const Place& from, Int128 at, int64_t need, int64_t limit) const;

  /// The least sample i of [limit, from] with W_k(from) - W_k(i) <= spare.
  ///
  /// \param at W_k(from).
  /// \param spare From 0 to 2^32 - 1; less than W_k(from) - W_k(limit).
  int64_t backward(int k, const Place& from, Int128 at, int64_t spare, int64_t limit) const;

  /// The line of level k (0 to num_sources) along an interval.
  Line line_of(int interval, int k) const;

  /// The first sample of an interval.
  int64_t interval_begin(int interval) const { return sample_of(table_.intervals[interval].begin); }

  /// The first sample after an interval; kNever for the last.
  int64_t interval_end(int interval) const {
    return interval + 1 < num_intervals() ? interval_begin(interval + 1) : kNever;
  }

  int num_intervals() const { return static_cast<int>(table_.intervals.size()); }

  /// Memory of the quotas in bytes.
  std::size_t num_bytes() const;

 private:
  int64_t sample_of(int64_t iteration) const {
    return table_.origin + iteration * table_.samples_per_iteration;
  }
  int64_t level_at(int interval, const Line& line, int64_t iteration) const;
  int64_t weight_at(int interval, int k, int64_t iteration) const;
  Int128 interval_sum(int interval, int k, int64_t num_iterations) const;
  UInt128 sum_before(int interval, int k) const;
  Int128 quota_at_interval(int interval, int k) const;
  Int128 quota_at_iteration(int interval, int k, int64_t iteration) const;
  int last_interval_below(int k, Int128 target, int low, int high) const;
  int64_t search_ramp(int interval, int k, Int128 target, int64_t low, int64_t high) const;

  WeightTable table_;
  std::vector<Int128> base_;
  /// Sums of each level over all iterations before each interval, and their upper halves if needed.
  std::vector<uint64_t> sums_low_;
  std::vector<uint64_t> sums_high_;
  /// Whether every product of an interval fits into 64 bits.
  std::vector<uint8_t> is_narrow_;
};

}  // namespace chatflow
