// The table of kernels that row_kernels.cpp provides once per instruction set.
#pragma once

#include "weighted_sum.h"

namespace gossamer {

struct RowKernels {
  const char* name;
  void (*weighted_sum)(const WeightedSum& job, Dtype dtype);
  void (*row_dot)(const std::uintptr_t* x, const std::uintptr_t* y, std::size_t num_rows,
                  std::size_t d, Dtype dtype, double* out);
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
