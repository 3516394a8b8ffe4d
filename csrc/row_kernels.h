// The table of kernels that row_kernels.cpp provides once per instruction set.
#pragma once

#include <span>

#include "schedule.h"
#include "weighted_sum.h"

namespace gossamer {

// Columns [begin, begin + len) of every output: one thread's piece of work.
struct Block {
  std::size_t begin = 0, len = 0;
  void* scratch = nullptr;  // num_slots * len elements, this thread's own
  bool stream = false;      // the outputs are too large to be read again from cache
  bool prefetch = false;    // the rows of a block do not fit in L2
};

struct RowKernels {
  void (*sum_rows)(const Schedule& schedule, const Block& block, Dtype dtype, bool wide);
  // out[0..len) = the sum of the terms at columns [begin, begin + len); `out` may be one of them.
  void (*sum_one)(std::span<const Term> terms, std::size_t begin, std::size_t len,
                  std::uintptr_t out, Dtype dtype, bool stream);
  // Copies past the caches: for what is not read again soon. Multiples of an element, any
  // alignment.
  void (*copy)(const std::byte* from, std::byte* to, std::size_t bytes);
  // x[0..len) /= by, each rounded once, as torch does it: in float for 16-bit elements.
  void (*divide)(std::uintptr_t x, std::size_t len, double by, Dtype dtype);
  double (*dot_row)(std::uintptr_t x, std::uintptr_t y, std::size_t d, Dtype dtype);
};

// Those for this machine.
const RowKernels& kernels();

namespace baseline {
extern const RowKernels kKernels;
}
namespace avx2 {
extern const RowKernels kKernels;
}
namespace avx512 {
extern const RowKernels kKernels;
}

}  // namespace gossamer
