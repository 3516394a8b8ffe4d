// Compiled once per instruction set (GOSSAMER_ISA). All lanes of a vector are tested against the
// state at once; the chain jumps to the first that passes, and the tests in between are counted.
#include "chain_kernels.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "lanes.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

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

std::uint32_t lanes_below(std::size_t lane) { return (std::uint32_t{1} << lane) - 1; }

Floats load_first(const float* p, std::size_t lanes) {
  if (lanes == kFloats) return load<float, float>(p);
  Floats v = {};
  std::memcpy(&v, p, lanes * sizeof(float));
  return v;
}

void scan_row(const ChainRow& row, Chain& chain) {
  std::int32_t tests = 0, since = 0;  // tests so far, and when the state was reached
  // The state has stood until this test.
  const auto record = [&](std::int32_t until) {
    const auto records = std::max(until, row.burn_in) - std::max(since, row.burn_in);
    if (chain.column >= 0) {
      row.counts[chain.column] += records;
    } else if (chain.score > -std::numeric_limits<float>::infinity()) {
      chain.held += records;
    }
    since = until;
  };
  chain.held = chain.accepted = 0;
  const std::size_t* barred = row.barred;
  for (std::size_t i = row.begin; i < row.end; i += kFloats) {
    const std::size_t lanes = std::min(kFloats, row.end - i);
    std::uint32_t proposed = lanes_below(lanes);
    for (; *barred < i + lanes; ++barred) proposed &= ~(std::uint32_t{1} << (*barred - i));
    const Floats sums = load_first(row.scores + i, lanes) + load_first(row.exponentials + i, lanes);
    std::uint32_t above = lanes_above(sums, chain.score) & proposed;
    while (above != 0) {
      const auto lane = static_cast<std::size_t>(std::countr_zero(above));
      record(tests + std::popcount(proposed & lanes_below(lane)));
      chain.column = static_cast<std::int64_t>(i + lane);
      chain.score = row.scores[i + lane];
      ++chain.accepted;
      above = lanes_above(sums, chain.score) & proposed & ~lanes_below(lane + 1);
    }
    tests += std::popcount(proposed);
  }
  record(tests);
  chain.proposed = tests;
}

}  // namespace

extern const ChainKernel kScanRow = scan_row;

}  // namespace gossamer::GOSSAMER_ISA
