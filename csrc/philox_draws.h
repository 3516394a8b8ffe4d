// Tiles of random numbers in the first-level cache, many counter blocks at a time. For sources
// compiled once per instruction set.
#pragma once

#include <array>

#include "lanes.h"
#include "philox.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// A tile is kBlocks counter blocks. Its loops are short and run one after another over the tile:
// the chains of one iteration depend on nothing in the next, which the processor overlaps.
constexpr std::size_t kBlocks = 96;
constexpr std::size_t kTile = 4 * kBlocks;
constexpr std::size_t kGroups = kBlocks / kReals;  // vectors of blocks in a tile

// Tiles of a stream start at multiples of this, so that no block is cut.
constexpr std::uint64_t kTileAlign = 128;

constexpr std::uint64_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57;

// Where each lane's block stands, so that unpacking puts whole blocks in order: groups come in
// pairs, and float k of a pair is of block (k % 4) * (kFloats / 4) + k / 4.
struct BlockOrder {
  Wide offset[2];

  BlockOrder() {
    for (std::size_t k = 0; k < kFloats; ++k) {
      offset[k / kReals][k % kReals] = (k % 4) * (kFloats / 4) + k / 4;
    }
  }
};

// Ten rounds of Philox for one stream. c1, c2 and c3 are the same in all blocks, so that half of
// the first two rounds is done once.
class Philox {
 public:
  explicit Philox(const Stream& s) {
    auto k0 = static_cast<std::uint32_t>(s.key), k1 = static_cast<std::uint32_t>(s.key >> 32);
    for (int round = 0; round < kRounds; ++round) {
      k0_[round] = Wide{} + k0;
      k1_[round] = Wide{} + k1;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    const std::uint64_t p1 = kM1 * s.c2;
    const std::uint64_t a0 = static_cast<std::uint32_t>((p1 >> 32) ^ s.c1 ^ k0_[0][0]);
    const std::uint64_t p0 = kM0 * a0;
    first_c3_ = k1_[0] ^ s.c3;
    second_c1_ = k0_[1] ^ (p1 & 0xFFFFFFFF);
    second_hi_ = k1_[1] ^ (p0 >> 32);
    second_c3_ = Wide{} + (p0 & 0xFFFFFFFF);
  }

  // words[4 g + w] = word w of the blocks of group g, for the tile's groups; the tile starts at
  // block `first`.
  void tile(std::uint64_t first, Wide* words) const {
    constexpr std::size_t kTogether = 3;  // so many chains hide the multiplications' latency
    static_assert(kGroups % kTogether == 0 && kGroups % 2 == 0);
    for (std::size_t g = 0; g < kGroups; g += kTogether) {
      Wide a[kTogether], b[kTogether], c[kTogether], d[kTogether];
      for (std::size_t i = 0; i < kTogether; ++i) {
        const std::uint64_t pair = first + (g + i) / 2 * kFloats;
        const Wide p0 = multiply(order_.offset[(g + i) % 2] + pair, Wide{} + kM0);
        const Wide p1 = multiply((p0 >> 32) ^ first_c3_, Wide{} + kM1);
        a[i] = (p1 >> 32) ^ second_c1_;
        b[i] = p1;
        c[i] = p0 ^ second_hi_;
        d[i] = second_c3_;
      }
      for (int round = 2; round < kRounds; ++round) {
        for (std::size_t i = 0; i < kTogether; ++i) {
          const Wide p0 = multiply(a[i], Wide{} + kM0), p1 = multiply(c[i], Wide{} + kM1);
          a[i] = (p1 >> 32) ^ (b[i] ^ k0_[round]);
          c[i] = (p0 >> 32) ^ (d[i] ^ k1_[round]);
          b[i] = p1;
          d[i] = p0;
        }
      }
      for (std::size_t i = 0; i < kTogether; ++i) {
        Wide* to = words + 4 * (g + i);
        to[0] = a[i], to[1] = b[i], to[2] = c[i], to[3] = d[i];
      }
    }
  }

 private:
  static constexpr int kRounds = 10;
  Wide k0_[kRounds], k1_[kRounds];
  Wide first_c3_, second_c1_, second_hi_, second_c3_;
  BlockOrder order_;
};

// out[0..4 kFloats) = the blocks of a pair of groups, whose words (or what came of them) are in
// the z: a block's four stand together.
void write_blocks(Floats z0, Floats z1, Floats z2, Floats z3, float* out) {
  const auto low01 = (Real)low_pairs(z0, z1), high01 = (Real)high_pairs(z0, z1);
  const auto low23 = (Real)low_pairs(z2, z3), high23 = (Real)high_pairs(z2, z3);
  store<float, float>(out, (Floats)low_pairs(low01, low23));
  store<float, float>(out + kFloats, (Floats)high_pairs(low01, low23));
  store<float, float>(out + 2 * kFloats, (Floats)low_pairs(high01, high23));
  store<float, float>(out + 3 * kFloats, (Floats)high_pairs(high01, high23));
}

void write_words(const Wide* words, std::uint32_t* out) {
  for (std::size_t g = 0; g < kGroups; g += 2) {
    const Wide* w = words + 4 * g;
    write_blocks((Floats)pack(w[0], w[4]), (Floats)pack(w[1], w[5]), (Floats)pack(w[2], w[6]),
                 (Floats)pack(w[3], w[7]), reinterpret_cast<float*>(out) + 4 * kReals * g);
  }
}

// --- normals
// --------------------------------------------------------------------------------------

constexpr double kTwo52 = 0x1p52;
constexpr std::uint64_t kTwo52Bits = 0x4330000000000000;  // 2^52 + n has the bits of n below these

// Minimax polynomials in y, fitted for the least relative error (given), rounded to double.
// -4 atanh(s) / s, y = s^2, |s| <= (sqrt(2) - 1) / (sqrt(2) + 1): 2^-45.1
constexpr double kLog[] = {-0x1.fffffffffff10p+1, -0x1.5555555672debp+0, -0x1.99999628a673dp-1,
                           -0x1.249439603081ep-1, -0x1.c6208ce15faaep-2, -0x1.9198130d3d019p-2};
// sin(pi x / 2) / x, y = x^2, |x| <= 1/2: 2^-47.7
constexpr double kSin[] = {0x1.921fb54442cf8p+0,  -0x1.4abbce62577b9p-1, 0x1.466bc670fd152p-4,
                           -0x1.32d2c6298b85bp-8, 0x1.5071bed41f7bcp-13, -0x1.dd4e53d99b415p-19};
// cos(pi x / 2), as above: 2^-43.8
constexpr double kCos[] = {0x1.ffffffffffdb1p-1,  -0x1.3bd3cc9bd098bp+0, 0x1.03c1f073cd285p-2,
                           -0x1.55d3b9724caf6p-6, 0x1.e1e76124b0ef5p-11, -0x1.a0d8a9cf01accp-16};

// x in units of 2^-30, as the words give it: the powers of two go into the coefficients.
constexpr double in_units(double coefficient, int power) {
  for (; power > 0; --power) coefficient *= 0x1p-30;
  return coefficient;
}

Real constant(double x) { return Real{} + x; }

// -2 ln u(w). u = m 2^k exactly, m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh((m - 1) / (m + 1)).
// Near u = 1, k is 0 and the result keeps its relative accuracy.
template <std::size_t kCount>
void minus_two_log(const Wide* words, std::size_t step, Real* out) {
  constexpr std::uint64_t kOne = 0x3FF0000000000000, kMantissa = 0x000FFFFFFFFFFFFF;
  constexpr std::uint64_t kRootHalf = 0x3FE6A09E00000000;
  constexpr double kTwoLn2 = 0x1.62e42fefa39efp+0;
  Real s[kCount], k[kCount], y[kCount], l[kCount];
  for (std::size_t i = 0; i < kCount; ++i) {
    const Wide bits = (words[i * step] & 0xFFFFFE00) | (kTwo52Bits | 0x100);
    const Real u32 = (Real)bits - kTwo52;  // 2^32 u
    const Wide scaled = (Wide)u32 + (kOne - kRootHalf);
    const auto m = (Real)((scaled & kMantissa) + kRootHalf);
    k[i] = (Real)((scaled >> 52) | kTwo52Bits) - (kTwo52 + 1023 + 32);
    s[i] = (m - 1.0) / (m + 1.0);
    y[i] = s[i] * s[i];
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    l[i] = fused(y[i], constant(kLog[5]), constant(kLog[4]));
  }
  for (int power = 3; power >= 0; --power) {
    for (std::size_t i = 0; i < kCount; ++i) l[i] = fused(l[i], y[i], constant(kLog[power]));
  }
  for (std::size_t i = 0; i < kCount; ++i) out[i] = fused(s[i], l[i], k[i] * -kTwoLn2);
}

// The floats of sin and cos of the angle in its quarter turn, times the radius, for two words of a
// group. Angles are in quarter turns 4 u = q + x with |x| <= 1/2: x is exact.
struct QuarterTurns {
  alignas(64) float sin[2][kBlocks], cos[2][kBlocks];

