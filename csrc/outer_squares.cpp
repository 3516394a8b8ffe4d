#include "outer_squares.h"

#include <algorithm>

#include "isa.h"
#include "outer_kernels.h"
#include "threads.h"

namespace gossamer {
namespace {

constexpr std::size_t kPerThread = 1 << 22;  // products: starting a thread costs a fraction of this

const OuterKernels& kernels() {
#ifdef GOSSAMER_X86
  if (isa() == Isa::kAvx512) return avx512::kOuterKernels;
  if (isa() == Isa::kAvx2) return avx2::kOuterKernels;
#endif
  return baseline::kOuterKernels;
}

}  // namespace

void outer_squares(const Positions& a, const Positions& e, double floor,
                   std::span<SquareAndMass> out, std::size_t num_threads) {
  const std::size_t products = a.examples * a.positions * a.positions * (a.width + e.width) / 2;
  num_threads =
      std::clamp<std::size_t>(products / kPerThread, 1, std::max<std::size_t>(num_threads, 1));
  for_each(a.examples, num_threads,
           [&](std::size_t i, std::size_t) { out[i] = kernels().square(a, e, i, floor); });
}

std::size_t gram_roundings(std::size_t width) { return kernels().gram_roundings(width); }

}  // namespace gossamer
