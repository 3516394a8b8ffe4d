// Weighted sums and inner products of rows: the arithmetic of every transport.
//
// The bits are a contract (they do not depend on the transport, on how ranks are split over
// processes, on how many rows stand together, nor on the instruction set): terms are added in the
// order given, each product and each sum rounded separately, in float for float, bfloat16 and
// float16 rows (or double on request) and in double for double rows; weights are rounded once to
// the accumulator's type.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gossamer {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct WeightedSum {
  const std::uintptr_t* rows;    // row table: addresses of rows of d elements
  const std::int64_t* indptr;    // (num_out + 1): the terms of output r are indptr[r]..indptr[r+1]
  const std::int64_t* columns;   // per term, its place in the row table
  const double* weights;         // per term
  const std::uintptr_t* out;     // addresses of the num_out output rows
  std::size_t num_out;
  const std::uintptr_t* addend;  // null, or num_out rows y: a * y is added last
  double a;
  std::size_t d;
  std::size_t num_rows;          // size of the row table
  bool wide;                     // accumulate in double whatever the dtype
  bool staged;  // some output row is a source of another output: go through a block of scratch
};

// Rows may have any alignment; an output may be its own source without `staged`.
void weighted_sum(const WeightedSum& job, Dtype dtype);

// out[r] = sum_i x[r][i] * y[r][i], accumulated in double in 32 fixed lanes and a fixed tree.
void row_dot(const std::uintptr_t* x, const std::uintptr_t* y, std::size_t num_rows, std::size_t d,
             Dtype dtype, double* out);

// The instruction set chosen on this machine: "avx512", "avx2" or "baseline".
const char* instruction_set() noexcept;

}  // namespace gossamer
