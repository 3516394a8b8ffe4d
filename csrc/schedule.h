// In which order a weighted sum reads and stores rows, worked out once for all its columns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "weighted_sum.h"

namespace gossamer {

struct Term {
  std::uintptr_t row;
  double weight;
};

// How rows that are read lie to rows that are written: apart, some of them the same, or some of
// them the same in part, where no order of reading and writing could give the right sums.
enum class Overlap { kNone, kWhole, kPart };
Overlap overlap_of(const Rows& sources, const Rows& out, std::size_t row_bytes);

// Throws std::invalid_argument where output rows overlap each other.
void check_outputs(const Rows& out, std::size_t row_bytes);

// Outputs are computed in ascending order. One whose row is still to be read by a later output
// waits in a slot of scratch and is stored after that output.
struct Schedule {
  struct Output {
    std::uintptr_t row;
    std::size_t first_term, last_term;    // into `terms`
    std::size_t first_store, last_store;  // into `stores`: outputs to store after this one
    std::ptrdiff_t slot = kDirect;
  };
  static constexpr std::ptrdiff_t kDirect = -1;

  // Throws std::invalid_argument as weighted_sum() does.
  explicit Schedule(const WeightedSum& job);

  std::vector<Term> terms;  // the addend is the last term of its output
  std::vector<Output> outputs;
  std::vector<std::size_t> stores;
  std::size_t num_slots = 0;
  std::size_t max_live = 0;  // most rows between first and last use at any time, slots included
  bool in_place = false;     // some output is a source
};

}  // namespace gossamer
