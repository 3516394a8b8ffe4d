// Weighted sums and inner products of rows: the arithmetic of every transport.
//
// The bits are a contract (they do not depend on the transport, on how ranks are split over
// processes, on how many rows stand together, nor on the instruction set or the number of threads):
// terms are added in the order given, each product and each sum rounded separately, in float for
// float, bfloat16 and float16 rows (or double on request) and in double for double rows; weights
// are rounded once to the accumulator's type; a 16-bit result is rounded from float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "dtype.h"

namespace gossamer {

// `count` rows, each contiguous, the next one `stride_bytes` further. Any alignment.
struct Rows {
  std::uintptr_t address;
  std::size_t count;
  std::size_t stride_bytes;

  [[nodiscard]] std::uintptr_t row(std::size_t r) const noexcept {
    return address + r * stride_bytes;
  }
};

// Whether the ranges from the first row to the end of the last, of `row_bytes` each, meet.
[[nodiscard]] inline bool overlap(const Rows& x, std::size_t row_bytes, const Rows& y) noexcept {
  if (x.count == 0 || y.count == 0) return false;
  return x.address < y.row(y.count - 1) + row_bytes && y.address < x.row(x.count - 1) + row_bytes;
}

struct WeightedSum {
  std::vector<Rows> blocks;               // their rows, one after another, are the row table
  std::span<const std::int64_t> indptr;   // the terms of output r are indptr[r]..indptr[r + 1]
  std::span<const std::int64_t> columns;  // per term, its place in the row table
  std::span<const double> weights;        // per term
  Rows out;
  std::optional<Rows> addend;  // rows y, one per output: a * y is added last
  double a;
  std::size_t d;  // elements of a row
  Dtype dtype;
  bool wide;  // accumulate in double whatever the dtype
};

// An output row may be a source of any outputs: it is then stored when the last of them has read
// it. It must not overlap a source in part. Rows do not overlap each other.
//
// Uses up to `num_threads` threads, fewer for small work. Allocates scratch for a
// block of columns of the rows that have to wait, 2 KiB or less of each where they are many. Throws
// std::invalid_argument, with nothing written, where a term names no row of the table or an output
// overlaps a source in part.
void weighted_sum(const WeightedSum& job, std::size_t num_threads);

// out[r] = sum_i x[r][i] * y[r][i], accumulated in double in 32 fixed lanes and a fixed tree.
void row_dot(const Rows& x, const Rows& y, std::size_t d, Dtype dtype, double* out,
             std::size_t num_threads);

// out = out + factors[0] * g[0] + factors[1] * g[1] + ..., each product and sum rounded, one row of
// d elements; rows whose factor is 0 are left out, whatever they hold. `out` is no row of g. Rows
// of 16 bits are rounded on the way.
void add_rows(const Rows& g, std::span<const double> factors, std::uintptr_t out, std::size_t d,
              Dtype dtype, std::size_t num_threads);

}  // namespace gossamer
