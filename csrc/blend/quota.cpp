#include "quota.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace chatflow {
namespace {

/// Iterations that an inverse walks before it searches: windows are short where weights are not.
constexpr int kNumWalked = 8;

/// Sum of floor((factor * x + shift) / modulus) over 0 <= x < num_terms, by Euclid's algorithm.
template <typename Unsigned>
Unsigned floor_sum(Unsigned num_terms, Unsigned modulus, Unsigned factor, Unsigned shift) {
  Unsigned total = 0;
  while (true) {
    if (factor >= modulus) {
      const Unsigned pairs =
          num_terms % 2 == 0 ? num_terms / 2 * (num_terms - 1) : (num_terms - 1) / 2 * num_terms;
      total += pairs * (factor / modulus);
      factor %= modulus;
    }
    if (shift >= modulus) {
      total += num_terms * (shift / modulus);
      shift %= modulus;
    }
    const Unsigned last = factor * num_terms + shift;
    if (last < modulus) return total;
    num_terms = last / modulus;
    shift = last % modulus;
    std::swap(modulus, factor);
  }
}

/// Quotient rounded towards minus infinity; the divisor is positive.
template <typename Signed>
Signed floor_divide(Signed dividend, Signed divisor) {
  const Signed quotient = dividend / divisor;
  return quotient - (dividend % divisor < 0);
}

int64_t ceil_divide(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

}  // namespace

void WeightTable::check() const {
  require(origin >= 0 && origin < kNever, "weight table: origin out of range");
  require(samples_per_iteration >= 1 && samples_per_iteration < kGrid,
          "weight table: samples_per_iteration out of range");
  require(num_sources >= 1 && num_sources <= 32767, "weight table: 1 to 32767 sources");
  const std::size_t width = static_cast<std::size_t>(num_sources) + 1;
  require(!levels.empty() && levels.size() % width == 0, "weight table: rows of levels are short");
  const int64_t num_rows = static_cast<int64_t>(levels.size() / width);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t* level = &levels[row * width];
    require(level[0] == 0 && level[num_sources] == kGrid, "weight table: a row is not 0 to 2^32");
    require(std::is_sorted(level, level + width), "weight table: a row falls");
  }
  require(!pieces.empty() && pieces.front().begin == 0, "weight table: no piece at iteration 0");
  require(pieces.back().is_constant(), "weight table: the last piece is not constant");
  for (std::size_t number = 0; number < pieces.size(); ++number) {
    const Piece& piece = pieces[number];
    require(piece.row_begin >= 0 && piece.row_begin < num_rows && piece.row_end >= 0 &&
                piece.row_end < num_rows,
            "weight table: a piece names a row that is not there");
    require(piece.portion_begin >= 0 && piece.portion_begin <= piece.portion_end &&
                piece.portion_end <= kGrid,
            "weight table: a portion is not between 0 and 2^32");
    require(piece.step >= 0 && piece.phase >= 0 && piece.span >= 1 && piece.span < kNever,
            "weight table: a piece's line is out of range");
    if (number + 1 == pieces.size()) break;
    const int64_t length = pieces[number + 1].begin - piece.begin;
    require(length > 0 && pieces[number + 1].begin < kNever / samples_per_iteration,
            "weight table: pieces do not follow each other");
    require(static_cast<Int128>(piece.step) * (length - 1) + piece.phase <= piece.span,
            "weight table: a piece overshoots its line");
  }
}

Quota::Quota(WeightTable table, int64_t begin, const std::vector<Int128>& base)
    : table_(std::move(table)) {
  table_.check();
  require(begin >= table_.origin && begin < kNever, "quota: begins before its table");
  require(base.size() == static_cast<std::size_t>(num_sources()), "quota: one base per source");
  const int width = num_sources() + 1;
  const int64_t limit = int64_t{1} << 31;
  const bool is_long = table_.pieces.back().begin >= limit;
  for (int piece = 0; piece < num_pieces(); ++piece) {
    const Piece& part = table_.pieces[piece];
    is_narrow_.push_back(part.span < limit && part.step < limit && !is_long);
  }
  sums_low_.assign(static_cast<std::size_t>(num_pieces()) * width, 0);
  if (is_long) sums_high_.assign(sums_low_.size(), 0);
  for (int piece = 0; piece + 1 < num_pieces(); ++piece) {
    const int64_t length = table_.pieces[piece + 1].begin - table_.pieces[piece].begin;
    for (int k = 0; k < width; ++k) {
      const UInt128 sum = sum_before(piece, k) + static_cast<UInt128>(piece_sum(piece, k, length));
      const std::size_t next = static_cast<std::size_t>(piece + 1) * width + k;
      sums_low_[next] = static_cast<uint64_t>(sum);
      if (is_long) sums_high_[next] = static_cast<uint64_t>(sum >> 64);
    }
  }
  base_.assign(num_sources(), 0);
  std::vector<Int128> at_begin(num_sources());
  quotas_at(place_of(begin), at_begin.data());
  for (int k = 0; k < num_sources(); ++k) base_[k] = base[k] - at_begin[k];
}

