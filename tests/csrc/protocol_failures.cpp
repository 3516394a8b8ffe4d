// What an operation that fails leaves behind, with threads as ranks.
//   protocol_failures
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <thread>
#include <vector>

#include "collectives.h"
#include "random_work.h"

namespace {

// This thread gets no memory of so many bytes or more.
thread_local std::size_t too_large = std::numeric_limits<std::size_t>::max();

}  // namespace

// Not inlined: gcc would warn that malloc's memory is deleted, or new's freed. The sanitizers have
// an operator of their own for arrays, too.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  void* memory = bytes < too_large ? std::malloc(bytes) : nullptr;
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
void* operator new[](std::size_t bytes) { return operator new(bytes); }
void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }
void operator delete[](void* memory) noexcept { operator delete(memory); }
void operator delete[](void* memory, std::size_t) noexcept { operator delete(memory); }

namespace {

using namespace gossamer;
using namespace gossamer::test;

constexpr std::size_t kWidth = 1 << 20;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "WRONG: %s\n", what);
  std::_Exit(3);
}

// Two processes, and a row of each in shared memory.
struct Pair {
  std::vector<std::shared_ptr<Group>> groups;
  std::vector<Rows> rows;
  Job job{1, {}, {1, 1}};

  Pair() {
    std::vector<Ticket> tickets;
    for (std::uint32_t p = 0; p < 2; ++p) {
      groups.push_back(std::make_shared<Group>(job.id, p, 2, std::size_t{64} << 20, 2));
      tickets.push_back(groups[p]->ticket());
    }
    for (std::uint32_t p = 0; p < 2; ++p) {
      groups[p]->attach(tickets);
      auto* row = reinterpret_cast<float*>(groups[p]->allocate(kWidth * sizeof(float)));
      std::fill(row, row + kWidth, static_cast<float>(p));
      rows.push_back({reinterpret_cast<std::uintptr_t>(row), 1, kWidth * sizeof(float)});
    }
  }

  Status average_in_place(std::uint32_t p) {
    const Graph graph{{.5, .5}, {{{1, .5}}, {{0, .5}}}};
    return average(*groups[p], plan_of(job, graph, p), call(p));
  }
  [[nodiscard]] AverageCall call(std::uint32_t p) const {
    return {.x = rows[p],
            .out = rows[p],
            .addend = std::nullopt,
            .a = 0,
            .d = kWidth,
            .dtype = Dtype::kFloat32,
            .rounds = 1,
            .num_threads = 1,
            .timeout_s = 5};
  }
};

// Its peer would take the rows of the call that failed for those of the next one.
void an_operation_that_throws_ends_the_group() {
  Pair pair;
  std::jthread peer([&] {
    const Status s = pair.average_in_place(1);
    require(s.outcome == Outcome::kStopped || s.outcome == Outcome::kTorn, "the peer is told");
    require(s.peer == 0, "the peer is told who failed");
  });
  too_large = 1 << 20;
  bool thrown = false;
  try {
    (void)pair.average_in_place(0);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  too_large = std::numeric_limits<std::size_t>::max();
  require(thrown, "there was no memory");
  const Status next = pair.average_in_place(0);
  require(next.outcome == Outcome::kStopped, "the next operation does not begin");
}

// Staging memory is waited for by message: a reader that is through already is not waited for.
void memory_is_staged_again_and_again() {
  Pair pair;
  const auto average_apart = [&](std::uint32_t p, float* x, float* out) {
    const Graph graph{{.5, .5}, {{{1, .5}}, {{0, .5}}}};
    AverageCall call = pair.call(p);
    call.d = (1 << 20) / sizeof(float);  // the most that is staged beside the arena
    call.x.address = reinterpret_cast<std::uintptr_t>(x);
    call.out.address = reinterpret_cast<std::uintptr_t>(out);
    return average(*pair.groups[p], plan_of(pair.job, graph, p), call);
  };
  std::vector<std::jthread> threads;
  for (std::uint32_t p = 0; p < 2; ++p) {
    threads.emplace_back([&, p] {
      std::vector<float> x(kWidth, static_cast<float>(p)), out(kWidth);
      for (int k = 0; k < 40; ++k) {
        require(average_apart(p, x.data(), out.data()).ok(), "rows staged around the area");
        require(out[0] == .5f && out[1000] == .5f, "the mean of staged rows");
      }
    });
  }
}

}  // namespace

int main() {
  an_operation_that_throws_ends_the_group();
  memory_is_staged_again_and_again();
  std::puts("done");
}
