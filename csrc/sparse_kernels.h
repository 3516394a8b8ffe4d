// The table of kernels that sparse_kernels.cpp provides once per instruction set.
#pragma once

#include "sparse_products.h"

namespace gossamer {

// Scratch is for one caller alone, aligned to 64 bytes; of which size says sparse_products.cpp.
struct SparseKernels {
  // Of the tokens from `first` on, at most kTokenBytes of them.
  void (*add)(const Support& s, std::uintptr_t values, const Rows& x, const Rows& y, Dtype dtype,
              std::size_t first, std::byte* scratch);
  void (*add_back)(const Support& s, std::uintptr_t values, const Rows& g, const Rows& y,
                   Dtype dtype, std::size_t first, std::byte* scratch);
  // Of the rows of S from `begin` to `end`, and all tokens.
  void (*sample)(const Support& s, const Rows& g, const Rows& x, std::uintptr_t out, Dtype dtype,
                 std::size_t begin, std::size_t end, std::byte* scratch);
};

namespace baseline {
extern const SparseKernels kSparseKernels;
}
namespace avx2 {
extern const SparseKernels kSparseKernels;
}
namespace avx512 {
extern const SparseKernels kSparseKernels;
}

}  // namespace gossamer
