// What clipping needs of the gradients of single examples, which are rows: inner products and one
// weighted sum. Each row is read once by either, and nothing of the rows' size is allocated.
#include <algorithm>

#include "cuda_check.h"
#include "device.h"
#include "elements_cuda.h"

namespace gossamer {
namespace {

constexpr unsigned kThreads = 512;
constexpr std::size_t kMostBlocks = 1 << 16;  // beyond these each does several rows

// Thread k adds elements k, k + kThreads, ...; then the threads are added in a fixed tree, so that
// the bits depend on the rows alone. They are not the CPU's, whose lanes are fewer.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dot_kernel(Rows x, Rows y, std::size_t d, double* __restrict__ out) {
  __shared__ double sums[kThreads];
  for (std::size_t r = blockIdx.x; r < x.count; r += gridDim.x) {
    const T* a = reinterpret_cast<const T*>(x.address + r * x.stride_bytes);
    const T* b = reinterpret_cast<const T*>(y.address + r * y.stride_bytes);
    double sum = 0;
#pragma unroll 8
    for (std::size_t i = threadIdx.x; i < d; i += kThreads) {
      const auto left = static_cast<double>(widen(a[i])), right = static_cast<double>(widen(b[i]));
      sum = add(sum, multiply(left, right));
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) out[r] = sums[0];
    __syncthreads();  // before the next row's sums
  }
}

// Each thread adds up columns of its own, row by row: neighbouring threads read neighbouring
// elements.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_kernel(Rows g, const double* __restrict__ factors, std::size_t d, T* out) {
  using Acc = Accumulator<T>;
  const std::size_t stride = std::size_t{gridDim.x} * kThreads;
  for (std::size_t i = std::size_t{blockIdx.x} * kThreads + threadIdx.x; i < d; i += stride) {
    Acc sum = widen(out[i]);
#pragma unroll 8
    for (std::size_t r = 0; r < g.count; ++r) {
      const Acc factor = static_cast<Acc>(factors[r]);
      if (factor == Acc{0}) continue;  // the row may hold anything
      const T* row = reinterpret_cast<const T*>(g.address + r * g.stride_bytes);
      sum = add(sum, multiply(factor, widen(row[i])));
    }
    out[i] = narrow<T>(sum);
  }
}

}  // namespace

void row_dot_cuda(const Rows& x, const Rows& y, std::size_t d, Dtype dtype, double* out,
                  DeviceStream stream) {
  if (x.count == 0) return;  // a grid of zero blocks is a launch error
  const auto blocks = static_cast<unsigned>(std::min(x.count, kMostBlocks));
  as_type(dtype, [&]<typename T>(T*) {
    dot_kernel<T><<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(x, y, d, out);
  });
  check(cudaGetLastError());
}

void add_rows_cuda(const Rows& g, const double* factors, std::uintptr_t out, std::size_t d,
                   Dtype dtype, DeviceStream stream) {
  if (g.count == 0 || d == 0) return;
  const auto blocks = static_cast<unsigned>(std::min((d + kThreads - 1) / kThreads, kMostBlocks));
  as_type(dtype, [&]<typename T>(T*) {
    add_kernel<T><<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        g, factors, d, reinterpret_cast<T*>(out));
  });
  check(cudaGetLastError());
}

}  // namespace gossamer
