#include "coded_adam.h"

#include <algorithm>

#include "coded_adam_kernels.h"
#include "isa.h"
#include "threads.h"

namespace gossamer {
namespace {

constexpr std::size_t kPiece = 64;           // blocks that a thread takes at a time
constexpr std::size_t kPerThread = 1 << 18;  // elements: starting a thread costs a fraction of this

CodedAdamKernel kernel() {
#ifdef GOSSAMER_X86
  if (isa() == Isa::kAvx512) return avx512::kCodedAdam;
  if (isa() == Isa::kAvx2) return avx2::kCodedAdam;
#endif
  return baseline::kCodedAdam;
}

}  // namespace

void coded_adam(const CodedAdam& job, std::size_t num_threads) {
  const std::size_t blocks = (job.count + kCodedBlock - 1) / kCodedBlock;
  num_threads =
      std::clamp<std::size_t>(job.count / kPerThread, 1, std::max<std::size_t>(num_threads, 1));
  const auto run = kernel();
  for_each((blocks + kPiece - 1) / kPiece, num_threads, [&](std::size_t piece, std::size_t) {
    const std::size_t end = std::min(blocks, (piece + 1) * kPiece);
    for (std::size_t index = piece * kPiece; index < end; ++index) run(job, index);
  });
}

}  // namespace gossamer
