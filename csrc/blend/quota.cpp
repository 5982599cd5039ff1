#include "quota.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace chatflow {
namespace {

/// Iterations that an inverse steps through before it switches to a binary search. Most windows are
/// shorter, because only sources with small weights have long ones.
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
  require(num_sources >= 1 && num_sources <= 32767,
          "weight table: the number of sources must be 1 to 32767");
  const std::size_t width = static_cast<std::size_t>(num_sources) + 1;
  require(!levels.empty() && levels.size() % width == 0,
          "weight table: rows of levels have the wrong length");
  const int64_t num_rows = static_cast<int64_t>(levels.size() / width);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t* level = &levels[row * width];
    require(level[0] == 0 && level[num_sources] == kGrid,
            "weight table: levels of a row must run from 0 to 2^32");
    require(std::is_sorted(level, level + width),
            "weight table: levels of a row must not decrease");
  }
  require(!intervals.empty() && intervals.front().begin == 0,
          "weight table: the first interval must begin at iteration 0");
  require(intervals.back().is_constant(), "weight table: the last interval must be constant");
  for (std::size_t number = 0; number < intervals.size(); ++number) {
    const Interval& interval = intervals[number];
    require(interval.row_begin >= 0 && interval.row_begin < num_rows && interval.row_end >= 0 &&
                interval.row_end < num_rows,
            "weight table: an interval refers to a row that does not exist");
    require(interval.portion_begin >= 0 && interval.portion_begin <= interval.portion_end &&
                interval.portion_end <= kGrid,
            "weight table: a portion must be between 0 and 2^32");
    require(
        interval.step >= 0 && interval.phase >= 0 && interval.span >= 1 && interval.span < kNever,
        "weight table: step, phase or span of an interval is out of range");
    if (number + 1 == intervals.size()) break;
    const int64_t length = intervals[number + 1].begin - interval.begin;
    require(length > 0 && intervals[number + 1].begin < kNever / samples_per_iteration,
            "weight table: intervals must be in ascending order");
    require(static_cast<Int128>(interval.step) * (length - 1) + interval.phase <= interval.span,
            "weight table: an interval is longer than its span");
  }
}

