// The operations of philox.h on device memory, queued on `stream` (a cudaStream_t) of the current
// device: nothing waits, and the caller keeps the memory until the stream is done with it.
//
// Words, uniforms, signs and masks are those of the CPU to the bit, and so is the arithmetic.
// Normals are evaluated in float and differ from the CPU's by at most 1e-6. Failures of the driver
// and builds without kernels throw std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "philox.h"

namespace gossamer {

void fill_words_cuda(std::uint32_t* out, std::size_t n, std::uint64_t begin, const Stream& stream,
                     void* cuda_stream);
void fill_random_cuda(std::span<const Piece> pieces, Dtype dtype, const Direction& direction,
                      void* cuda_stream);
void add_random_cuda(std::span<const Piece> pieces, Dtype dtype, const Direction& direction,
                     double a, std::uintptr_t source, void* cuda_stream);
void subtract_random_cuda(std::span<const Piece> pieces, Dtype dtype,
                          std::span<const ScaledDirection> terms, double decay, void* cuda_stream);
void release_sum_cuda(std::span<const Piece> pieces, Dtype dtype, const Release& release,
                      void* cuda_stream);

}  // namespace gossamer
