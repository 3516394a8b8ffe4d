#include "sparse_products.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "sparse_kernels.h"
#include "threads.h"

namespace gossamer {
namespace {

constexpr std::size_t kPerThread = 1 << 20;  // products: starting a thread costs a fraction of this
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kSideBytes = 8 * kTokenBytes;  // of the rows that a kernel transposes at once

const SparseKernels& kernels() {
#ifdef GOSSAMER_X86
  if (isa() == Isa::kAvx512) return avx512::kSparseKernels;
  if (isa() == Isa::kAvx2) return avx2::kSparseKernels;
#endif
  return baseline::kSparseKernels;
}

std::size_t threads_for(const Support& s, std::size_t tokens, std::size_t num_threads) {
  const std::size_t products =
      tokens * (static_cast<std::size_t>(s.starts[s.outputs]) + s.inputs + s.outputs);
  return std::clamp<std::size_t>(products / kPerThread, 1, std::max<std::size_t>(num_threads, 1));
}

std::size_t accumulator_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

struct Free {
  void operator()(std::byte* p) const noexcept { std::free(p); }
};
using Scratch = std::unique_ptr<std::byte, Free>;

Scratch scratch(std::size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  auto* const p = static_cast<std::byte*>(std::aligned_alloc(kAlignment, bytes));
  if (p == nullptr) throw std::bad_alloc();
  return Scratch(p);
}

// Calls work(first token of a tile, scratch) for all tiles.
template <typename Work>
void for_tiles(const Support& s, std::size_t tokens, Dtype dtype, std::size_t num_threads,
               Work&& work) {
  const std::size_t tile = kTokenBytes / accumulator_bytes(dtype);
  num_threads = threads_for(s, tokens, num_threads);
  std::vector<Scratch> mine;
  for (std::size_t k = 0; k < num_threads; ++k)
    mine.push_back(scratch(s.inputs * kTokenBytes + kSideBytes));
  for_each((tokens + tile - 1) / tile, num_threads,
           [&](std::size_t i, std::size_t thread) { work(i * tile, mine[thread].get()); });
}

}  // namespace

void add_sparse_product(const Support& s, std::uintptr_t values, const Rows& x, const Rows& y,
                        Dtype dtype, std::size_t num_threads) {
  for_tiles(s, x.count, dtype, num_threads, [&](std::size_t first, std::byte* mine) {
    kernels().add(s, values, x, y, dtype, first, mine);
  });
}

void add_sparse_product_back(const Support& s, std::uintptr_t values, const Rows& g, const Rows& y,
                             Dtype dtype, std::size_t num_threads) {
  for_tiles(s, g.count, dtype, num_threads, [&](std::size_t first, std::byte* mine) {
    kernels().add_back(s, values, g, y, dtype, first, mine);
  });
}

void sampled_product(const Support& s, const Rows& g, const Rows& x, std::uintptr_t out,
                     Dtype dtype, std::size_t num_threads) {
  const std::size_t parts = std::min(threads_for(s, x.count, num_threads), s.outputs);
  const auto begin = [&](std::size_t part) { return part * s.outputs / parts; };
  std::vector<Scratch> mine;
  for (std::size_t k = 0; k < parts; ++k) {
    const auto elements = static_cast<std::size_t>(s.starts[begin(k + 1)] - s.starts[begin(k)]);
    mine.push_back(
        scratch(s.inputs * kTokenBytes + kSideBytes + elements * accumulator_bytes(dtype)));
  }
  for_each(parts, parts, [&](std::size_t part, std::size_t) {
    kernels().sample(s, g, x, out, dtype, begin(part), begin(part + 1), mine[part].get());
  });
}

}  // namespace gossamer
