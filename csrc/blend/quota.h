/// \file
/// Quotas of a piecewise linear weight schedule in closed form, and their inverses.
///
/// In: cumulative weight levels on a grid of 2^32, as knot rows and linear pieces. Out: the quota
/// W_k(i), the sum of source k's weights over the samples before i, anywhere in O(log) time.
/// `megatron_chatflow/blend/quota.py` defines every number here.
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
/// A sample number beyond every run.
constexpr int64_t kNever = int64_t{1} << 62;

/// One linear piece of the levels, up to the iteration at which the next piece begins.
///
/// At iteration t a level is a + floor((e - a) * (step * (t - begin) + phase) / span), where a and
/// e lie between two rows of the table at the given portions of 2^32, rounded down.
struct Piece {
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
  /// Samples that share one evaluation of the weights.
  int64_t samples_per_iteration;
  int num_sources;
  /// Rows of num_sources + 1 cumulative levels, each rising from 0 to 2^32.
  std::vector<int64_t> levels;
  /// The first begins at iteration 0; the last is constant and never ends.
  std::vector<Piece> pieces;

  /// \throws std::invalid_argument if the table breaks a rule that the arithmetic relies on.
  void check() const;
};

/// A level along one piece: begin + floor(rise * place / span).
struct Line {
  int64_t begin;
  int64_t rise;
};

/// A sample, with the iteration and piece that contain it.
struct Place {
  int64_t sample;
  int64_t iteration;
  int piece;
};

/// Quotas from one sample on, in units of 2^-32 samples.
class Quota {
 public:
  /// \param table The weights.
  /// \param begin The first sample counted; at least table.origin.
  /// \param base W_k(begin) for every source.
  /// \throws std::invalid_argument as WeightTable::check.
  Quota(WeightTable table, int64_t begin, const std::vector<Int128>& base);

  int num_sources() const { return table_.num_sources; }
  const WeightTable& table() const { return table_; }

  /// The iteration and piece of a sample.
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

  /// The line of level k (0 to num_sources) along a piece.
  Line line_of(int piece, int k) const;

  /// The first sample of a piece.
  int64_t piece_sample(int piece) const { return sample_of(table_.pieces[piece].begin); }

  /// The first sample after a piece; kNever for the last.
  int64_t piece_end(int piece) const {
    return piece + 1 < num_pieces() ? piece_sample(piece + 1) : kNever;
  }

  int num_pieces() const { return static_cast<int>(table_.pieces.size()); }

  /// Bytes that the quotas hold.
  std::size_t num_bytes() const;

 private:
  int64_t sample_of(int64_t iteration) const {
    return table_.origin + iteration * table_.samples_per_iteration;
  }
  int64_t level_at(int piece, const Line& line, int64_t iteration) const;
  int64_t weight_at(int piece, int k, int64_t iteration) const;
  Int128 piece_sum(int piece, int k, int64_t num_iterations) const;
  UInt128 sum_before(int piece, int k) const;
  Int128 at_piece(int piece, int k) const;
  Int128 at_iteration(int piece, int k, int64_t iteration) const;
  int last_piece_below(int k, Int128 target, int low, int high) const;
  int64_t search_ramp(int piece, int k, Int128 target, int64_t low, int64_t high) const;

  WeightTable table_;
  std::vector<Int128> base_;
  /// Sums of each level over all iterations before each piece, and their upper halves if needed.
  std::vector<uint64_t> sums_low_;
  std::vector<uint64_t> sums_high_;
  /// Whether 64 bits hold every product of a piece.
  std::vector<uint8_t> is_narrow_;
};

}  // namespace chatflow
