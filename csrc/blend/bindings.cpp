/// \file
/// The extension module `megatron_chatflow.blend._native`: the engine of a segment, and the ends of
/// windows.
#include <pybind11/numpy.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "blend.h"

namespace py = pybind11;

namespace chatflow {
namespace {

using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

constexpr int64_t kIntervalFields = 8;

WeightTable table_from(int64_t origin, int64_t samples_per_iteration, const Integers& levels,
                       const Integers& intervals) {
  if (levels.ndim() != 2 || levels.shape(1) < 2 || levels.shape(1) > 32768) {
    throw std::invalid_argument("weight table: levels must have shape [num_rows, 2 to 32768]");
  }
  if (intervals.ndim() != 2 || intervals.shape(1) != kIntervalFields) {
    throw std::invalid_argument("weight table: intervals must have shape [num_intervals, 8]");
  }
  WeightTable table;
  table.origin = origin;
  table.samples_per_iteration = samples_per_iteration;
  table.num_sources = static_cast<int>(levels.shape(1)) - 1;
  table.levels.assign(levels.data(), levels.data() + levels.size());
  const auto rows = intervals.unchecked<2>();
  for (py::ssize_t row = 0; row < intervals.shape(0); ++row) {
    table.intervals.push_back({rows(row, 0), rows(row, 1), rows(row, 2), rows(row, 3), rows(row, 4),
                               rows(row, 5), rows(row, 6), rows(row, 7)});
  }
  return table;
}

/// Combines the whole parts of quotas and their fractions in units of 2^-32.
std::vector<Int128> quotas_from(const Integers& whole, const Integers& fraction) {
  if (whole.ndim() != 1 || fraction.ndim() != 1 || whole.size() != fraction.size()) {
    throw std::invalid_argument(
        "blend: whole parts and fractions must be 1-D arrays of the same length");
  }
  std::vector<Int128> quotas;
  for (py::ssize_t k = 0; k < whole.size(); ++k) {
    const int64_t part = fraction.at(k);
    if (part < 0 || part >= kGrid)
      throw std::invalid_argument("blend: a fraction must be at least 0 and below 1");
    quotas.push_back(static_cast<Int128>(whole.at(k)) * kGrid + part);
  }
  return quotas;
}

std::unique_ptr<BlendEngine> make_engine(int64_t origin, int64_t samples_per_iteration,
                                         const Integers& levels, const Integers& intervals,
                                         int64_t begin, const Integers& whole,
                                         const Integers& fraction, const Integers& counts,
                                         int num_leaf_bits) {
  WeightTable table = table_from(origin, samples_per_iteration, levels, intervals);
  const std::vector<Int128> base = quotas_from(whole, fraction);
  if (counts.ndim() != 1) throw std::invalid_argument("blend: counts must be a 1-D array");
  const std::vector<int64_t> drawn(counts.data(), counts.data() + counts.size());
  const py::gil_scoped_release release;
  return std::make_unique<BlendEngine>(std::move(table), begin, base, drawn, num_leaf_bits);
}

py::tuple take(BlendEngine& engine, int64_t begin, int64_t end) {
  if (begin > end) throw std::invalid_argument("blend: samples: the end lies before the begin");
  py::array_t<int16_t> source(end - begin);
  py::array_t<int64_t> index(end - begin);
  int16_t* const source_data = source.mutable_data();
  int64_t* const index_data = index.mutable_data();
  {
    const py::gil_scoped_release release;
    engine.take(begin, end, source_data, index_data);
  }
  return py::make_tuple(std::move(source), std::move(index));
}

py::array_t<int64_t> counts_of(BlendEngine& engine, int64_t sample) {
  py::array_t<int64_t> counts(engine.num_sources());
  int64_t* const data = counts.mutable_data();
  {
    const py::gil_scoped_release release;
    engine.counts(sample, data);
  }
  return counts;
}

/// The end of each source's current window: the first sample at which its quota reaches the next
/// whole number.
py::array_t<int64_t> window_ends(int64_t origin, int64_t samples_per_iteration,
                                 const Integers& levels, const Integers& intervals, int64_t begin,
                                 const Integers& whole, const Integers& fraction) {
  const std::vector<Int128> base = quotas_from(whole, fraction);
  const Quota quota(table_from(origin, samples_per_iteration, levels, intervals), begin, base);
  py::array_t<int64_t> ends(quota.num_sources());
  int64_t* const data = ends.mutable_data();
  const py::gil_scoped_release release;
  const Place place = quota.place_of(begin);
  for (int k = 0; k < quota.num_sources(); ++k) {
    const int64_t need = kGrid - static_cast<int64_t>(base[k] & (kGrid - 1));
    data[k] = quota.forward(k, place, base[k], need, kNever);
  }
  return ends;
}

}  // namespace

}  // namespace chatflow

PYBIND11_MODULE(_native, module) {
  using namespace chatflow;
  module.doc() = "C++ implementation of megatron_chatflow.blend.engine and quota.";
  py::class_<BlendEngine>(module, "BlendEngine", "Draws of one segment of a blend.")
      .def(py::init(&make_engine), py::arg("origin"), py::arg("samples_per_iteration"),
           py::arg("levels"), py::arg("intervals"), py::arg("begin"), py::arg("whole"),
           py::arg("fraction"), py::arg("counts"), py::arg("num_leaf_bits") = -1)
      .def("take", &take, py::arg("begin"), py::arg("end"),
           "Sources (int16) and indices (int64) of the samples [begin, end).")
      .def("counts", &counts_of, py::arg("sample"),
           "Number of draws of each source before a sample, int64.")
      .def("find", &BlendEngine::find, py::arg("source"), py::arg("index"),
           py::call_guard<py::gil_scoped_release>(),
           "The sample of the source's index-th draw, or -1.")
      .def("num_bytes", &BlendEngine::num_bytes, "Memory of the engine in bytes.");
  module.def("window_ends", &window_ends, py::arg("origin"), py::arg("samples_per_iteration"),
             py::arg("levels"), py::arg("intervals"), py::arg("begin"), py::arg("whole"),
             py::arg("fraction"),
             "The first sample at which each quota reaches its next whole number, int64.");
}
