// Metropolis-Hastings chains, called through gossamer.runtime.native.chains.
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "bindings.h"
#include "chain_moves.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// (address, elements from a row to the next)
using MatrixTuple = std::tuple<std::uintptr_t, std::size_t>;
// (first, one past the last)
using RangeTuple = std::tuple<std::size_t, std::size_t>;

// (examples, columns, scores, exponentials, row_ids, column_ids, scanned by both views,
// held_scores, burn_in, carry, outputs: counts, held, state, score, accepted, proposed)
using MovesTuple = std::tuple<std::size_t, std::size_t, MatrixTuple, MatrixTuple, std::uintptr_t,
                              std::uintptr_t, std::array<RangeTuple, 2>, std::uintptr_t,
                              std::uintptr_t, int, std::array<std::uintptr_t, 6>>;

gossamer::ChainMoves to_moves(const MovesTuple& moves) {
  const auto& [examples, columns, scores, exponentials, row_ids, column_ids, scanned, held_scores,
               burn_in, carry, outputs] = moves;
  return {.examples = examples,
          .columns = columns,
          .scores = pointer<const float>(std::get<0>(scores)),
          .score_stride = std::get<1>(scores),
          .exponentials = pointer<const float>(std::get<0>(exponentials)),
          .exponential_stride = std::get<1>(exponentials),
          .row_ids = pointer<const std::int64_t>(row_ids),
          .column_ids = pointer<const std::int64_t>(column_ids),
          .scanned = {std::make_from_tuple<gossamer::ColumnRange>(scanned[0]),
                      std::make_from_tuple<gossamer::ColumnRange>(scanned[1])},
          .held_scores = pointer<const float>(held_scores),
          .burn_in = pointer<const std::int32_t>(burn_in),
          .carry = static_cast<gossamer::Carry>(carry),
          .counts = pointer<std::int32_t>(outputs[0]),
          .held = pointer<std::int32_t>(outputs[1]),
          .state = pointer<std::int64_t>(outputs[2]),
          .score = pointer<float>(outputs[3]),
          .accepted = pointer<std::int32_t>(outputs[4]),
          .proposed = pointer<std::int32_t>(outputs[5])};
}

}  // namespace

void bind_chains(nb::module_& m) {
  m.def(
      "chain_moves",
      [](const MovesTuple& moves, std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::chain_moves(to_moves(moves), num_threads);
      },
      "moves"_a, "num_threads"_a);
  m.def(
      "chain_moves_cuda",
      [](const MovesTuple& moves, std::uintptr_t stream) {
        nb::gil_scoped_release release;
        gossamer::chain_moves_cuda(to_moves(moves), pointer<void>(stream));
      },
      "moves"_a, "stream"_a);
}
