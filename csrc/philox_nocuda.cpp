#include <stdexcept>

#include "philox_cuda.h"

namespace gossamer {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "random numbers on the GPU: this build has no CUDA kernels; rebuild where nvcc is on PATH");
}

}  // namespace

void fill_words_cuda(std::uint32_t*, std::size_t, std::uint64_t, const Stream&, void*) { refuse(); }

void fill_random_cuda(std::span<const Piece>, Dtype, const Direction&, void*) { refuse(); }

void add_random_cuda(std::span<const Piece>, Dtype, const Direction&, double, std::uintptr_t,
                     void*) {
  refuse();
}

void subtract_random_cuda(std::span<const Piece>, Dtype, std::span<const ScaledDirection>, double,
                          void*) {
  refuse();
}

void release_sum_cuda(std::span<const Piece>, Dtype, const Release&, void*) { refuse(); }

}  // namespace gossamer
