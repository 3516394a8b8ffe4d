// What the random kernels need of a vector unit, for sources compiled once per instruction set.
// Each operation is exact or rounded once, so that every set computes the same bits.
#pragma once

#include "elements.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gossamer::GOSSAMER_ISA {
namespace {

using Real = Vec<double>;
using Wide = Raw<std::uint64_t, double>;  // a 32-bit word per lane; the high half is garbage
using Floats = Vec<float>;                // twice the lanes of Real
using Words = Raw<std::uint32_t, float>;

constexpr std::size_t kReals = kLanes<double>;
constexpr std::size_t kFloats = kLanes<float>;

// multiply: the low words of the lanes, 32 x 32 -> 64 bits.
// fused: a * b + c rounded once; a call of the C library's where the set has no instruction.
// pack: the low words of a's lanes, then of b's.
// low_pairs, high_pairs: in each 16 bytes, a's and b's lower (upper) halves, interleaved by 4 bytes
// (float) or 8 (double).
#if defined(__AVX512F__)
inline Wide multiply(Wide a, Wide b) { return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
inline Real fused(Real a, Real b, Real c) { return _mm512_fmadd_pd(a, b, c); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Real square_root(Real a) { return _mm512_sqrt_pd(a); }
inline Words pack(Wide a, Wide b) {
  const __m256i low = _mm512_cvtepi64_epi32((__m512i)a), high = _mm512_cvtepi64_epi32((__m512i)b);
  return (Words)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
inline Floats low_pairs(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b); }
inline Floats high_pairs(Floats a, Floats b) { return _mm512_unpackhi_ps(a, b); }
inline Real low_pairs(Real a, Real b) { return _mm512_unpacklo_pd(a, b); }
inline Real high_pairs(Real a, Real b) { return _mm512_unpackhi_pd(a, b); }
#elif defined(__AVX2__)
inline Wide multiply(Wide a, Wide b) { return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline Real fused(Real a, Real b, Real c) { return _mm256_fmadd_pd(a, b, c); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Real square_root(Real a) { return _mm256_sqrt_pd(a); }
inline Words pack(Wide a, Wide b) {
  const auto mixed = (__m256d)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  return (Words)_mm256_permute4x64_pd(mixed, 0xD8);
}
inline Floats low_pairs(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
inline Floats high_pairs(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
inline Real low_pairs(Real a, Real b) { return _mm256_unpacklo_pd(a, b); }
inline Real high_pairs(Real a, Real b) { return _mm256_unpackhi_pd(a, b); }
#else
inline Real fused(Real a, Real b, Real c) {
  return Real{std::fma(a[0], b[0], c[0]), std::fma(a[1], b[1], c[1])};
}
inline Floats fused(Floats a, Floats b, Floats c) {
  return Floats{std::fma(a[0], b[0], c[0]), std::fma(a[1], b[1], c[1]), std::fma(a[2], b[2], c[2]),
                std::fma(a[3], b[3], c[3])};
}
inline Floats low_pairs(Floats a, Floats b) { return Floats{a[0], b[0], a[1], b[1]}; }
inline Floats high_pairs(Floats a, Floats b) { return Floats{a[2], b[2], a[3], b[3]}; }
inline Real low_pairs(Real a, Real b) { return Real{a[0], b[0]}; }
inline Real high_pairs(Real a, Real b) { return Real{a[1], b[1]}; }
#if defined(__SSE2__)
inline Wide multiply(Wide a, Wide b) { return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b); }
inline Real square_root(Real a) { return _mm_sqrt_pd(a); }
inline Words pack(Wide a, Wide b) { return (Words)_mm_shuffle_ps((__m128)a, (__m128)b, 0x88); }
#else
inline Wide multiply(Wide a, Wide b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
inline Real square_root(Real a) { return Real{std::sqrt(a[0]), std::sqrt(a[1])}; }
inline Words pack(Wide a, Wide b) {
  return Words{static_cast<std::uint32_t>(a[0]), static_cast<std::uint32_t>(a[1]),
               static_cast<std::uint32_t>(b[0]), static_cast<std::uint32_t>(b[1])};
}
#endif
#endif

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
