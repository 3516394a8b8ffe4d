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

// The first of the sums from `j` on that is above the bound, or `end`, from where kNone stands.
std::size_t first_above(const float* sums, std::size_t j, std::size_t end, float bound) {
  for (; j < end; j += kFloats) {
    const std::uint32_t above = lanes_above(load<float, float>(sums + j), bound);
    if (above != 0) return j + static_cast<std::size_t>(std::countr_zero(above));
  }
  return end;
}

void scan_row(const ChainRow& row, Chain& chain) {
  float* const sums = row.sums;
  for (std::size_t j = row.begin; j < row.end; ++j) sums[j] = row.scores[j] + row.exponentials[j];
  std::fill_n(sums + row.end, kFloats, kNone);
  for (const std::size_t* own = row.own; *own < row.end; ++own) sums[*own] = kNone;

  const std::size_t* own = row.own;
  const auto tests_before = [&](std::size_t j) {  // j rises from call to call
    while (*own < j) ++own;
    return static_cast<std::int32_t>(j - row.begin) - static_cast<std::int32_t>(own - row.own);
  };
  std::int32_t since = 0;  // the state stands after this test
  const auto record = [&](std::int32_t until) {
    const auto records = std::max(until, row.burn_in) - std::max(since, row.burn_in);
    if (chain.column >= 0) {
      row.counts[chain.column] += records;
    } else if (chain.score > kNone) {
      chain.held += records;
    }
    since = until;
  };
  chain.held = chain.accepted = 0;
  std::size_t j = first_above(sums, row.begin, row.end, chain.score);
  for (; j < row.end; j = first_above(sums, j + 1, row.end, chain.score)) {
    record(tests_before(j));
    chain.column = static_cast<std::int64_t>(j);
    chain.score = row.scores[j];
    ++chain.accepted;
  }
  chain.proposed = tests_before(row.end);
  record(chain.proposed);
}

}  // namespace

extern const ChainKernel kScanRow = scan_row;

}  // namespace gossamer::GOSSAMER_ISA