Place Quota::place_of(int64_t sample) const {
  const int64_t iteration = (sample - table_.origin) / table_.samples_per_iteration;
  const auto after =
      std::upper_bound(table_.pieces.begin(), table_.pieces.end(), iteration,
                       [](int64_t value, const Piece& piece) { return value < piece.begin; });
  return {sample, iteration, static_cast<int>(after - table_.pieces.begin()) - 1};
}

void Quota::quotas_at(const Place& place, Int128* quotas) const {
  const int64_t whole = place.iteration - table_.pieces[place.piece].begin;
  const int64_t rest = place.sample - sample_of(place.iteration);
  Int128 below = 0;
  for (int k = 0; k < num_sources(); ++k) {
    const int upper = k + 1;
    Int128 above = static_cast<Int128>(sum_before(place.piece, upper));
    above += piece_sum(place.piece, upper, whole);
    above *= table_.samples_per_iteration;
    if (rest != 0) {
      const Line line = line_of(place.piece, upper);
      above += static_cast<Int128>(rest) * level_at(place.piece, line, place.iteration);
    }
    quotas[k] = base_[k] + above - below;
    below = above;
  }
}

int64_t Quota::forward(int k, const Place& from, Int128 at, int64_t need, int64_t limit) const {
  const Int128 target = at + need;
  int64_t sample = from.sample;
  int64_t iteration = from.iteration;
  int piece = from.piece;
  for (int walked = 0; walked < kNumWalked; ++walked) {
    const bool is_constant = table_.pieces[piece].is_constant();
    const int64_t weight = weight_at(piece, k, iteration);
    const int64_t end = std::min(is_constant ? piece_end(piece) : sample_of(iteration + 1), limit);
    if (weight > 0 && ceil_divide(need, weight) <= end - sample) {
      return sample + ceil_divide(need, weight);
    }
    if (end >= limit) return limit;
    need -= weight * (end - sample);
    sample = end;
    iteration = is_constant ? table_.pieces[piece + 1].begin : iteration + 1;
    if (piece + 1 < num_pieces() && iteration == table_.pieces[piece + 1].begin) ++piece;
  }
  const int last = last_piece_below(k, target, piece, num_pieces());
  if (last > piece) {
    piece = last;
    iteration = table_.pieces[piece].begin;
    need = static_cast<int64_t>(target - at_piece(piece, k));
  }
  if (sample_of(iteration) >= limit) return limit;
  if (!table_.pieces[piece].is_constant()) {
    const int64_t end = table_.pieces[piece + 1].begin;
    iteration = search_ramp(piece, k, target, iteration, end);
    need = static_cast<int64_t>(target - at_iteration(piece, k, iteration));
  }
  const int64_t weight = weight_at(piece, k, iteration);
  return weight == 0 ? limit : std::min(sample_of(iteration) + ceil_divide(need, weight), limit);
}

int64_t Quota::backward(int k, const Place& from, Int128 at, int64_t spare, int64_t limit) const {
  const Int128 target = at - spare;
  int64_t sample = from.sample;
  int64_t iteration = from.iteration;
  int piece = from.piece;
  if (sample == sample_of(iteration)) {  // what lies before the sample is another iteration's
    --iteration;
    if (iteration < table_.pieces[piece].begin) --piece;
  }
  for (int walked = 0; walked < kNumWalked; ++walked) {
    const bool is_constant = table_.pieces[piece].is_constant();
    const int64_t begin = std::max(is_constant ? piece_sample(piece) : sample_of(iteration), limit);
    const int64_t weight = weight_at(piece, k, iteration);
    if (weight > 0 && spare / weight < sample - begin) return sample - spare / weight;
    if (begin <= limit) return limit;
    spare -= weight * (sample - begin);
    sample = begin;
    iteration = is_constant ? table_.pieces[piece].begin - 1 : iteration - 1;
    if (iteration < table_.pieces[piece].begin) --piece;
  }
  const int last = last_piece_below(k, target, 0, piece + 1);
  int64_t end = iteration + 1;
  if (last < piece) {
    piece = last;
    end = table_.pieces[piece + 1].begin;
    sample = sample_of(end);
    spare = static_cast<int64_t>(at_piece(piece + 1, k) - target);
  }
  if (table_.pieces[piece].is_constant()) {
    return sample - spare / weight_at(piece, k, table_.pieces[piece].begin);
  }
  iteration = search_ramp(piece, k, target, table_.pieces[piece].begin, end);
  const int64_t need = static_cast<int64_t>(target - at_iteration(piece, k, iteration));
  return sample_of(iteration) + ceil_divide(need, weight_at(piece, k, iteration));
}

Line Quota::line_of(int piece, int k) const {
  const Piece& part = table_.pieces[piece];
  const int64_t width = num_sources() + 1;
  const int64_t first = table_.levels[part.row_begin * width + k];
  const Int128 difference = table_.levels[part.row_end * width + k] - first;
  const int64_t begin = first + static_cast<int64_t>(difference * part.portion_begin >> kGridBits);
  const int64_t end = first + static_cast<int64_t>(difference * part.portion_end >> kGridBits);
  return {begin, end - begin};
}

