// Philox4x32-10 (Salmon et al., SC 2011), counter-based: element i of a stream is a pure function
// of (key, c1, c2, c3, i), so any range of any stream can be computed alone.
//
// Element i lies in block i / 4 (counter word c0), word i % 4; for Rademacher signs in block
// i / 128, word (i % 128) / 32, bit i % 32. A stream has 2^34 elements (signs 2^39).
//
//   uniform     u = (2 * (w >> 9) + 1) * 2^-24: exact in float32, never 0 or 1.
//   normal      Box-Muller, sqrt(-2 ln u(w0)) * (cos, sin)(2 pi u(w1)), and again with w2, w3;
//               evaluated in double to 2^-43 and rounded to float32, which is the nearest float32
//               but for about one value in a million.
//   rademacher  bit 0 gives +1, bit 1 gives -1.
//
// The bits of every result are a contract: the same on every instruction set, with any number of
// threads, whatever range is asked for. The functions of philox_cuda.h differ in normals alone.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "dtype.h"

namespace gossamer {

struct Stream {
  std::uint64_t key;
  std::uint32_t c1, c2, c3;
};

enum class Distribution : int { kUniform = 0, kNormal = 1, kRademacher = 2 };

// z of one direction. Where a mask is set, z is 0 at the elements whose word of the mask's stream
// (key, c1, mask_c2, mask_c3) is below `dropped`; 2^32 drops all, 0 none.
struct Direction {
  Distribution distribution;
  std::uint64_t key;
  std::uint32_t c2, c3;
  std::uint64_t dropped = 0;
  std::uint32_t mask_c2 = 0, mask_c3 = 0;
};

// n elements in memory that are elements begin.. of the streams with this c1. Any alignment.
struct Piece {
  std::uintptr_t address;
  std::size_t n;
  std::uint64_t begin;
  std::uint32_t c1;
};

struct ScaledDirection {
  Direction direction;
  double coefficient;
};

// A row of a filter's past, and what it is multiplied by.
struct KeptRow {
  std::uintptr_t address;
  double coefficient;
};

// A private gradient out of a clipped sum, with what follows it. Rows are like `sum`, in which the
// pieces lie; those that are written may be any that are read, but not each other, and rows that
// are not the same do not overlap.
struct Release {
  std::uintptr_t sum;
  std::span<const ScaledDirection> noise;
  double factor;
  double weight;  // of the noisy sum in `out`
  std::span<const KeptRow> kept;
  std::uintptr_t out;
  std::uintptr_t raw;  // gets the noisy sum times factor; 0: none
  std::uintptr_t x;    // gets scale * out added; 0: none
  double scale;
};

[[nodiscard]] std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                      std::uint64_t key) noexcept;

// out[0..n) = elements begin.. of the stream's words.
void fill_words(std::uint32_t* out, std::size_t n, std::uint64_t begin, const Stream& stream);

// out[0..n) = the normals of n words, as a stream with these words has them; n is a multiple of 4.
void normals_of_words(const std::uint32_t* words, std::size_t n, float* out);

// The four below work on pieces that do not overlap, with up to `num_threads` threads, fewer for
// small work. Arithmetic is in float (coefficients rounded to it first), in double for double
// pieces; z is the float32 value in every dtype; 16-bit results are rounded to nearest, ties to
// even.

// x = z.
void fill_random(std::span<const Piece> pieces, Dtype dtype, const Direction& direction,
                 std::size_t num_threads);
// x = fma(a, z, y), rounded once, then to the dtype. y is x; where `source` is not 0, the same
// elements of the tensor that begins there, which the pieces do not overlap.
void add_random(std::span<const Piece> pieces, Dtype dtype, const Direction& direction, double a,
                std::uintptr_t source, std::size_t num_threads);
// s = 0; for each term in order s = fma(coefficient, z, s); x = (x - s) - (decay * x), each
// operation rounded.
void subtract_random(std::span<const Piece> pieces, Dtype dtype,
                     std::span<const ScaledDirection> terms, double decay, std::size_t num_threads);
// s = sum; for each direction in order s = fma(coefficient, z, s); u = factor * s; y = weight * u;
// for each kept row in order y = y + coefficient * row; raw = u, out = y, x = x + scale * y. Each
// operation is rounded, so that in float and double the bits are those of add_random and
// weighted_sum one after another; 16-bit rows are rounded when they are stored, and only then.
void release_sum(std::span<const Piece> pieces, Dtype dtype, const Release& release,
                 std::size_t num_threads);

}  // namespace gossamer
