// What is wrong with the arguments of a collective, found before any peer hears of it: an operation
// that stops after it has sent a message would leave that message to the next one.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "collectives.h"
#include "schedule.h"

namespace gossamer {
namespace {

void require(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument(what);
}

void check_dtype(Dtype dtype) {
  require(dtype >= Dtype::kFloat32 && dtype <= Dtype::kFloat16, "rows of an unknown dtype");
}

void check_counts(const Group& group, const std::vector<std::uint32_t>& counts, std::size_t own) {
  require(counts.size() == group.processes(), "counts are of " + std::to_string(counts.size()) +
                                                  " processes, the group has " +
                                                  std::to_string(group.processes()));
  require(std::ranges::find(counts, 0u) == counts.end(), "every process must have a row");
  require(counts[group.process()] == own, "own rows are not as many as counts say");
}

void check_plan(const Group& group, const AveragePlan& plan, std::size_t rows) {
  for (const std::uint32_t peer : plan.targets) group.check_peer(peer);
  std::size_t table = rows;
  for (const AveragePlan::Source& source : plan.sources) {
    group.check_peer(source.peer);
    require(source.rows.size() == source.staged.size(), "plan: staged places for other rows");
    table += source.rows.size();
  }
  require(plan.staged_rows.size() <= plan.most_staged, "plan: more rows are staged than the most");
  require(plan.targets.empty() || !plan.staged_rows.empty(), "plan: no rows for the targets");
  for (const std::uint32_t row : plan.staged_rows) {
    require(row < rows, "plan: a staged row is none of this process's");
  }
  require(plan.indptr.size() == rows + 1 && plan.indptr.front() == 0 &&
              std::ranges::is_sorted(plan.indptr) &&
              static_cast<std::size_t>(plan.indptr.back()) == plan.columns.size() &&
              plan.weights.size() == plan.columns.size(),
          "plan: the terms do not belong to the rows");
  for (const std::int64_t column : plan.columns) {
    // A negative one becomes huge.
    require(static_cast<std::size_t>(column) < table, "plan: a term names a row outside the table");
  }
}

}  // namespace

void check(const Group& group, const AveragePlan& plan, const AverageCall& call) {
  require(!plan.indptr.empty(), "plan: no rows");
  check_plan(group, plan, call.x.count);
  check_dtype(call.dtype);
  require(call.rounds >= 1, "average: rounds must be at least 1");
  require(call.out.count == call.x.count, "average: out has another number of rows than x");
  const std::size_t row_bytes = call.d * size_bytes(call.dtype);
  check_outputs(call.out, row_bytes);
  if (!call.addend) return;
  require(call.addend->count == call.x.count, "average: axpy has another number of rows than x");
  require(call.rounds == 1 || overlap_of(*call.addend, call.out, row_bytes) == Overlap::kNone,
          "average: out would overwrite the rows of axpy in the first of several rounds; give a "
          "copy of them");
}

void check(const Group& group, const SumCall& call) {
  check_counts(group, call.counts, call.x.count);
  check_dtype(call.dtype);
}

void check(const Group& group, const GatherCall& call) {
  check_counts(group, call.counts, call.x.count);
  // A row may stand where its copy goes.
  const std::size_t first =
      std::accumulate(call.counts.begin(), call.counts.begin() + group.process(), std::size_t{0});
  const Rows out{call.out, std::accumulate(call.counts.begin(), call.counts.end(), std::size_t{0}),
                 call.row_bytes};
  const bool in_place = call.x.address == out.row(first) &&
                        (call.x.count == 1 || call.x.stride_bytes == call.row_bytes);
  require(in_place || overlap_of(call.x, out, call.row_bytes) == Overlap::kNone,
          "gather: x overlaps out elsewhere than in its own place");
}

void check(const Group& group, const BroadcastCall& call) {
  if (call.root != group.process()) return group.check_peer(call.root);
  if (call.row_bytes == 0) return;
  require(call.x != 0, "broadcast: the root has no row");
  require(overlap_of({call.x, 1, 0}, {call.out, 1, 0}, call.row_bytes) != Overlap::kPart,
          "broadcast: x overlaps out in part");
}

}  // namespace gossamer
