/// \file
/// Generates difficult random schedules and checks every prefix in integers; see csrc/README.md.
///
/// Arguments are the seconds to run and the first seed. Prints the number of schedules and the
/// worst error. Exits with status 1 and prints the seed if a count is one sample or more away from
/// its quota, or if random access gives other draws.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../blend.h"

namespace {

using chatflow::BlendEngine;
using chatflow::Int128;
using chatflow::Interval;
using chatflow::kGrid;
using chatflow::WeightTable;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  /// A number from low to high.
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }

 private:
  std::mt19937_64 engine_;
};

/// Relative weights of one knot, from one of ten families of adversarial schedules.
std::vector<int64_t> weights_of(Random& random, int family, int num_sources, int knot) {
  std::vector<int64_t> weights(num_sources, 0);
  for (int k = 0; k < num_sources; ++k) {
    int64_t& weight = weights[k];
    switch (family) {
      case 0:  // arbitrary weights
        weight = random.between(0, 9);
        break;
      case 1:  // most sources have weight 0 for long
        weight = k < 2 || knot > 3 ? random.between(0, 9) : 0;
        break;
      case 2:  // one source at a time
        weight = (knot * 7 + 3) % num_sources == k;
        break;
      case 3:  // a source joins at each knot
        weight = k <= knot;
        break;
      case 4:  // uniform over a decreasing number of sources
        weight = k < std::max(1, num_sources - knot);
        break;
      case 5:  // one source has nearly all weight
        weight = k + 1 == num_sources ? random.between(1000, 1000000000) : random.between(0, 2);
        break;
      case 6:  // two groups take turns
        weight = (k + knot) % 2;
        break;
      case 7:  // powers of two reach whole quotas exactly, then stay
        weight = int64_t{1} << random.between(0, 3);
        if (random.between(0, 1) == 0) weight = 0;
        break;
      case 8:  // heavy tail
        weight = int64_t{1} << random.between(0, 24);
        break;
      default:  // nearly equal
        weight = 1000 + random.between(0, 1);
        break;
    }
  }
  if (*std::max_element(weights.begin(), weights.end()) == 0) weights[knot % num_sources] = 1;
  return weights;
}

std::vector<int64_t> levels_of(const std::vector<int64_t>& weights) {
  Int128 total = 0;
  for (const int64_t weight : weights) total += weight;
  std::vector<int64_t> levels{0};
  Int128 below = 0;
  for (const int64_t weight : weights) {
    below += weight;
    levels.push_back(static_cast<int64_t>(below * kGrid / total));
  }
  return levels;
}

/// A table of steps and ramps that covers about num_samples samples.
WeightTable random_table(Random& random, int num_sources, int64_t num_samples) {
  WeightTable table{0, 1, num_sources, {}, {}};
  const int64_t batches[] = {1, 1, 2, 3, 8, 16, 100, 512};
  table.samples_per_iteration = batches[random.between(0, 7)];
  const int family = static_cast<int>(random.between(0, 9));
  const int num_knots = static_cast<int>(random.between(1, 12));
  const int64_t longest =
      std::max<int64_t>(1, 2 * num_samples / table.samples_per_iteration / num_knots);
  int64_t iteration = 0;
  for (int knot = 0; knot < num_knots; ++knot) {
    const std::vector<int64_t> levels = levels_of(weights_of(random, family, num_sources, knot));
    table.levels.insert(table.levels.end(), levels.begin(), levels.end());
    if (knot + 1 == num_knots || random.between(0, 1) == 0) {
      table.intervals.push_back({iteration, knot, knot, 0, 0, 0, 0, 1});
    } else {
      const int64_t length = random.between(1, longest);
      const int64_t step = random.between(1, 5);
      const int64_t phase = random.between(0, step - 1);
      const int64_t first = random.between(0, kGrid / 2);
      table.intervals.push_back({iteration, knot, knot + 1, first, random.between(first, kGrid),
                                 step, phase, step * length});
    }
    iteration += table.intervals.back().is_constant()
                     ? random.between(1, longest)
                     : table.intervals.back().span / table.intervals.back().step;
  }
  return table;
}

