// Compiled once per instruction set (GOSSAMER_ISA). Element i of an inner product is added to lane
// i % kFloats, with one rounding where the set can: bits differ from set to set, and nothing asks
// that they do not.
#include "position_kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "lanes.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Positions by positions whose float sums stay in 16 registers, with what is multiplied.
constexpr std::size_t kLeft = 4, kRight = 3;
constexpr std::size_t kBlock = 512;             // elements, after which sums go on in double
constexpr std::size_t kCacheBytes = 256 << 10;  // of a core's L2, for positions read repeatedly

#if defined(__FMA__) || defined(__AVX512F__)
constexpr bool kHasFused = true;
#else
constexpr bool kHasFused = false;
#endif

template <std::size_t kCount>
using Rows = std::array<const float*, kCount>;  // where the positions of a tile's side are
using Column = VectorOf<double, kLeft>::type;
using Tile = std::array<Column, kRight>;

Floats add_product(Floats x, Floats y, Floats sum) {
  if constexpr (kHasFused) {
    return fused(x, y, sum);
  } else {
    return sum + x * y;
  }
}

// The sum of each vector's lanes: in float where they are in one 16 bytes, in double of these.
Column sum_lanes(Floats v0, Floats v1, Floats v2, Floats v3) {
  static_assert(kLeft == 4);
  const Floats even = low_pairs(v0, v2) + high_pairs(v0, v2);
  const Floats odd = low_pairs(v1, v3) + high_pairs(v1, v3);
  const Floats quads = low_pairs(even, odd) + high_pairs(even, odd);
  float lanes[kFloats];
  store<float, float>(lanes, quads);
  Column sums = {};
  for (std::size_t k = 0; k < kFloats / kLeft; ++k) {
    VectorOf<float, kLeft>::type quad;
    std::memcpy(&quad, lanes + k * kLeft, sizeof quad);
    sums += __builtin_convertvector(quad, Column);
  }
  return sums;
}

// Adds the inner products of each x with each y over whole vectors in [begin, end).
void add_products(const Rows<kLeft>& x, const Rows<kRight>& y, std::size_t begin, std::size_t end,
                  Tile& sums) {
  Floats acc[kRight][kLeft];
  for (auto& column : acc) {
    for (Floats& lanes : column) lanes = Floats{};
  }
  for (std::size_t i = begin; i < end; i += kFloats) {
    Floats right[kRight];
    for (std::size_t c = 0; c < kRight; ++c) right[c] = load<float, float>(y[c] + i);
    for (std::size_t r = 0; r < kLeft; ++r) {
      const Floats left = load<float, float>(x[r] + i);
      for (std::size_t c = 0; c < kRight; ++c) acc[c][r] = add_product(left, right[c], acc[c][r]);
    }
  }
  for (std::size_t c = 0; c < kRight; ++c)
    sums[c] += sum_lanes(acc[c][0], acc[c][1], acc[c][2], acc[c][3]);
}

// The inner products of each x with each y.
Tile products(const Rows<kLeft>& x, const Rows<kRight>& y, std::size_t width) {
  Tile sums;
  for (Column& column : sums) column = Column{};
  const std::size_t whole = width - width % kFloats;
  for (std::size_t begin = 0; begin < whole; begin += kBlock) {
    add_products(x, y, begin, std::min(begin + kBlock, whole), sums);
  }
  for (std::size_t i = whole; i < width; ++i) {
    for (std::size_t c = 0; c < kRight; ++c) {
      for (std::size_t r = 0; r < kLeft; ++r) sums[c][r] += static_cast<double>(x[r][i]) * y[c][i];
    }
  }
  return sums;
}

const float* row_of(const Positions& of, std::size_t example, std::size_t position) {
  return reinterpret_cast<const float*>(of.address + example * of.example_bytes +
                                        position * of.position_bytes);
}

// The positions from `first` on, before `end`; then the last one again.
template <std::size_t kCount>
Rows<kCount> rows_from(const Positions& of, std::size_t example, std::size_t first,
                       std::size_t end) {
  Rows<kCount> rows;
  for (std::size_t k = 0; k < kCount; ++k) {
    const std::size_t position = std::min(first + k, end - 1);
    rows[k] = row_of(of, example, position);
  }
  return rows;
}