  void group(std::size_t g, const Wide* words, const Real* radius_squared) {
    Real x[2], y[2], s[2], c[2];
    for (int i = 0; i < 2; ++i) {
      const Wide bits = (words[2 * i + 1] & 0x3FFFFE00) ^ (kTwo52Bits | 0x20000100);
      x[i] = (Real)bits - (kTwo52 + 0x1p29);
      y[i] = x[i] * x[i];
    }
    for (int i = 0; i < 2; ++i) {
      c[i] = fused(y[i], constant(in_units(kCos[5], 10)), constant(in_units(kCos[4], 8)));
      s[i] = fused(y[i], constant(in_units(kSin[5], 11)), constant(in_units(kSin[4], 9)));
    }
    for (int power = 3; power >= 0; --power) {
      for (int i = 0; i < 2; ++i) {
        c[i] = fused(c[i], y[i], constant(in_units(kCos[power], 2 * power)));
        s[i] = fused(s[i], y[i], constant(in_units(kSin[power], 2 * power + 1)));
      }
    }
    for (int i = 0; i < 2; ++i) {
      const Real radius = square_root(radius_squared[i]);
      write(c[i] * radius, cos[i] + g * kReals);
      write(s[i] * (x[i] * radius), sin[i] + g * kReals);
    }
  }

