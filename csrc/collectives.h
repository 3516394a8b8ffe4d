// What ranks compute together through shared memory: averages over a graph, sums over all ranks.
//
// The arithmetic, and so every bit of the result, is that of weighted_sum.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "group.h"
#include "weighted_sum.h"

namespace gossamer {

// One process's part of a round; the table of rows is its own rows, then the received ones.
struct AveragePlan {
  struct Source {
    std::uint32_t peer;
    std::vector<std::uint32_t> rows;    // wanted, as rows of the peer's block
    std::vector<std::uint32_t> staged;  // the same, as places in `staged_rows` of the peer
  };
  std::vector<std::uint32_t> targets;      // peers that want rows of this process
  std::vector<std::uint32_t> staged_rows;  // hosted rows that any of them wants, ascending
  std::size_t most_staged;                 // rows that any process stages: all cut alike
  std::vector<Source> sources;             // in the order of their rows in the table
  std::vector<std::int64_t> indptr, columns;
  std::vector<double> weights;
  std::vector<std::int64_t> degree;  // messages that each hosted rank sends
};

struct AverageCall {
  Rows x, out;  // per hosted rank; may be the same rows
  std::optional<Rows> addend;
  double a;
  std::size_t d;
  Dtype dtype;
  int rounds;
  std::size_t num_threads;
  double timeout_s;
};

// out = W^rounds x + a * addend. A row of x or the addend may be a row of `out`, but not overlap
// one in part. On failure x is as it was; a row that is also `out` is as it was or averaged, by
// some of the rounds. It is neither where the outcome is kTorn, or an exception came (of a signal,
// say): a peer failed in the middle and, after the two seconds that it leaves its readers, wrote
// its own row again. To be able to undo would cost a copy of the row in every call.
Status average(Group& group, const AveragePlan& plan, const AverageCall& call);

struct SumCall {
  Rows x;                             // per hosted rank
  std::vector<std::uint32_t> counts;  // rows of each process
  std::uintptr_t out;                 // one row
  std::size_t d;
  Dtype dtype;
  double divisor;  // 1: none
  double timeout_s;
};

// out = the sum of all ranks' rows, added in ascending rank, over the divisor; on every process.
Status sum(Group& group, const SumCall& call);

struct GatherCall {
  Rows x;                             // per hosted rank
  std::vector<std::uint32_t> counts;  // rows of each process
  std::uintptr_t out;                 // all ranks' rows, one after another
  std::size_t row_bytes;
  double timeout_s;
};

// out = every rank's row, in rank order; on every process.
Status gather(Group& group, const GatherCall& call);

struct BroadcastCall {
  std::uintptr_t x;  // the row, on the root
  std::uint32_t root;
  std::uintptr_t out;  // may be x on the root
  std::size_t row_bytes;
  double timeout_s;
};

// out = the root's row; on every process.
Status broadcast(Group& group, const BroadcastCall& call);

// Throw std::out_of_range or std::invalid_argument for arguments that this process alone can see to
// be wrong: a peer or root that there is not, counts of other processes, an addend that the first
// of several rounds would overwrite. The collectives, on devices too, call them before they send.
void check(const Group& group, const AveragePlan& plan, const AverageCall& call);
void check(const Group& group, const SumCall& call);
void check(const Group& group, const GatherCall& call);
void check(const Group& group, const BroadcastCall& call);

}  // namespace gossamer
