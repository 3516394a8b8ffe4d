#include <stdexcept>

#include "chain_moves.h"

namespace gossamer {

void chain_moves_cuda(const ChainMoves&, void*) {
  throw std::runtime_error(
      "chains on the GPU: this build has no CUDA kernels; rebuild where nvcc is on PATH");
}

}  // namespace gossamer
