// The table of kernels that row_kernels.cpp provides once per instruction set.
#pragma once

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
  const char* name;
  void (*sum_rows)(const Schedule& schedule, const Block& block, Dtype dtype, bool wide);
  double (*dot_row)(std::uintptr_t x, std::uintptr_t y, std::size_t d, Dtype dtype);
};

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
