#include "philox.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace gossamer {
namespace {

double unit(std::uint32_t w) { return static_cast<double>(2 * (w >> 9) + 1) * 0x1p-24; }

// Calls visit(words, first, last, at) per block: words[first..last) go to out[at..].
template <typename Visit>
void for_blocks(std::size_t n, std::uint64_t begin, std::size_t per_block, const Stream& stream,
                Visit visit) {
  for (std::size_t done = 0; done < n;) {
    const std::uint64_t i = begin + done;
    const std::size_t first = i % per_block;
    const std::size_t last = std::min(per_block, first + (n - done));
    const auto block = static_cast<std::uint32_t>(i / per_block);
    visit(philox4x32({block, stream.c1, stream.c2, stream.c3}, stream.key), first, last, done);
    done += last - first;
  }
}

}  // namespace

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> c,
                                        std::uint64_t key) noexcept {
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

void fill_words(std::uint32_t* out, std::size_t n, std::uint64_t begin, const Stream& stream) {
  for_blocks(n, begin, 4, stream, [&](const auto& words, auto first, auto last, auto at) {
    for (auto i = first; i < last; ++i) out[at + i - first] = words[i];
  });
}

template <typename T>
void fill_uniform(T* out, std::size_t n, std::uint64_t begin, const Stream& stream) {
  for_blocks(n, begin, 4, stream, [&](const auto& words, auto first, auto last, auto at) {
    for (auto i = first; i < last; ++i) out[at + i - first] = static_cast<T>(unit(words[i]));
  });
}

template <typename T>
void fill_normal(T* out, std::size_t n, std::uint64_t begin, const Stream& stream) {
  for_blocks(n, begin, 4, stream, [&](const auto& words, auto first, auto last, auto at) {
    double z[4];
    for (int pair = 0; pair < 4; pair += 2) {
      const double radius = std::sqrt(-2.0 * std::log(unit(words[pair])));
      const double angle = 2.0 * std::numbers::pi * unit(words[pair + 1]);
      z[pair] = radius * std::cos(angle);
      z[pair + 1] = radius * std::sin(angle);
    }
    // float32 in every dtype: one stream has one value, whatever row it lands in.
    for (auto i = first; i < last; ++i) out[at + i - first] = static_cast<float>(z[i]);
  });
}

template <typename T>
void fill_rademacher(T* out, std::size_t n, std::uint64_t begin, const Stream& stream) {
  for_blocks(n, begin, 128, stream, [&](const auto& words, auto first, auto last, auto at) {
    for (auto i = first; i < last; ++i) {
      out[at + i - first] = (words[i / 32] >> (i % 32)) & 1 ? T{-1} : T{1};
    }
  });
}

#define GOSSAMER_INSTANTIATE(T)                                                 \
  template void fill_uniform<T>(T*, std::size_t, std::uint64_t, const Stream&); \
  template void fill_normal<T>(T*, std::size_t, std::uint64_t, const Stream&);  \
  template void fill_rademacher<T>(T*, std::size_t, std::uint64_t, const Stream&);
GOSSAMER_INSTANTIATE(float)
GOSSAMER_INSTANTIATE(double)
#undef GOSSAMER_INSTANTIATE

}  // namespace gossamer
