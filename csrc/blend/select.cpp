#include "select.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <tuple>

namespace chatflow {
namespace {

/// The window of a source at a boundary, clipped to the neighbours.
Member window_of(const Quota& quota, const Place& place, Int128 at, const Boundary& left,
                 const Boundary* right, int k) {
  const int64_t floor = static_cast<int64_t>(at >> kGridBits);
  const int64_t fraction = static_cast<int64_t>(at & (kGrid - 1));
  Member member{};
  member.source = k;
  member.fraction = static_cast<uint32_t>(fraction);
  member.release = left.sample;
  member.deadline = right == nullptr ? kNever : right->sample;
  if (right == nullptr || right->floor(k) > floor) {  // otherwise the window ends after `right`
    member.deadline = quota.forward(k, place, at, kGrid - fraction, member.deadline);
  }
  if (left.floor(k) < floor || left.fractions[k] == 0) {  // otherwise it begins before `left`
    member.release = quota.backward(k, place, at, fraction - 1, left.sample) - 1;
  }
  member.is_forced = left.counts[k] == floor + 1;
  member.is_barred = right != nullptr && right->counts[k] == floor;
  return member;
}

}  // namespace

Caps::Caps(const std::vector<Member>& members) {
  ends_.reserve(members.size());
  for (const Member& member : members) ends_.push_back(member.deadline);
  std::sort(ends_.begin(), ends_.end());
  ends_.erase(std::unique(ends_.begin(), ends_.end()), ends_.end());
  const std::size_t num_groups = ends_.size();
  std::vector<uint64_t> gathered(num_groups + 1, 0);
  for (const Member& member : members) {
    const auto group = std::lower_bound(ends_.begin(), ends_.end(), member.deadline);
    gathered[group - ends_.begin()] += member.fraction;
  }
  free_.resize(num_groups);
  int64_t later = 0;
  for (std::size_t group = num_groups; group-- > 0;) {
    gathered[group] += gathered[group + 1];
    const int64_t cap = static_cast<int64_t>((gathered[group] + kGrid - 1) >> kGridBits);
    free_[group] = cap - later;
    later = cap;
  }
  next_.resize(num_groups + 1);
  std::iota(next_.begin(), next_.end(), 0);
}

bool Caps::admit(const Member& member) {
  const int own = static_cast<int>(std::lower_bound(ends_.begin(), ends_.end(), member.deadline) -
                                   ends_.begin());
  const int num_groups = static_cast<int>(free_.size());
  int group = own;
  while (true) {
    while (next_[group] != group) group = next_[group];
    if (group == num_groups || free_[group] > 0) break;
    next_[group] = group + 1;
  }
  for (int passed = own; next_[passed] != group && passed != group;) {
    const int following = next_[passed];
    next_[passed] = group;
    passed = following;
  }
  if (group == num_groups) return false;
  --free_[group];
  return true;
}

Boundary select(const Quota& quota, const Boundary& left, const Boundary* right, int64_t sample) {
  const int num_sources = quota.num_sources();
  const Place place = quota.place_of(sample);
  std::vector<Int128> quotas(num_sources);
  quota.quotas_at(place, quotas.data());

  Boundary here;
  here.sample = sample;
  here.counts.resize(num_sources);
  here.fractions.resize(num_sources);
  here.is_ahead.assign(num_sources, 0);
  std::vector<Member> members;
  members.reserve(num_sources);
  uint64_t sum = 0;
  for (int k = 0; k < num_sources; ++k) {
    here.counts[k] = static_cast<int64_t>(quotas[k] >> kGridBits);
    here.fractions[k] = static_cast<uint32_t>(quotas[k]);
    sum += here.fractions[k];
    if (here.fractions[k] != 0) {
      members.push_back(window_of(quota, place, quotas[k], left, right, k));
    }
  }

  Caps caps(members);
  uint64_t wanted = sum >> kGridBits;
  const auto admit = [&](const Member& member) {
    if (wanted == 0 || !caps.admit(member)) return;
    here.counts[member.source] += 1;
    here.is_ahead[member.source] = 1;
    --wanted;
  };
  for (const Member& member : members) {
    if (member.is_forced) admit(member);
  }
  members.erase(std::remove_if(members.begin(), members.end(),
                               [](const Member& m) { return m.is_forced || m.is_barred; }),
                members.end());
  std::sort(members.begin(), members.end(), [](const Member& a, const Member& b) {
    return std::tie(a.release, a.deadline, a.source) < std::tie(b.release, b.deadline, b.source);
  });
  for (const Member& member : members) {
    if (wanted == 0) break;
    admit(member);
  }
  if (wanted != 0) throw std::logic_error("blend: no state connects two boundaries");
  return here;
}

}  // namespace chatflow
