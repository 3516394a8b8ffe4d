#include "chain_moves.h"

#include <algorithm>
#include <vector>

#include "chain_kernels.h"
#include "isa.h"
#include "threads.h"

namespace gossamer {
namespace {

constexpr std::size_t kPerThread = 1 << 16;  // tests: starting a thread costs a fraction of these

ChainKernel kernel() {
#ifdef GOSSAMER_X86
  if (isa() == Isa::kAvx512) return avx512::kScanRow;
  if (isa() == Isa::kAvx2) return avx2::kScanRow;
#endif
  return baseline::kScanRow;
}

// A thread's own.
struct Scratch {
  std::vector<std::size_t> own;
  std::vector<float> sums;
};

// The columns that show the example itself, then one past the last.
void find_own(const ChainMoves& job, std::size_t example, std::vector<std::size_t>& own) {
  own.clear();
  const std::size_t half = job.columns / 2;
  for (std::size_t k = 0; k < half; ++k) {
    if (job.column_ids[k] == job.row_ids[example]) own.push_back(k);
  }
  for (std::size_t k = 0, count = own.size(); k < count; ++k) own.push_back(half + own[k]);
  own.push_back(job.columns);
}

void move_example(const ChainMoves& job, std::size_t example, ChainKernel scan_row,
                  Scratch& scratch) {
  auto& [own, sums] = scratch;
  find_own(job, example, own);
  sums.resize(job.columns + kMostLanes);
  Chain chain = {};
  for (std::size_t view = 0; view < 2; ++view) {
    const std::size_t r = view * job.examples + example;
    const auto [begin, end] = job.scanned[view];
    const ChainRow row{.scores = job.scores + r * job.score_stride,
                       .exponentials = job.exponentials + r * job.exponential_stride,
                       .begin = begin,
                       .end = end,
                       .own = &*std::lower_bound(own.begin(), own.end() - 1, begin),
                       .burn_in = job.burn_in[r],
                       .counts = job.counts + r * job.columns,
                       .sums = sums.data()};
    if (view == 0 || job.carry == Carry::kNone) {
      chain = {.column = -1, .score = job.held_scores[r], .held = 0, .accepted = 0, .proposed = 0};
    } else if (job.carry == Carry::kFresh) {
      chain.score = chain.column < 0 ? job.held_scores[r] : row.scores[chain.column];
    }
    scan_row(row, chain);
    job.held[r] = chain.held;
    job.state[r] = chain.column;
    job.score[r] = chain.score;
    job.accepted[r] = chain.accepted;
    job.proposed[r] = chain.proposed;
  }
}

}  // namespace

void chain_moves(const ChainMoves& job, std::size_t num_threads) {
  const std::size_t most = 2 * job.examples * job.columns / kPerThread;
  num_threads = std::clamp<std::size_t>(most, 1, std::max<std::size_t>(num_threads, 1));
  std::vector<Scratch> scratch(num_threads);
  const auto scan_row = kernel();
  for_each(job.examples, num_threads, [&](std::size_t example, std::size_t thread) {
    move_example(job, example, scan_row, scratch[thread]);
  });
}

}  // namespace gossamer
