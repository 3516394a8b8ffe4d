#include "threads.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace gossamer {

void for_each(std::size_t count, std::size_t num_threads,
              const std::function<void(std::size_t, std::size_t)>& work) {
  std::atomic<std::size_t> next = 0;
  const auto run = [&](std::size_t thread) {
    for (std::size_t i = next++; i < count; i = next++) work(i, thread);
  };
  std::vector<std::jthread> helpers;
  try {
    for (std::size_t k = 1; k < num_threads; ++k) helpers.emplace_back(run, k);
  } catch (const std::system_error&) {
    // The system allows no more threads: those there are do the work.
  }
  run(0);
}

}  // namespace gossamer
