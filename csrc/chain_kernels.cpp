// Compiled once per instruction set (GOSSAMER_ISA). A chain jumps from one accepted column to the
// next, a vector of columns tested against its state at once; tests in between are only counted.
#include "chain_kernels.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "lanes.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// A bit for each lane of x above the bound.
std::uint32_t lanes_above(Floats x, float bound) {
  const Floats bounds = Floats{} + bound;
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, bounds, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, bounds, _CMP_GT_OQ)));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps(x, bounds)));
#else
  std::uint32_t bits = 0;
  for (std::size_t k = 0; k < kFloats; ++k) bits |= std::uint32_t{x[k] > bounds[k]} << k;
  return bits;
#endif
}

// score + exponential of the proposed columns, kNone for the own ones and past the end.
void add(const ChainRow& row, ColumnRange columns) {
  float* const sums = row.sums;
  for (std::size_t j = columns.begin; j < columns.end; ++j) {
    sums[j] = row.scores[j] + row.exponentials[j];
  }
  std::fill_n(sums + columns.end, kFloats, kNone);
  for (const std::size_t* own = row.own; *own < columns.end; ++own) sums[*own] = kNone;
}

struct Search {
  const float* sums;
  const float* scores;
  std::uint32_t* moves;  // columns that were accepted, `count` of them
  std::size_t count, at;
  float score;  // of the state
};

// Goes to the next column that is accepted, or on by a vector without one. Which of the two is left
// to chance and so no branch.
inline void step(Search& search, std::size_t end) {
  const std::uint32_t above =
      lanes_above(load<float, float>(search.sums + search.at), search.score);
  const std::size_t accepted = above != 0;
  const std::size_t j =
      search.at + static_cast<std::size_t>(std::countr_zero(above | std::uint32_t{1} << kFloats));
  search.moves[search.count] = static_cast<std::uint32_t>(j);
  search.count += accepted;
  const float score = search.scores[std::min(j, end - 1)];
  search.score = accepted ? score : search.score;
  search.at = std::min(j + accepted, end);
}

// A step waits for the one before, some 20 cycles: the steps of other chains fill them.
void run(Search* searches, std::size_t end) {
  static_assert(kTogether == 4);
  Search a = searches[0], b = searches[1], c = searches[2], d = searches[3];  // in registers
  while ((a.at < end) | (b.at < end) | (c.at < end) | (d.at < end)) {
    step(a, end);
    step(b, end);
    step(c, end);
    step(d, end);
  }
  searches[0] = a, searches[1] = b, searches[2] = c, searches[3] = d;
}

// Counts how long each state stood.
void count(const ChainRow& row, const Search& search, ColumnRange columns, Chain& chain) {
  const std::size_t* own = row.own;
  const auto tests_before = [&](std::size_t j) {  // j rises from call to call
    while (*own < j) ++own;
    return static_cast<std::int32_t>(j - columns.begin) - static_cast<std::int32_t>(own - row.own);
  };
  std::int32_t since = row.burn_in;
  const auto record = [&](std::int32_t tests) {
    const std::int32_t until = std::max(tests, row.burn_in);
    if (chain.column >= 0) {
      row.counts[chain.column] += until - since;
    } else if (chain.score > kNone) {
      chain.held += until - since;
    }
    since = until;
  };
  chain.held = 0;
  for (std::size_t k = 0; k < search.count; ++k) {
    record(tests_before(search.moves[k]));
    chain.column = search.moves[k];
  }
  chain.score = search.score;
  chain.accepted = static_cast<std::int32_t>(search.count);
  chain.proposed = tests_before(columns.end);
  record(chain.proposed);
}

void scan_rows(const ChainRow* rows, Chain* chains, std::size_t num_rows, ColumnRange columns) {
  std::uint32_t nowhere;
  Search searches[kTogether];
  for (std::size_t k = 0; k < kTogether; ++k) {
    if (k < num_rows) {
      add(rows[k], columns);
      searches[k] = {rows[k].sums,  rows[k].scores, rows[k].moves, 0,
                     columns.begin, chains[k].score};
    } else {  // done
      searches[k] = {rows[0].sums, rows[0].scores, &nowhere, 0, columns.end, 0};
    }
  }
  run(searches, columns.end);
  for (std::size_t k = 0; k < num_rows; ++k) count(rows[k], searches[k], columns, chains[k]);
}

}  // namespace

extern const ChainKernel kScanRows = scan_rows;

}  // namespace gossamer::GOSSAMER_ISA
