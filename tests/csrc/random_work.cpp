#include "random_work.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <set>

#include "row_kernels.h"

namespace gossamer::test {
namespace {

using Bytes = std::vector<std::byte>;

std::uint32_t owner_of(const Job& job, std::uint32_t rank) {
  std::uint32_t p = 0;
  while (rank >= job.first(p + 1)) ++p;
  return p;
}

// By process, its ranks that another process wants.
std::vector<std::vector<std::uint32_t>> travelling(const Job& job, const Graph& graph) {
  std::vector<std::set<std::uint32_t>> found(job.processes());
  for (std::uint32_t target = 0; target < job.ranks(); ++target) {
    for (const auto& edge : graph.edges[target]) {
      const std::uint32_t owner = owner_of(job, edge.source);
      if (owner != owner_of(job, target)) found[owner].insert(edge.source);
    }
  }
  std::vector<std::vector<std::uint32_t>> all;
  for (const auto& ranks : found) all.emplace_back(ranks.begin(), ranks.end());
  return all;
}

template <typename T>
void average_as(const Graph& graph, std::vector<Bytes>& rows, const std::vector<Bytes>& addends,
                double a, int rounds, std::size_t d) {
  const auto at = [](const Bytes& row) { return reinterpret_cast<const T*>(row.data()); };
  for (int k = 0; k < rounds; ++k) {
    std::vector<Bytes> next(rows.size(), Bytes(d * sizeof(T)));
    for (std::size_t r = 0; r < rows.size(); ++r) {
      T* out = reinterpret_cast<T*>(next[r].data());
      bool first = true;
      const auto add = [&](const T* row, double weight) {
        const T w = static_cast<T>(weight);
        for (std::size_t i = 0; i < d; ++i) out[i] = first ? w * row[i] : out[i] + w * row[i];
        first = false;
      };
      if (graph.self[r] != 0) add(at(rows[r]), graph.self[r]);
      for (const auto& edge : graph.edges[r]) add(at(rows[edge.source]), edge.weight);
      if (!addends.empty() && k + 1 == rounds) add(at(addends[r]), a);
    }
    rows = std::move(next);
  }
}

void average_by_kernel(const Graph& graph, std::vector<Bytes>& rows,
                       const std::vector<Bytes>& addends, double a, int rounds, std::size_t d,
                       Dtype dtype) {
  for (int k = 0; k < rounds; ++k) {
    std::vector<Bytes> next(rows.size(), Bytes(d * size_bytes(dtype)));
    for (std::size_t r = 0; r < rows.size(); ++r) {
      std::vector<Term> terms;
      const auto add = [&](const Bytes& row, double weight) {
        terms.push_back({reinterpret_cast<std::uintptr_t>(row.data()), weight});
      };
      if (graph.self[r] != 0) add(rows[r], graph.self[r]);
      for (const auto& edge : graph.edges[r]) add(rows[edge.source], edge.weight);
      if (!addends.empty() && k + 1 == rounds) add(addends[r], a);
      kernels().sum_one(terms, 0, d, reinterpret_cast<std::uintptr_t>(next[r].data()), dtype,
                        false);
    }
    rows = std::move(next);
  }
}

template <typename T>
Bytes sum_as(const std::vector<Bytes>& rows, std::size_t d, double divisor) {
  Bytes sum = rows[0];
  T* out = reinterpret_cast<T*>(sum.data());
  for (std::size_t r = 1; r < rows.size(); ++r) {
    const T* row = reinterpret_cast<const T*>(rows[r].data());
    for (std::size_t i = 0; i < d; ++i) out[i] += row[i];
  }
  for (std::size_t i = 0; divisor != 1 && i < d; ++i) out[i] /= static_cast<T>(divisor);
  return sum;
}

}  // namespace

std::uint32_t Job::first(std::uint32_t process) const {
  return std::accumulate(counts.begin(), counts.begin() + process, std::uint32_t{0});
}

Job draw_job(std::uint64_t seed, std::uint32_t processes) {
  Random random(key_of(seed, processes));
  Job job{seed, {}, std::vector<std::uint32_t>(processes, 1)};
  Random bytes(key_of(seed, static_cast<std::uint64_t>(getpid())));
  for (std::byte& byte : job.id) byte = static_cast<std::byte>(bytes.next());
  if (random.one_in(2)) {
    for (auto& count : job.counts) count = 1 + random.below(3);
  }
  return job;
}

Graph draw_graph(const Job& job, Random& random) {
  const std::uint32_t n = job.ranks();
  const bool directed = random.one_in(3);
  std::vector<std::set<std::uint32_t>> in(n);
  const auto connect = [&](std::uint32_t a, std::uint32_t b) {
    if (a == b) return;
    in[a].insert(b);
    if (!directed) in[b].insert(a);
  };
  for (std::uint32_t r = 1; r < n; ++r) connect(r, random.below(r));
  for (std::size_t extra = random.below(2 * n); extra > 0; --extra) {
    connect(random.below(n), random.below(n));
  }
  const auto weight = [&] { return 0.1 + static_cast<double>(random.below(1000)) / 900; };
  Graph graph{std::vector<double>(n), std::vector<std::vector<Graph::Edge>>(n)};
  for (std::uint32_t r = 0; r < n; ++r) {
    graph.self[r] = random.one_in(6) ? 0 : weight();
    for (const std::uint32_t source : in[r]) graph.edges[r].push_back({source, weight()});
  }
  return graph;
}

AveragePlan plan_of(const Job& job, const Graph& graph, std::uint32_t process) {
  const std::uint32_t begin = job.first(process), end = job.first(process + 1);
  const auto staged = travelling(job, graph);
  AveragePlan plan{};
  for (const std::uint32_t rank : staged[process]) plan.staged_rows.push_back(rank - begin);
  for (const auto& ranks : staged) plan.most_staged = std::max(plan.most_staged, ranks.size());
  std::set<std::uint32_t> targets, remote;
  for (std::uint32_t target = 0; target < job.ranks(); ++target) {
    const bool mine = target >= begin && target < end;
    for (const auto& edge : graph.edges[target]) {
      const bool from_here = edge.source >= begin && edge.source < end;
      if (mine && !from_here) remote.insert(edge.source);
      if (!mine && from_here) targets.insert(owner_of(job, target));
    }
  }
  plan.targets.assign(targets.begin(), targets.end());
  std::vector<std::uint32_t> table;  // ranks, by column
  for (std::uint32_t rank = begin; rank < end; ++rank) table.push_back(rank);
  for (const std::uint32_t rank : remote) {
    const std::uint32_t owner = owner_of(job, rank);
    if (plan.sources.empty() || plan.sources.back().peer != owner) {
      plan.sources.push_back({owner, {}, {}});
    }
    const auto place = std::ranges::lower_bound(staged[owner], rank) - staged[owner].begin();
    plan.sources.back().rows.push_back(rank - job.first(owner));
    plan.sources.back().staged.push_back(static_cast<std::uint32_t>(place));
    table.push_back(rank);
  }
  plan.indptr.push_back(0);
  for (std::uint32_t rank = begin; rank < end; ++rank) {
    const auto add = [&](std::uint32_t source, double weight) {
      plan.columns.push_back(std::ranges::find(table, source) - table.begin());
      plan.weights.push_back(weight);
    };
    if (graph.self[rank] != 0) add(rank, graph.self[rank]);
    for (const auto& edge : graph.edges[rank]) add(edge.source, edge.weight);
    plan.indptr.push_back(static_cast<std::int64_t>(plan.columns.size()));
  }
  return plan;
}

std::size_t draw_width(Random& random, Dtype dtype) {
  const std::size_t bytes = size_bytes(dtype);
  const std::size_t choice = random.below(64);
  if (choice < 2) return 0;
  if (choice < 24) return 1 + random.below(208 / bytes);                    // in the message
  if (choice < 60) return 1 + random.below(random.one_in(4) ? 6000 : 500);  // staged
  if (choice < 63) return (64 << 10) / bytes + random.below(3000);          // read in place
  return (512 << 10) / bytes + random.below(100'000);                       // in several pieces
}

std::size_t draw_message(Random& random) {
  const std::size_t choice = random.below(64);
  if (choice < 4) return 0;
  if (choice < 16) return 200 + random.below(20);             // around what a message holds
  if (choice < 20) return (16 << 10) - 8 + random.below(16);  // around what is read in place
  if (choice < 23) return 20'000 + random.below(50'000);
  if (choice < 24) return (512 << 10) + random.below(512 << 10);  // in several pieces
  return random.below(1000);
}

void fill(std::byte* row, std::size_t d, Dtype dtype, std::uint64_t key) {
  std::uint64_t state = key | 1;
  for (std::size_t i = 0; i < d; ++i) {
    state = state * 6364136223846793005 + 1442695040888963407;
    const auto bits = static_cast<std::uint32_t>(state >> 33);
    const auto put = [&](auto value) { std::memcpy(row + i * sizeof value, &value, sizeof value); };
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    switch (dtype) {
      case Dtype::kFloat32:
        put(static_cast<float>(bits) * 0x1p-30f - 1);
        break;
      case Dtype::kFloat64:
        put(static_cast<double>(bits) * 0x1p-30 - 1);
        break;
      case Dtype::kBFloat16:
        put(static_cast<std::uint16_t>(sign | 0x3f00 | (bits & 0x7f)));
        break;
      case Dtype::kFloat16:
        put(static_cast<std::uint16_t>(sign | 0x3800 | (bits & 0x3ff)));
        break;
    }
  }
}

void reference_average(const Graph& graph, std::vector<Bytes>& rows,
                       const std::vector<Bytes>& addends, double a, int rounds, std::size_t d,
                       Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    average_as<float>(graph, rows, addends, a, rounds, d);
  } else if (dtype == Dtype::kFloat64) {
    average_as<double>(graph, rows, addends, a, rounds, d);
  } else {
    average_by_kernel(graph, rows, addends, a, rounds, d, dtype);
  }
}

Bytes reference_sum(const std::vector<Bytes>& rows, std::size_t d, Dtype dtype, double divisor) {
  if (dtype == Dtype::kFloat32) return sum_as<float>(rows, d, divisor);
  if (dtype == Dtype::kFloat64) return sum_as<double>(rows, d, divisor);
  std::vector<Term> terms;
  for (const Bytes& row : rows) terms.push_back({reinterpret_cast<std::uintptr_t>(row.data()), 1});
  Bytes sum(d * size_bytes(dtype));
  const auto out = reinterpret_cast<std::uintptr_t>(sum.data());
  kernels().sum_one(terms, 0, d, out, dtype, false);
  if (divisor != 1) kernels().divide(out, d, divisor, dtype);
  return sum;
}

}  // namespace gossamer::test
