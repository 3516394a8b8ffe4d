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
  if (isa() == Isa::kAvx512) return avx512::kScanRows;
  if (isa() == Isa::kAvx2) return avx2::kScanRows;
#endif
  return baseline::kScanRows;
}

// A thread's own, per row that is scanned at a time.
struct Scratch {
  std::vector<std::size_t> own;
  std::vector<float> sums;
  std::vector<std::uint32_t> moves;
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

// Moves the chains of up to kTogether examples from `first` on.
void move_examples(const ChainMoves& job, std::size_t first, ChainKernel scan_rows,
                   Scratch* scratch) {
  const std::size_t count = std::min(kTogether, job.examples - first);
  for (std::size_t k = 0; k < count; ++k) {
    find_own(job, first + k, scratch[k].own);
    scratch[k].sums.resize(job.columns + kMostLanes);
    scratch[k].moves.resize(job.columns + 1);
  }
  ChainRow rows[kTogether] = {};
  Chain chains[kTogether] = {};
  for (std::size_t view = 0; view < 2; ++view) {
    const ColumnRange columns = job.scanned[view];
    const std::size_t r0 = view * job.examples + first;
    for (std::size_t k = 0; k < count; ++k) {
      const std::size_t r = r0 + k;
      auto& [own, sums, moves] = scratch[k];
      rows[k] = {.scores = job.scores + r * job.score_stride,
                 .exponentials = job.exponentials + r * job.exponential_stride,
                 .own = &*std::lower_bound(own.begin(), own.end() - 1, columns.begin),
                 .burn_in = job.burn_in[r],
                 .counts = job.counts + r * job.columns,
                 .sums = sums.data(),
                 .moves = moves.data()};
      if (view == 0 || job.carry == Carry::kNone) {
        chains[k] = {-1, job.held_scores[r], 0, 0, 0};
      } else if (job.carry == Carry::kFresh) {
        const std::int64_t column = chains[k].column;
        chains[k].score = column < 0 ? job.held_scores[r] : rows[k].scores[column];
      }
    }
    scan_rows(rows, chains, count, columns);
    for (std::size_t k = 0; k < count; ++k) {
      job.held[r0 + k] = chains[k].held;
      job.state[r0 + k] = chains[k].column;
      job.score[r0 + k] = chains[k].score;
      job.accepted[r0 + k] = chains[k].accepted;
      job.proposed[r0 + k] = chains[k].proposed;
    }
  }
}

}  // namespace

void chain_moves(const ChainMoves& job, std::size_t num_threads) {
  const std::size_t most = 2 * job.examples * job.columns / kPerThread;
  num_threads = std::clamp<std::size_t>(most, 1, std::max<std::size_t>(num_threads, 1));
  std::vector<Scratch> scratch(num_threads * kTogether);
  const auto scan_rows = kernel();
  for_each((job.examples + kTogether - 1) / kTogether, num_threads,
           [&](std::size_t group, std::size_t thread) {
             move_examples(job, group * kTogether, scan_rows, &scratch[thread * kTogether]);
           });
}

}  // namespace gossamer
