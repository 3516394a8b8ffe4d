// Threads for one call's work.
#pragma once

#include <cstddef>
#include <functional>

namespace gossamer {

// Calls work(i, thread) for i < count on up to `num_threads` threads, this one (0) included. Which
// thread does what is left to chance: no result may depend on it.
void for_each(std::size_t count, std::size_t num_threads,
              const std::function<void(std::size_t, std::size_t)>& work);

}  // namespace gossamer
