// A warp per chain: 32 columns are tested against the state at once, and the chain jumps to the
// first that passes. Sums are rounded as on the CPU, so that the moves are the same.
#include <cmath>

#include "chain_moves.h"
#include "cuda_check.h"

namespace gossamer {
namespace {

constexpr unsigned kLanes = 32;
constexpr unsigned kThreads = 128;
constexpr unsigned kAll = 0xFFFFFFFF;

// Alike in all lanes.
struct Chain {
  std::int64_t column;
  float score;
};

__device__ void scan_row(const ChainMoves& job, std::size_t example, std::size_t view,
                         Chain& chain) {
  const unsigned lane = threadIdx.x % kLanes;
  const std::size_t r = view * job.examples + example, half = job.columns / 2;
  const float* scores = job.scores + r * job.score_stride;
  const float* exponentials = job.exponentials + r * job.exponential_stride;
  const std::int64_t own = job.row_ids[example];
  const int burn_in = job.burn_in[r];
  int tests = 0, since = 0, held = 0, accepted = 0;
  // The state has stood until this test. Lane 0 alone writes, in order.
  const auto record = [&](int until) {
    const int records = max(until, burn_in) - max(since, burn_in);
    if (chain.column < 0) {
      held += chain.score > -INFINITY ? records : 0;
    } else if (lane == 0) {
      job.counts[r * job.columns + static_cast<std::size_t>(chain.column)] += records;
    }
    since = until;
  };
  for (std::size_t i = job.scanned[view].begin; i < job.scanned[view].end; i += kLanes) {
    const std::size_t j = i + lane;
    bool mine = j < job.scanned[view].end;
    float score = 0, sum = 0;
    if (mine) {
      mine = job.column_ids[j < half ? j : j - half] != own;
      score = scores[j];
      sum = __fadd_rn(score, exponentials[j]);
    }
    const unsigned proposed = __ballot_sync(kAll, mine);
    unsigned open = proposed;  // those after the state
    for (unsigned above; (above = __ballot_sync(kAll, sum > chain.score) & open) != 0;) {
      const unsigned first = __ffs(static_cast<int>(above)) - 1;
      record(tests + __popc(proposed & ((1u << first) - 1)));
      chain.column = static_cast<std::int64_t>(i + first);
      chain.score = __shfl_sync(kAll, score, static_cast<int>(first));
      ++accepted;
      open = proposed & ~((2u << first) - 1);
    }
    tests += __popc(proposed);
  }
  record(tests);
  if (lane != 0) return;
  job.held[r] = held;
  job.state[r] = chain.column;
  job.score[r] = chain.score;
  job.accepted[r] = accepted;
  job.proposed[r] = tests;
}

__global__ void __launch_bounds__(kThreads) chain_kernel(ChainMoves job) {
  const std::size_t warp = (std::size_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const std::size_t example = warp % job.examples, view = warp / job.examples;
  if (view >= (job.carry == Carry::kNone ? 2 : 1)) return;
  Chain chain{-1, job.held_scores[view * job.examples + example]};
  scan_row(job, example, view, chain);
  if (job.carry == Carry::kNone) return;
  const std::size_t second = job.examples + example;
  if (job.carry == Carry::kFresh) {
    chain.score =
        chain.column < 0
            ? job.held_scores[second]
            : job.scores[second * job.score_stride + static_cast<std::size_t>(chain.column)];
  }
  scan_row(job, example, 1, chain);
}

}  // namespace

void chain_moves_cuda(const ChainMoves& job, void* cuda_stream) {
  if (job.examples == 0) return;  // a grid of zero blocks is a launch error
  const std::size_t chains = job.carry == Carry::kNone ? 2 * job.examples : job.examples;
  constexpr std::size_t kWarps = kThreads / kLanes;
  const auto blocks = static_cast<unsigned>((chains + kWarps - 1) / kWarps);
  chain_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(cuda_stream)>>>(job);
  check(cudaGetLastError());
}

}  // namespace gossamer