/// The weights of one iteration, computed from their definition.
void weights_at(const WeightTable& table, int64_t iteration, std::vector<int64_t>* weights) {
  std::size_t number = table.intervals.size() - 1;
  while (table.intervals[number].begin > iteration) --number;
  const Interval& interval = table.intervals[number];
  const int64_t place = interval.step * (iteration - interval.begin) + interval.phase;
  int64_t below = 0;
  for (int k = 1; k <= table.num_sources; ++k) {
    const int64_t width = table.num_sources + 1;
    const int64_t first = table.levels[interval.row_begin * width + k];
    const Int128 difference = table.levels[interval.row_end * width + k] - first;
    const int64_t begin = first + static_cast<int64_t>(difference * interval.portion_begin >> 32);
    const int64_t end = first + static_cast<int64_t>(difference * interval.portion_end >> 32);
    const Int128 product = static_cast<Int128>(end - begin) * place;
    const Int128 risen = product / interval.span - (product % interval.span < 0);
    const int64_t level = begin + static_cast<int64_t>(risen);
    (*weights)[k - 1] = level - below;
    below = level;
  }
}

struct Tally {
  int64_t num_schedules = 0;
  int64_t num_prefixes = 0;
  int64_t worst = 0;
};

/// Checks one schedule; returns whether it passed.
bool check(uint64_t seed, Tally* tally) {
  Random random(seed);
  const int sizes[] = {2, 3, 4, 5, 8, 13, 33, 64, 130, 512};
  const int num_sources = sizes[random.between(0, random.between(0, 9))];
  const int64_t num_samples = random.between(1, num_sources > 100 ? 3000 : 20000);
  const WeightTable table = random_table(random, num_sources, num_samples);
  const int leaf_bits = static_cast<int>(random.between(-1, 9));
  const std::vector<Int128> base(num_sources, 0);
  const std::vector<int64_t> zeros(num_sources, 0);
  BlendEngine engine(table, 0, base, zeros, leaf_bits);
  std::vector<int16_t> source(num_samples);
  std::vector<int64_t> index(num_samples);
  engine.take(0, num_samples, source.data(), index.data());

  std::vector<int64_t> counts(num_sources, 0);
  std::vector<int64_t> errors(num_sources, 0);  // count minus quota
  std::vector<int64_t> weights(num_sources);
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    if (sample % table.samples_per_iteration == 0) {
      weights_at(table, sample / table.samples_per_iteration, &weights);
    }
    if (index[sample] != counts[source[sample]]++) return false;
    errors[source[sample]] += kGrid;
    for (int k = 0; k < num_sources; ++k) {
      errors[k] -= weights[k];
      tally->worst = std::max(tally->worst, std::abs(errors[k]));
      if (std::abs(errors[k]) >= kGrid) return false;
    }
  }
  tally->num_prefixes += num_samples;
  tally->num_schedules += 1;

  std::vector<int64_t> found(num_sources);
  BlendEngine other(table, 0, base, zeros, leaf_bits);
  for (int trial = 0; trial < 3; ++trial) {
    const int64_t begin = random.between(0, num_samples - 1);
    const int64_t end = std::min(num_samples, begin + random.between(1, 300));
    std::vector<int16_t> part(end - begin);
    std::vector<int64_t> places(end - begin);
    other.take(begin, end, part.data(), places.data());
    if (!std::equal(part.begin(), part.end(), source.begin() + begin)) return false;
    if (!std::equal(places.begin(), places.end(), index.begin() + begin)) return false;
    other.counts(begin, found.data());
    for (int64_t sample = begin; sample < num_samples; ++sample) ++found[source[sample]];
    if (found != counts) return false;
    if (other.find(source[begin], index[begin]) != begin) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const auto start = std::chrono::steady_clock::now();
  Tally tally;
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (; elapsed() < seconds; ++seed) {
    if (!check(seed, &tally)) {
      std::printf("fuzz_blend: seed %llu failed\n", static_cast<unsigned long long>(seed));
      return 1;
    }
  }
  std::printf("fuzz_blend: %lld schedules, %lld prefixes, worst error %.10f samples\n",
              static_cast<long long>(tally.num_schedules),
              static_cast<long long>(tally.num_prefixes),
              static_cast<double>(tally.worst) / static_cast<double>(kGrid));
  return 0;
}
