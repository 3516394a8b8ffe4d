// The table of kernels that position_kernels.cpp provides once per instruction set.
#pragma once

#include "position_sums.h"

namespace gossamer {

// Each works on one example of what position_sums.h describes.
struct PositionKernels {
  SquareAndMass (*square)(const Positions& a, const Positions& e, std::size_t example,
                          double floor);
  std::size_t (*gram_roundings)(std::size_t width);
  void (*sum)(const Positions& e, std::size_t example, float* sum, double* mass);
  void (*sum_normal)(const Positions& a, const Positions& e, const Normal& normal,
                     std::size_t example, NormalSums out);
};

namespace baseline {
extern const PositionKernels kPositionKernels;
}
namespace avx2 {
extern const PositionKernels kPositionKernels;
}
namespace avx512 {
extern const PositionKernels kPositionKernels;
}

}  // namespace gossamer
