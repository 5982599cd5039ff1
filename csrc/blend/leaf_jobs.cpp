#include "leaf_jobs.h"

#include <algorithm>
#include <stdexcept>

namespace chatflow {
namespace {

/// The part of a leaf that lies in one interval of the weight table.
struct Stretch {
  int interval;
  /// First iteration, counted from the begin of the interval.
  int64_t iteration;
  /// First and last sample, counted from the leaf's begin.
  int64_t begin;
  int64_t end;
  /// Where the first iteration ends; later ones are samples_per_iteration long.
  int64_t first_end;
};

/// Steps a level from one iteration to the next by additions: begin + floor(rise * place / span).
struct LevelWalk {
  int64_t level;
  int64_t remainder;
  int64_t level_step;
  int64_t remainder_step;

  void advance(int64_t span) {
    level += level_step;
    remainder += remainder_step;
    const bool carries = remainder >= span;
    level += carries;
    remainder -= carries ? span : 0;
  }
};

/// Quotient rounded towards minus infinity, and the remainder, which is not negative.
void floor_divide(Int128 dividend, int64_t divisor, int64_t* quotient, int64_t* remainder) {
  Int128 whole = dividend / divisor;
  Int128 rest = dividend % divisor;
  if (rest < 0) {
    rest += divisor;
    --whole;
  }
  *quotient = static_cast<int64_t>(whole);
  *remainder = static_cast<int64_t>(rest);
}

LevelWalk walk_from(const Quota& quota, const Stretch& stretch, int k) {
  const Interval& interval = quota.table().intervals[stretch.interval];
  const Line line = quota.line_of(stretch.interval, k);
  LevelWalk walk{line.begin, 0, 0, 0};
  if (line.rise == 0) return walk;
  const Int128 place = static_cast<Int128>(interval.step) * stretch.iteration + interval.phase;
  int64_t risen = 0;
  floor_divide(line.rise * place, interval.span, &risen, &walk.remainder);
  walk.level += risen;
  floor_divide(static_cast<Int128>(line.rise) * interval.step, interval.span, &walk.level_step,
               &walk.remainder_step);
  return walk;
}

std::vector<Stretch> stretches_of(const Quota& quota, int64_t left, int64_t right) {
  std::vector<Stretch> stretches;
  const Place place = quota.place_of(left);
  int64_t iteration = place.iteration - quota.table().intervals[place.interval].begin;
  const int64_t batch = quota.table().samples_per_iteration;
  int64_t sample = left;
  for (int interval = place.interval; sample < right; ++interval, iteration = 0) {
    const int64_t end = std::min(quota.interval_end(interval), right);
    const bool is_constant = quota.table().intervals[interval].is_constant();
    const int64_t next = quota.interval_begin(interval) + (iteration + 1) * batch;
    const int64_t first_end = is_constant ? end : std::min(next, end);
    stretches.push_back({interval, iteration, sample - left, end - left, first_end - left});
    sample = end;
  }
  return stretches;
}

/// Follows the quota of one source through a leaf and records where it crosses whole numbers.
///
/// Quotas are relative to the floor at the leaf's begin. Job j is released when the quota rises
/// above j, and its window ends when the quota reaches j + 1. Usually both happen at the same
/// crossing: one job ends and the next is released. If the weight is 0 there, the release is
/// delayed until the quota rises again.
class JobWriter {
 public:
  /// \param due The quota at the leaf's begin, below one sample.
  /// \param is_ahead Whether the job that is open at the leaf's begin has already been drawn.
  JobWriter(uint64_t due, bool is_ahead, Job* jobs, Job* end)
      : due_(due), target_(is_ahead ? kGrid : 0), job_(jobs), end_(end) {
    if (!is_done() && due_ > target_) release(0);
  }

  bool is_done() const { return job_ == end_; }

