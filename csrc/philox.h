// Philox4x32-10 (Salmon et al., SC 2011), counter-based: element i of a stream is a pure function
// of (key, c1, c2, c3, i), so any range of any stream can be computed alone.
//
// Element i lies in block i / 4 (counter word c0), word i % 4; for Rademacher signs in block
// i / 128, word (i % 128) / 32, bit i % 32.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace gossamer {

struct Stream {
  std::uint64_t key;
  std::uint32_t c1, c2, c3;
};

[[nodiscard]] std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                      std::uint64_t key) noexcept;

// Each fills out[0..n) with elements begin..begin+n of the stream.
void fill_words(std::uint32_t* out, std::size_t n, std::uint64_t begin, const Stream& stream);
// (2 * (w >> 9) + 1) * 2^-24: exact in float, never 0 or 1.
template <typename T>
void fill_uniform(T* out, std::size_t n, std::uint64_t begin, const Stream& stream);
// Box-Muller in double, rounded to float32; words (w0, w1) give two normals, (w2, w3) two more.
template <typename T>
void fill_normal(T* out, std::size_t n, std::uint64_t begin, const Stream& stream);
// Bit 0 gives +1, bit 1 gives -1.
template <typename T>
void fill_rademacher(T* out, std::size_t n, std::uint64_t begin, const Stream& stream);

}  // namespace gossamer
