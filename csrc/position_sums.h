// Sums over the positions of single examples, (m, t, width) floats: what the gradients of a layer's
// parameters are, and how long, without one gradient beyond those that are sums already.
//
// The bits do not depend on the number of threads, nor on what stands beside an example; they do on
// the instruction set, unlike those of weighted_sum.h: its lanes are the order of the sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace gossamer {

// Rows of `width` floats: position t of example i is at i * example_bytes + t * position_bytes. Any
// alignment; rows may overlap.
struct Positions {
  std::uintptr_t address;
  std::size_t examples, positions, width;
  std::size_t example_bytes, position_bytes;
};

struct SquareAndMass {
  double square, mass;
};

// By Gram matrices that are never written down (ghost norms, arXiv:2009.03106): for each example
// squares[i] = sum_st <a_s, a_t> <e_s, e_t> = |sum_t e_t a_t^T|^2 and
// masses[i] = sum_t |a_t| |e_t|, lengths of at least `floor`. The inner products are float sums of
// at most gram_roundings() roundings each, all else is double. Both have the same examples and
// positions. Uses up to `num_threads` threads, fewer for small work.
void outer_squares(const Positions& a, const Positions& e, double floor,
                   std::span<SquareAndMass> out, std::size_t num_threads);

// The most roundings to float that a product has in an inner product of `width` elements.
[[nodiscard]] std::size_t gram_roundings(std::size_t width);

// sums[i * width + j] = sum_t e[i][t][j], in float and in the order of the positions, and masses[i]
// = sum_t |e_t|.
void position_sums(const Positions& e, std::span<float> sums, std::span<double> masses,
                   std::size_t num_threads);

// Which layer's n_t = (a_t - mean) / sqrt(variance + eps): LayerNorm's, or without the mean
// RMSNorm's.
struct Normal {
  double eps;
  bool centred;
};

// Of the gradients of a layer's scale, e_t n_t, and of its shift, e_t: sums and masses as above.
struct NormalSums {
  float* scale;
  float* shift;
  double* scale_mass;
  double* shift_mass;
};

// The pointers are to (m, width) and to (m,); a and e have the same shape.
void normal_sums(const Positions& a, const Positions& e, const Normal& normal,
                 const NormalSums& out, std::size_t num_threads);

}  // namespace gossamer
