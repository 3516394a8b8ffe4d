#include "position_sums.h"

#include <algorithm>

#include "isa.h"
#include "position_kernels.h"
#include "threads.h"

namespace gossamer {
namespace {

constexpr std::size_t kPerThread = 1 << 22;  // products: starting a thread costs a fraction of this

std::size_t threads_for(std::size_t products, std::size_t num_threads) {
  return std::clamp<std::size_t>(products / kPerThread, 1, std::max<std::size_t>(num_threads, 1));
}

const PositionKernels& kernels() {
#ifdef GOSSAMER_X86
  if (isa() == Isa::kAvx512) return avx512::kPositionKernels;
  if (isa() == Isa::kAvx2) return avx2::kPositionKernels;
#endif
  return baseline::kPositionKernels;
}

}  // namespace

void outer_squares(const Positions& a, const Positions& e, double floor,
                   std::span<SquareAndMass> out, std::size_t num_threads) {
  const std::size_t products = a.examples * a.positions * a.positions * (a.width + e.width) / 2;
  num_threads = threads_for(products, num_threads);
  for_each(a.examples, num_threads,
           [&](std::size_t i, std::size_t) { out[i] = kernels().square(a, e, i, floor); });
}

std::size_t gram_roundings(std::size_t width) { return kernels().gram_roundings(width); }

void position_sums(const Positions& e, std::span<float> sums, std::span<double> masses,
                   std::size_t num_threads) {
  num_threads = threads_for(2 * e.examples * e.positions * e.width, num_threads);
  for_each(e.examples, num_threads, [&](std::size_t i, std::size_t) {
    kernels().sum(e, i, &sums[i * e.width], &masses[i]);
  });
}

void normal_sums(const Positions& a, const Positions& e, const Normal& normal,
                 const NormalSums& out, std::size_t num_threads) {
  num_threads = threads_for(8 * e.examples * e.positions * e.width, num_threads);
  for_each(e.examples, num_threads, [&](std::size_t i, std::size_t) {
    const NormalSums mine{out.scale + i * e.width, out.shift + i * e.width, out.scale_mass + i,
                          out.shift_mass + i};
    kernels().sum_normal(a, e, normal, i, mine);
  });
}

}  // namespace gossamer