  /// Advances to the sample `end` with a constant weight.
  void advance(int64_t begin, int64_t end, uint64_t weight) {
    if (weight == 0) return;
    const uint64_t length = static_cast<uint64_t>(end - begin);
    const uint64_t after = due_ + weight * length;
    if (after >= target_) cross(static_cast<uint64_t>(begin), length, weight, after);
    due_ = after;
  }

  /// Ends the last window at the end of the leaf.
  void finish(int64_t size) {
    if (!is_done() && is_released_) {
      job_->deadline = static_cast<uint32_t>(size);
      ++job_;
    }
    if (!is_done()) throw std::logic_error("blend: the draws of a source do not fit into a leaf");
  }

 private:
  void release(uint64_t sample) {
    job_->release = static_cast<uint32_t>(sample);
    is_released_ = true;
    target_ += kGrid;
  }

  void cross(uint64_t begin, uint64_t length, uint64_t weight, uint64_t after) {
    uint64_t at = (target_ - due_) / weight;
    uint64_t rest = (target_ - due_) % weight;
    const bool goes_on = after >= target_ + kGrid;
    const uint64_t stride = goes_on ? kGrid / weight : 0;
    const uint64_t stride_rest = goes_on ? kGrid % weight : 0;
    while (true) {
      if (is_released_) {
        job_->deadline = static_cast<uint32_t>(begin + at + (rest > 0));
        ++job_;
        is_released_ = false;
        if (is_done()) return;
      }
      if (at == length) return;  // the quota reaches the whole number but does not exceed it
      release(begin + at);
      if (target_ > after) return;
      at += stride;
      rest += stride_rest;
      if (rest >= weight) {
        rest -= weight;
        ++at;
      }
    }
  }

  uint64_t due_;
  uint64_t target_;
  Job* job_;
  Job* end_;
  bool is_released_ = false;
};

}  // namespace

LeafJobs jobs_of_leaf(const Quota& quota, const Boundary& left, const Boundary& right) {
  const int num_sources = quota.num_sources();
  const int64_t size = right.sample - left.sample;
  const int64_t batch = quota.table().samples_per_iteration;
  LeafJobs result;
  result.begins.resize(static_cast<std::size_t>(num_sources) + 1);
  int64_t total = 0;
  for (int k = 0; k < num_sources; ++k) {
    result.begins[k] = static_cast<uint32_t>(total);
    const int64_t drawn = right.counts[k] - left.counts[k];
    total += drawn;
    if (drawn < 0 || total > size) throw std::logic_error("blend: counts decrease within a leaf");
  }
  if (total != size) throw std::logic_error("blend: counts do not add up to the size of a leaf");
  result.begins[num_sources] = static_cast<uint32_t>(total);
  result.jobs.resize(total);

  const std::vector<Stretch> stretches = stretches_of(quota, left.sample, right.sample);
  std::vector<LevelWalk> below;
  for (const Stretch& stretch : stretches) below.push_back(walk_from(quota, stretch, 0));
  for (int k = 0; k < num_sources; ++k) {
    Job* const jobs = result.jobs.data() + result.begins[k];
    Job* const jobs_end = result.jobs.data() + result.begins[k + 1];
    JobWriter writer(left.fractions[k], left.is_ahead[k] != 0, jobs, jobs_end);
    for (std::size_t part = 0; part < stretches.size(); ++part) {
      const Stretch& stretch = stretches[part];
      const int64_t span = quota.table().intervals[stretch.interval].span;
      LevelWalk low = below[part];
      LevelWalk high = walk_from(quota, stretch, k + 1);
      below[part] = high;
      int64_t begin = stretch.begin;
      int64_t end = stretch.first_end;
      while (!writer.is_done()) {
        writer.advance(begin, end, static_cast<uint64_t>(high.level - low.level));
        if (end == stretch.end) break;
        begin = end;
        end = std::min(end + batch, stretch.end);
        low.advance(span);
        high.advance(span);
      }
    }
    writer.finish(size);
  }
  return result;
}

}  // namespace chatflow
