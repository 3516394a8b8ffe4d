// The table of kernels that outer_kernels.cpp provides once per instruction set.
#pragma once

#include "outer_squares.h"

namespace gossamer {

struct OuterKernels {
  SquareAndMass (*square)(const Positions& a, const Positions& e, std::size_t example,
                          double floor);
  std::size_t (*gram_roundings)(std::size_t width);
};

namespace baseline {
extern const OuterKernels kOuterKernels;
}
namespace avx2 {
extern const OuterKernels kOuterKernels;
}
namespace avx512 {
extern const OuterKernels kOuterKernels;
}

}  // namespace gossamer