std::size_t Quota::num_bytes() const {
  return table_.levels.capacity() * sizeof(int64_t) + table_.pieces.capacity() * sizeof(Piece) +
         base_.capacity() * sizeof(Int128) +
         (sums_low_.capacity() + sums_high_.capacity()) * sizeof(uint64_t) + is_narrow_.capacity();
}

int64_t Quota::level_at(int piece, const Line& line, int64_t iteration) const {
  if (line.rise == 0) return line.begin;
  const Piece& part = table_.pieces[piece];
  const int64_t place = part.step * (iteration - part.begin) + part.phase;
  if (is_narrow_[piece]) return line.begin + floor_divide(line.rise * place, part.span);
  const Int128 product = static_cast<Int128>(line.rise) * place;
  return line.begin + static_cast<int64_t>(floor_divide<Int128>(product, part.span));
}

int64_t Quota::weight_at(int piece, int k, int64_t iteration) const {
  return level_at(piece, line_of(piece, k + 1), iteration) -
         level_at(piece, line_of(piece, k), iteration);
}

/// Sum of level k over the first iterations of a piece.
Int128 Quota::piece_sum(int piece, int k, int64_t num_iterations) const {
  const Piece& part = table_.pieces[piece];
  const Line line = line_of(piece, k);
  const Int128 level = static_cast<Int128>(line.begin) * num_iterations;
  if (line.rise == 0) return level;
  const bool falls = line.rise < 0;  // floor(-x / m) is -floor((x + m - 1) / m)
  const uint64_t slope = static_cast<uint64_t>(falls ? -line.rise : line.rise);
  UInt128 sum;
  if (is_narrow_[piece]) {
    const uint64_t shift = slope * part.phase + (falls ? part.span - 1 : 0);
    sum = floor_sum<uint64_t>(num_iterations, part.span, slope * part.step, shift);
  } else {
    const UInt128 shift = static_cast<UInt128>(slope) * part.phase + (falls ? part.span - 1 : 0);
    sum = floor_sum<UInt128>(num_iterations, part.span, static_cast<UInt128>(slope) * part.step,
                             shift);
  }
  return falls ? level - static_cast<Int128>(sum) : level + static_cast<Int128>(sum);
}

UInt128 Quota::sum_before(int piece, int k) const {
  const std::size_t at = static_cast<std::size_t>(piece) * (num_sources() + 1) + k;
  const UInt128 low = sums_low_[at];
  return sums_high_.empty() ? low : low + (static_cast<UInt128>(sums_high_[at]) << 64);
}

/// W_k at the first sample of a piece.
Int128 Quota::at_piece(int piece, int k) const {
  const Int128 sum = static_cast<Int128>(sum_before(piece, k + 1) - sum_before(piece, k));
  return base_[k] + sum * table_.samples_per_iteration;
}

/// W_k at the first sample of an iteration of a piece.
Int128 Quota::at_iteration(int piece, int k, int64_t iteration) const {
  const int64_t whole = iteration - table_.pieces[piece].begin;
  const Int128 sum = piece_sum(piece, k + 1, whole) - piece_sum(piece, k, whole);
  return at_piece(piece, k) + sum * table_.samples_per_iteration;
}

/// The last piece of [low, high) that begins with W_k below the target; low if none but low may.
int Quota::last_piece_below(int k, Int128 target, int low, int high) const {
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (at_piece(middle, k) < target ? low : high) = middle;
  }
  return low;
}

/// The last iteration of [low, high) that begins with W_k below the target; low does.
///
/// A quadratic in floating point says where to look; only exact quotas decide.
int64_t Quota::search_ramp(int piece, int k, Int128 target, int64_t low, int64_t high) const {
  const Piece& part = table_.pieces[piece];
  const double batch = static_cast<double>(table_.samples_per_iteration);
  const double rise = static_cast<double>(line_of(piece, k + 1).rise - line_of(piece, k).rise);
  const double slope = rise * static_cast<double>(part.step) / static_cast<double>(part.span);
  const double weight = static_cast<double>(weight_at(piece, k, low));
  const double need = static_cast<double>(target - at_iteration(piece, k, low)) / batch;
  // weight * d + slope * d^2 / 2 = need, in the form that does not cancel.
  const double root = std::sqrt(std::max(0.0, weight * weight + 2 * slope * need));
  const double distance = weight + root > 0 ? 2 * need / (weight + root) : 0;
  const double span = static_cast<double>(high - low);
  int64_t probe = low + static_cast<int64_t>(std::min(std::max(distance, 0.0), span));
  int64_t stride = 1;
  bool gallops = true;
  bool climbs = false;
  bool has_probed = false;
  while (high - low > 1) {
    probe = std::min(std::max(probe, low + 1), high - 1);
    const bool is_below = at_iteration(piece, k, probe) < target;
    (is_below ? low : high) = probe;
    if (has_probed && is_below != climbs) gallops = false;
    climbs = is_below;
    has_probed = true;
    if (gallops) {
      probe = is_below ? low + stride : high - stride;
      stride *= 2;
    } else {
      probe = low + (high - low) / 2;
    }
  }
  return low;
}

}  // namespace chatflow
