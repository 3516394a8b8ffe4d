#include "bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "cuda_build.h"
#include "isa.h"
#include "position_sums.h"
#include "triad.h"
#include "weighted_sum.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using gossamer::Dtype;

template <typename T>
std::span<const T> to_span(const Array<T>& array) {
  return {array.data(), array.size()};
}

// (address, examples, positions, width, bytes from one example to the next, from one position)
using PositionsTuple =
    std::tuple<std::uintptr_t, std::size_t, std::size_t, std::size_t, std::size_t, std::size_t>;

gossamer::Positions to_positions(const PositionsTuple& of) {
  return std::make_from_tuple<gossamer::Positions>(of);
}

std::vector<gossamer::Rows> to_blocks(const std::vector<RowsTuple>& blocks) {
  std::vector<gossamer::Rows> rows;
  for (const RowsTuple& block : blocks) rows.push_back(to_rows(block));
  return rows;
}

void weighted_sum(const std::vector<RowsTuple>& blocks, const Array<std::int64_t>& indptr,
                  const Array<std::int64_t>& columns, const Array<double>& weights,
                  const RowsTuple& out, const std::optional<RowsTuple>& addend, double a,
                  std::size_t d, int dtype, bool wide, std::size_t num_threads) {
  gossamer::WeightedSum job{
      .blocks = to_blocks(blocks),
      .indptr = to_span(indptr),
      .columns = to_span(columns),
      .weights = to_span(weights),
      .out = to_rows(out),
      .addend = std::nullopt,
      .a = a,
      .d = d,
      .dtype = static_cast<Dtype>(dtype),
      .wide = wide,
  };
  if (addend) job.addend = to_rows(*addend);
  nb::gil_scoped_release release;
  gossamer::weighted_sum(job, num_threads);
}

// Row r of `out` = sum over blocks k, in order, of weight (r, k) * row r of block k. `weights` has
// one number per block, or one per row and block.
void combine(const std::vector<RowsTuple>& blocks, const Array<double>& weights,
             const RowsTuple& out, std::size_t d, int dtype, std::size_t num_threads) {
  const std::size_t count = blocks.size(), rows = std::get<1>(out);
  const std::size_t row_step = weights.size() == count ? 0 : count;
  nb::gil_scoped_release release;
  std::vector<std::int64_t> indptr{0}, columns;
  std::vector<double> all_weights;
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t k = 0; k < count; ++k) {
      columns.push_back(static_cast<std::int64_t>(k * rows + r));
      all_weights.push_back(weights.data()[r * row_step + k]);
    }
    indptr.push_back(static_cast<std::int64_t>(columns.size()));
  }
  gossamer::weighted_sum(
      {
          .blocks = to_blocks(blocks),
          .indptr = indptr,
          .columns = columns,
          .weights = all_weights,
          .out = to_rows(out),
          .addend = std::nullopt,
          .a = 0,
          .d = d,
          .dtype = static_cast<Dtype>(dtype),
          .wide = false,
      },
      num_threads);
}

}  // namespace

NB_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels; call them through gossamer.runtime.native, which checks the arguments.";
  bind_group(m);
  bind_calls(m);
  bind_device(m);
  bind_random(m);
  bind_sparse(m);
  bind_optimizers(m);
  bind_chains(m);
  m.def("instruction_set", &gossamer::instruction_set, "The instruction set the kernels use here.");
  m.def(
      "built_with_cuda", [] { return gossamer::kCudaKernels; },
      "True when the CUDA kernels are compiled in.");
  m.def("weighted_sum", &weighted_sum, "blocks"_a, "indptr"_a, "columns"_a, "weights"_a, "out"_a,
        "addend"_a.none(), "a"_a, "d"_a, "dtype"_a, "wide"_a, "num_threads"_a);
  m.def("combine", &combine, "blocks"_a, "weights"_a, "out"_a, "d"_a, "dtype"_a, "num_threads"_a);
  m.def(
      "row_dot",
      [](const RowsTuple& x, const RowsTuple& y, std::size_t d, int dtype, std::uintptr_t out,
         std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::row_dot(to_rows(x), to_rows(y), d, static_cast<Dtype>(dtype),
                          pointer<double>(out), num_threads);
      },
      "x"_a, "y"_a, "d"_a, "dtype"_a, "out"_a, "num_threads"_a);
  m.def(
      "add_rows",
      [](const RowsTuple& g, std::uintptr_t factors, std::uintptr_t out, std::size_t d, int dtype,
         std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::add_rows(to_rows(g), {pointer<const double>(factors), std::get<1>(g)}, out, d,
                           static_cast<Dtype>(dtype), num_threads);
      },
      "g"_a, "factors"_a, "out"_a, "d"_a, "dtype"_a, "num_threads"_a);
  m.def(
      "outer_squares",
      [](const PositionsTuple& a, const PositionsTuple& e, double floor, std::uintptr_t out,
         std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::outer_squares(to_positions(a), to_positions(e), floor,
                                {pointer<gossamer::SquareAndMass>(out), std::get<1>(a)},
                                num_threads);
      },
      "a"_a, "e"_a, "floor"_a, "out"_a, "num_threads"_a);
  m.def("gram_roundings", &gossamer::gram_roundings, "width"_a);
  m.def(
      "position_sums",
      [](const PositionsTuple& e, std::uintptr_t sums, std::uintptr_t masses,
         std::size_t num_threads) {
        nb::gil_scoped_release release;
        const auto of = to_positions(e);
        gossamer::position_sums(of, {pointer<float>(sums), of.examples * of.width},
                                {pointer<double>(masses), of.examples}, num_threads);
      },
      "e"_a, "sums"_a, "masses"_a, "num_threads"_a);
  m.def(
      "normal_sums",
      [](const PositionsTuple& a, const PositionsTuple& e, double eps, bool centred,
         std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t scale_masses,
         std::uintptr_t shift_masses, std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::normal_sums(to_positions(a), to_positions(e), {eps, centred},
                              {pointer<float>(scale), pointer<float>(shift),
                               pointer<double>(scale_masses), pointer<double>(shift_masses)},
                              num_threads);
      },
      "a"_a, "e"_a, "eps"_a, "centred"_a, "scale"_a, "shift"_a, "scale_masses"_a, "shift_masses"_a,
      "num_threads"_a);
  m.def(
      "triad",
      [](std::uintptr_t a, std::uintptr_t b, std::uintptr_t c, double factor, std::size_t n,
         bool stream) {
        nb::gil_scoped_release release;
        gossamer::triad(pointer<double>(a), pointer<double>(b), pointer<double>(c), factor, n,
                        stream);
      },
      "a"_a, "b"_a, "c"_a, "factor"_a, "n"_a, "stream"_a);
}