Quota::Quota(WeightTable table, int64_t begin, const std::vector<Int128>& base)
    : table_(std::move(table)) {
  table_.check();
  require(begin >= table_.origin && begin < kNever,
          "quota: the first sample lies before the table");
  require(base.size() == static_cast<std::size_t>(num_sources()),
          "quota: expected one base per source");
  const int width = num_sources() + 1;
  const int64_t limit = int64_t{1} << 31;
  const bool is_long = table_.intervals.back().begin >= limit;
  for (int interval = 0; interval < num_intervals(); ++interval) {
    const Interval& part = table_.intervals[interval];
    is_narrow_.push_back(part.span < limit && part.step < limit && !is_long);
  }
  sums_low_.assign(static_cast<std::size_t>(num_intervals()) * width, 0);
  if (is_long) sums_high_.assign(sums_low_.size(), 0);
  for (int interval = 0; interval + 1 < num_intervals(); ++interval) {
    const int64_t length = table_.intervals[interval + 1].begin - table_.intervals[interval].begin;
    for (int k = 0; k < width; ++k) {
      const UInt128 sum =
          sum_before(interval, k) + static_cast<UInt128>(interval_sum(interval, k, length));
      const std::size_t next = static_cast<std::size_t>(interval + 1) * width + k;
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
  const auto after = std::upper_bound(
      table_.intervals.begin(), table_.intervals.end(), iteration,
      [](int64_t value, const Interval& interval) { return value < interval.begin; });
  return {sample, iteration, static_cast<int>(after - table_.intervals.begin()) - 1};
}

void Quota::quotas_at(const Place& place, Int128* quotas) const {
  const int64_t whole = place.iteration - table_.intervals[place.interval].begin;
  const int64_t rest = place.sample - sample_of(place.iteration);
  Int128 below = 0;
  for (int k = 0; k < num_sources(); ++k) {
    const int upper = k + 1;
    Int128 above = static_cast<Int128>(sum_before(place.interval, upper));
    above += interval_sum(place.interval, upper, whole);
    above *= table_.samples_per_iteration;
    if (rest != 0) {
      const Line line = line_of(place.interval, upper);
      above += static_cast<Int128>(rest) * level_at(place.interval, line, place.iteration);
    }
    quotas[k] = base_[k] + above - below;
    below = above;
  }
}

int64_t Quota::forward(int k, const Place& from, Int128 at, int64_t need, int64_t limit) const {
  const Int128 target = at + need;
  int64_t sample = from.sample;
  int64_t iteration = from.iteration;
  int interval = from.interval;
  for (int walked = 0; walked < kNumWalked; ++walked) {
    const bool is_constant = table_.intervals[interval].is_constant();
    const int64_t weight = weight_at(interval, k, iteration);
    const int64_t end =
        std::min(is_constant ? interval_end(interval) : sample_of(iteration + 1), limit);
    if (weight > 0 && ceil_divide(need, weight) <= end - sample) {
      return sample + ceil_divide(need, weight);
    }
    if (end >= limit) return limit;
    need -= weight * (end - sample);
    sample = end;
    iteration = is_constant ? table_.intervals[interval + 1].begin : iteration + 1;
    if (interval + 1 < num_intervals() && iteration == table_.intervals[interval + 1].begin)
      ++interval;
  }
  const int last = last_interval_below(k, target, interval, num_intervals());
  if (last > interval) {
    interval = last;
    iteration = table_.intervals[interval].begin;
    need = static_cast<int64_t>(target - quota_at_interval(interval, k));
  }
  if (sample_of(iteration) >= limit) return limit;
  if (!table_.intervals[interval].is_constant()) {
    const int64_t end = table_.intervals[interval + 1].begin;
    iteration = search_ramp(interval, k, target, iteration, end);
    need = static_cast<int64_t>(target - quota_at_iteration(interval, k, iteration));
  }
  const int64_t weight = weight_at(interval, k, iteration);
  return weight == 0 ? limit : std::min(sample_of(iteration) + ceil_divide(need, weight), limit);
}

int64_t Quota::backward(int k, const Place& from, Int128 at, int64_t spare, int64_t limit) const {
  const Int128 target = at - spare;
  int64_t sample = from.sample;
  int64_t iteration = from.iteration;
  int interval = from.interval;
  if (sample == sample_of(iteration)) {  // the sample before belongs to another iteration
    --iteration;
    if (iteration < table_.intervals[interval].begin) --interval;
  }
  for (int walked = 0; walked < kNumWalked; ++walked) {
    const bool is_constant = table_.intervals[interval].is_constant();
    const int64_t begin =
        std::max(is_constant ? interval_begin(interval) : sample_of(iteration), limit);
    const int64_t weight = weight_at(interval, k, iteration);
    if (weight > 0 && spare / weight < sample - begin) return sample - spare / weight;
    if (begin <= limit) return limit;
    spare -= weight * (sample - begin);
    sample = begin;
    iteration = is_constant ? table_.intervals[interval].begin - 1 : iteration - 1;
    if (iteration < table_.intervals[interval].begin) --interval;
  }
  const int last = last_interval_below(k, target, 0, interval + 1);
  int64_t end = iteration + 1;
  if (last < interval) {
    interval = last;
    end = table_.intervals[interval + 1].begin;
    sample = sample_of(end);
    spare = static_cast<int64_t>(quota_at_interval(interval + 1, k) - target);
  }
  if (table_.intervals[interval].is_constant()) {
    return sample - spare / weight_at(interval, k, table_.intervals[interval].begin);
  }
  iteration = search_ramp(interval, k, target, table_.intervals[interval].begin, end);
  const int64_t need = static_cast<int64_t>(target - quota_at_iteration(interval, k, iteration));
  return sample_of(iteration) + ceil_divide(need, weight_at(interval, k, iteration));
}

Line Quota::line_of(int interval, int k) const {
  const Interval& part = table_.intervals[interval];
  const int64_t width = num_sources() + 1;
  const int64_t first = table_.levels[part.row_begin * width + k];
  const Int128 difference = table_.levels[part.row_end * width + k] - first;
  const int64_t begin = first + static_cast<int64_t>(difference * part.portion_begin >> kGridBits);
  const int64_t end = first + static_cast<int64_t>(difference * part.portion_end >> kGridBits);
  return {begin, end - begin};
}

std::size_t Quota::num_bytes() const {
  return table_.levels.capacity() * sizeof(int64_t) +
         table_.intervals.capacity() * sizeof(Interval) + base_.capacity() * sizeof(Int128) +
         (sums_low_.capacity() + sums_high_.capacity()) * sizeof(uint64_t) + is_narrow_.capacity();
}

int64_t Quota::level_at(int interval, const Line& line, int64_t iteration) const {
  if (line.rise == 0) return line.begin;
  const Interval& part = table_.intervals[interval];
  const int64_t place = part.step * (iteration - part.begin) + part.phase;
  if (is_narrow_[interval]) return line.begin + floor_divide(line.rise * place, part.span);
  const Int128 product = static_cast<Int128>(line.rise) * place;
  return line.begin + static_cast<int64_t>(floor_divide<Int128>(product, part.span));
}

int64_t Quota::weight_at(int interval, int k, int64_t iteration) const {
  return level_at(interval, line_of(interval, k + 1), iteration) -
         level_at(interval, line_of(interval, k), iteration);
}

/// Sum of level k over the first iterations of an interval.
Int128 Quota::interval_sum(int interval, int k, int64_t num_iterations) const {
  const Interval& part = table_.intervals[interval];
  const Line line = line_of(interval, k);
  const Int128 level = static_cast<Int128>(line.begin) * num_iterations;
  if (line.rise == 0) return level;
  const bool falls = line.rise < 0;  // floor(-x / m) is -floor((x + m - 1) / m)
  const uint64_t slope = static_cast<uint64_t>(falls ? -line.rise : line.rise);
  UInt128 sum;
  if (is_narrow_[interval]) {
    const uint64_t shift = slope * part.phase + (falls ? part.span - 1 : 0);
    sum = floor_sum<uint64_t>(num_iterations, part.span, slope * part.step, shift);
  } else {
    const UInt128 shift = static_cast<UInt128>(slope) * part.phase + (falls ? part.span - 1 : 0);
    sum = floor_sum<UInt128>(num_iterations, part.span, static_cast<UInt128>(slope) * part.step,
                             shift);
  }
  return falls ? level - static_cast<Int128>(sum) : level + static_cast<Int128>(sum);
}

UInt128 Quota::sum_before(int interval, int k) const {
  const std::size_t at = static_cast<std::size_t>(interval) * (num_sources() + 1) + k;
  const UInt128 low = sums_low_[at];
  return sums_high_.empty() ? low : low + (static_cast<UInt128>(sums_high_[at]) << 64);
}

/// W_k at the first sample of an interval.
Int128 Quota::quota_at_interval(int interval, int k) const {
  const Int128 sum = static_cast<Int128>(sum_before(interval, k + 1) - sum_before(interval, k));
  return base_[k] + sum * table_.samples_per_iteration;
}

/// W_k at the first sample of an iteration of an interval.
Int128 Quota::quota_at_iteration(int interval, int k, int64_t iteration) const {
  const int64_t whole = iteration - table_.intervals[interval].begin;
  const Int128 sum = interval_sum(interval, k + 1, whole) - interval_sum(interval, k, whole);
  return quota_at_interval(interval, k) + sum * table_.samples_per_iteration;
}

/// The last interval of [low, high) that begins with W_k below the target; low if there is none.
int Quota::last_interval_below(int k, Int128 target, int low, int high) const {
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (quota_at_interval(middle, k) < target ? low : high) = middle;
  }
  return low;
}

/// The last iteration of [low, high) that begins with W_k below the target, which `low` does.
///
/// The solution of a quadratic equation in floating point gives the first guess. All comparisons
/// use exact quotas.
int64_t Quota::search_ramp(int interval, int k, Int128 target, int64_t low, int64_t high) const {
  const Interval& part = table_.intervals[interval];
  const double batch = static_cast<double>(table_.samples_per_iteration);
  const double rise =
      static_cast<double>(line_of(interval, k + 1).rise - line_of(interval, k).rise);
  const double slope = rise * static_cast<double>(part.step) / static_cast<double>(part.span);
  const double weight = static_cast<double>(weight_at(interval, k, low));
  const double need = static_cast<double>(target - quota_at_iteration(interval, k, low)) / batch;
  // Solves weight * d + slope * d^2 / 2 = need in a form without cancellation.
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
    const bool is_below = quota_at_iteration(interval, k, probe) < target;
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
