// What a job of the battery does in each round, drawn from its seed: every process draws the same,
// so that each knows what all the others send without being told.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "collectives.h"
#include "weighted_sum.h"

namespace gossamer::test {

// splitmix64: any key gives a good stream.
class Random {
 public:
  explicit Random(std::uint64_t key) : state_(key) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t n) { return next() % n; }
  bool one_in(std::size_t n) { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

inline std::uint64_t key_of(std::uint64_t a, std::uint64_t b, std::uint64_t c = 0,
                            std::uint64_t d = 0) {
  Random random(a);
  for (const std::uint64_t part : {b, c, d}) random = Random(random.next() ^ part);
  return random.next();
}

struct Job {
  std::uint64_t seed;
  JobId id;
  std::vector<std::uint32_t> counts;  // ranks of each process

  [[nodiscard]] std::uint32_t processes() const {
    return static_cast<std::uint32_t>(counts.size());
  }
  [[nodiscard]] std::uint32_t first(std::uint32_t process) const;  // its first rank
  [[nodiscard]] std::uint32_t ranks() const { return first(processes()); }
};

// 2 to 8 processes with 1 to 3 ranks each; now and then one each, the case of its own code.
Job draw_job(std::uint64_t seed, std::uint32_t processes);

// A round on a random connected graph, directed or not; sources ascend, weights are anything.
struct Graph {
  struct Edge {
    std::uint32_t source;
    double weight;
  };
  std::vector<double> self;              // by rank; 0: no term
  std::vector<std::vector<Edge>> edges;  // by target
};
Graph draw_graph(const Job& job, Random& random);
AveragePlan plan_of(const Job& job, const Graph& graph, std::uint32_t process);

std::size_t draw_width(Random& random, Dtype dtype);
std::size_t draw_message(Random& random);

// Fills `d` elements with the row that `key` stands for.
void fill(std::byte* row, std::size_t d, Dtype dtype, std::uint64_t key);

// Plain loops for 4 and 8 bytes; for 16-bit rows the kernels, which have tests of their own.
void reference_average(const Graph& graph, std::vector<std::vector<std::byte>>& rows,
                       const std::vector<std::vector<std::byte>>& addends, double a, int rounds,
                       std::size_t d, Dtype dtype);
std::vector<std::byte> reference_sum(const std::vector<std::vector<std::byte>>& rows, std::size_t d,
                                     Dtype dtype, double divisor);

}  // namespace gossamer::test