  // The normals of a pair of groups in this pair of words: q turns and reflects.
  void turn(std::size_t i, std::size_t g, const Wide* words, Floats& z0, Floats& z1) const {
    Floats s, c;
    std::memcpy(&s, sin[i] + g * kReals, sizeof s);
    std::memcpy(&c, cos[i] + g * kReals, sizeof c);
    const Words q = pack(words[2 * i + 1], words[2 * i + 5]) + 0x20000000;  // top bits: q
    const Words odd = q + q;
    const auto swap = (Raw<std::int32_t, float>)odd < 0;
    z1 = (Floats)((Words)(swap ? c : s) ^ (q & 0x80000000));
    z0 = (Floats)((Words)(swap ? s : c) ^ ((q ^ odd) & 0x80000000));
  }

 private:
  static void write(Real v, float* out) {
    const auto rounded = __builtin_convertvector(v, Raw<float, double>);
    std::memcpy(out, &rounded, sizeof rounded);
  }
};

void write_normals(const Wide* words, float* out) {
  constexpr std::size_t kTogether = 4;
  static_assert(2 * kGroups % kTogether == 0);
  Real radius_squared[2 * kGroups];
  for (std::size_t i = 0; i < 2 * kGroups; i += kTogether) {
    minus_two_log<kTogether>(words + 2 * i, 2, radius_squared + i);
  }
  QuarterTurns turns;
  for (std::size_t g = 0; g < kGroups; ++g) turns.group(g, words + 4 * g, radius_squared + 2 * g);
  for (std::size_t g = 0; g < kGroups; g += 2) {
    Floats z0, z1, z2, z3;
    turns.turn(0, g, words + 4 * g, z0, z1);
    turns.turn(1, g, words + 4 * g, z2, z3);
    write_blocks(z0, z1, z2, z3, out + 4 * kReals * g);
  }
}

// --- tiles
// ----------------------------------------------------------------------------------------

constexpr auto kBits = [] {
  std::array<std::uint32_t, 32> bits{};
  for (std::size_t i = 0; i < 32; ++i) bits[i] = 1u << i;
  return bits;
}();

// The tiles of one direction for one tensor.
class Draws {
 public:
  Draws(const Direction& d, std::uint32_t c1)
      : distribution_(d.distribution),
        dropped_(d.dropped),
        philox_({d.key, c1, d.c2, d.c3}),
        mask_({d.key, c1, d.mask_c2, d.mask_c3}) {}

  // out[0..kTile) = elements begin..; begin is a multiple of kTileAlign.
  [[gnu::noinline]] void tile(std::uint64_t begin, float* out) {
    switch (distribution_) {
      case Distribution::kUniform:
        uniforms(begin, out);
        break;
      case Distribution::kNormal:
        philox_.tile(begin / 4, wide_);
        write_normals(wide_, out);
        break;
      case Distribution::kRademacher:
        signs(begin, out);
        break;
    }
    if (dropped_ > 0) drop(begin, out);
  }

 private:
  void uniforms(std::uint64_t begin, float* out) {
    philox_.tile(begin / 4, wide_);
    write_words(wide_, words_);
    for (std::size_t i = 0; i < kTile; ++i) {
      out[i] = static_cast<float>(static_cast<std::int32_t>(2 * (words_[i] >> 9) + 1)) * 0x1p-24f;
    }
  }

  // A tile of words has the signs of 32 tiles of elements.
  void signs(std::uint64_t begin, float* out) {
    const std::uint64_t word = begin / 32;
    if (!have_words_ || word < first_word_ || word + kTile / 32 > first_word_ + kTile) {
      philox_.tile(word / 4, wide_);
      write_words(wide_, words_);
      first_word_ = word;
      have_words_ = true;
    }
    const std::uint32_t* words = words_ + (word - first_word_);
    for (std::size_t k = 0; k < kTile; k += kFloats) {
      Words bit;
      std::memcpy(&bit, kBits.data() + k % 32, sizeof bit);
      const Words minus = (words[k / 32] & bit) != 0 ? Words{} + 0x80000000 : Words{};
      const Words z = minus | 0x3F800000;
      std::memcpy(out + k, &z, sizeof z);
    }
  }

  void drop(std::uint64_t begin, float* out) {
    mask_.tile(begin / 4, wide_);
    std::uint32_t words[kTile];
    write_words(wide_, words);
    const auto last = static_cast<std::uint32_t>(dropped_ - 1);  // 2^32 drops every word
    for (std::size_t i = 0; i < kTile; ++i) out[i] = words[i] <= last ? 0.0f : out[i];
  }

  Distribution distribution_;
  std::uint64_t dropped_;
  Philox philox_, mask_;
  bool have_words_ = false;
  std::uint64_t first_word_ = 0;
  Wide wide_[4 * kGroups];
  std::uint32_t words_[kTile];
};

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
