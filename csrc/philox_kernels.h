// The table of kernels that philox_kernels.cpp provides once per instruction set.
#pragma once

#include "philox.h"

namespace gossamer {

struct PhiloxKernels {
  void (*words)(std::uint32_t* out, std::size_t n, std::uint64_t begin, const Stream& stream);
  void (*normals)(const std::uint32_t* words, std::size_t n, float* out);
  void (*fill)(const Piece& piece, Dtype dtype, const Direction& direction);
  void (*add)(const Piece& piece, Dtype dtype, const Direction& direction, double a,
              std::uintptr_t source);
  void (*subtract)(const Piece& piece, Dtype dtype, std::span<const ScaledDirection> terms,
                   double decay);
  void (*release)(const Piece& piece, Dtype dtype, const Release& job);
};

namespace baseline {
extern const PhiloxKernels kPhiloxKernels;
}
namespace avx2 {
extern const PhiloxKernels kPhiloxKernels;
}
namespace avx512 {
extern const PhiloxKernels kPhiloxKernels;
}

}  // namespace gossamer
