// Products with a sparse matrix S (outputs x inputs) whose support never changes, for layers that
// add one to a product of thin matrices (SLTrain, arXiv:2406.02214), and the gradient of its
// values.
//
// Every output element has one owner that adds its terms in one order: the bits do not depend on
// the number of threads; they do on the instruction set, as those of matrix products do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "weighted_sum.h"

namespace gossamer {

// Element k of row i, starts[i] <= k < starts[i + 1], stands in column indices[k] - i * inputs;
// indices rise.
struct Support {
  std::size_t outputs, inputs;
  const std::int32_t* starts;   // (outputs + 1)
  const std::int32_t* indices;  // (starts[outputs])
};

// Tokens that are worked on at once, as columns of this many bytes side by side.
constexpr std::size_t kTokenBytes = 128;

// y (N, outputs) += x (N, inputs) S^T; sums in float, or double for float64, and rounded once.
void add_sparse_product(const Support& s, std::uintptr_t values, const Rows& x, const Rows& y,
                        Dtype dtype, std::size_t num_threads);

// y (N, inputs) += g (N, outputs) S, likewise.
void add_sparse_product_back(const Support& s, std::uintptr_t values, const Rows& g, const Rows& y,
                             Dtype dtype, std::size_t num_threads);

// out[k] = sum_n g[n][i] x[n][j] with (i, j) the place of element k: the gradient of the values.
void sampled_product(const Support& s, const Rows& g, const Rows& x, std::uintptr_t out,
                     Dtype dtype, std::size_t num_threads);

}  // namespace gossamer