SquareAndMass square(const Positions& a, const Positions& e, std::size_t example, double floor) {
  const std::size_t position_bytes = std::max<std::size_t>((a.width + e.width) * sizeof(float), 1);
  const std::size_t block = std::max(kCacheBytes / position_bytes, kRight);
  Tile above = {};  // of pairs s < t, which count twice: (t, s) gives the same
  double diagonal = 0, mass = 0;
  for (std::size_t begin = 0; begin < a.positions; begin += block) {
    const std::size_t end = std::min(begin + block, a.positions);
    for (std::size_t s = 0; s < end; s += kLeft) {
      const auto a_s = rows_from<kLeft>(a, example, s, end);
      const auto e_s = rows_from<kLeft>(e, example, s, end);
      for (std::size_t t = std::max(s, begin); t < end; t += kRight) {
        const Tile in = products(a_s, rows_from<kRight>(a, example, t, end), a.width);
        const Tile back = products(e_s, rows_from<kRight>(e, example, t, end), e.width);
        if (s + kLeft <= t && t + kRight <= end) {
          for (std::size_t c = 0; c < kRight; ++c) above[c] += in[c] * back[c];
          continue;
        }
        for (std::size_t c = 0; c < std::min(kRight, end - t); ++c) {
          for (std::size_t r = 0; r < kLeft && s + r < t + c; ++r) {
            above[c][r] += in[c][r] * back[c][r];
          }
          if (t + c < s + kLeft) {
            const double aa = in[c][t + c - s], ee = back[c][t + c - s];
            diagonal += aa * ee;
            mass += std::max(std::sqrt(aa), floor) * std::max(std::sqrt(ee), floor);
          }
        }
      }
    }
  }
  double twice = 0;
  for (const Column& column : above) {
    for (std::size_t r = 0; r < kLeft; ++r) twice += column[r];
  }
  return {diagonal + 2 * twice, mass};
}

std::size_t gram_roundings(std::size_t width) {
  const std::size_t in_a_lane = (std::min(width, kBlock) + kFloats - 1) / kFloats;
  return in_a_lane + (kHasFused ? 0 : 1) + 2;  // 2: in sum_lanes
}

// Elements from `i` on; `fill` where there are no more than `width`.
Floats load_from(const float* row, std::size_t i, std::size_t width, float fill) {
  if (i + kFloats <= width) return load<float, float>(row + i);
  Floats v = Floats{} + fill;
  std::memcpy(&v, row + i, (width - i) * sizeof(float));
  return v;
}

void add_to(float* row, std::size_t i, std::size_t width, Floats v) {
  const Floats sum = load_from(row, i, width, 0) + v;
  if (i + kFloats <= width) return store<float, float>(row + i, sum);
  std::memcpy(row + i, &sum, (width - i) * sizeof(float));
}

double lane_sum(Floats v) {
  double sum = 0;
  for (std::size_t k = 0; k < kFloats; ++k) sum += v[k];
  return sum;
}

void sum(const Positions& e, std::size_t example, float* sum, double* mass) {
  std::fill_n(sum, e.width, 0.0f);
  *mass = 0;
  for (std::size_t t = 0; t < e.positions; ++t) {
    const float* row = row_of(e, example, t);
    Floats squares = {};
    for (std::size_t i = 0; i < e.width; i += kFloats) {
      const Floats v = load_from(row, i, e.width, 0);
      add_to(sum, i, e.width, v);
      squares = add_product(v, v, squares);
    }
    *mass += std::sqrt(lane_sum(squares));
  }
}

void sum_normal(const Positions& a, const Positions& e, const Normal& normal, std::size_t example,
                NormalSums out) {
  const std::size_t width = e.width;
  std::fill_n(out.scale, width, 0.0f);
  std::fill_n(out.shift, width, 0.0f);
  *out.scale_mass = *out.shift_mass = 0;
  for (std::size_t t = 0; t < e.positions; ++t) {
    const float *in = row_of(a, example, t), *back = row_of(e, example, t);
    Floats total = {}, squares = {};
    if (normal.centred) {
      for (std::size_t i = 0; i < width; i += kFloats) total += load_from(in, i, width, 0);
    }
    const auto mean = static_cast<float>(lane_sum(total) / static_cast<double>(width));
    for (std::size_t i = 0; i < width; i += kFloats) {
      const Floats apart = load_from(in, i, width, mean) - mean;
      squares = add_product(apart, apart, squares);
    }
    const double variance = lane_sum(squares) / static_cast<double>(width);
    const auto scale = static_cast<float>(1 / std::sqrt(variance + normal.eps));
    Floats scale_squares = {}, shift_squares = {};
    for (std::size_t i = 0; i < width; i += kFloats) {
      const Floats shift = load_from(back, i, width, 0);
      const Floats product = shift * ((load_from(in, i, width, mean) - mean) * scale);
      add_to(out.scale, i, width, product);
      add_to(out.shift, i, width, shift);
      scale_squares = add_product(product, product, scale_squares);
      shift_squares = add_product(shift, shift, shift_squares);
    }
    *out.scale_mass += std::sqrt(lane_sum(scale_squares));
    *out.shift_mass += std::sqrt(lane_sum(shift_squares));
  }
}

}  // namespace

extern const PositionKernels kPositionKernels{square, gram_roundings, sum, sum_normal};

}  // namespace gossamer::GOSSAMER_ISA
