#include "philox.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "philox_kernels.h"
#include "threads.h"

namespace gossamer {
namespace {

constexpr std::size_t kPerThread = 1 << 16;  // elements: starting a thread costs a fraction of this
constexpr std::size_t kChunk = 1 << 14;      // elements a thread takes at a time

const PhiloxKernels& kernels() {
#ifdef GOSSAMER_X86
  if (isa() == Isa::kAvx512) return avx512::kPhiloxKernels;
  if (isa() == Isa::kAvx2) return avx2::kPhiloxKernels;
#endif
  return baseline::kPhiloxKernels;
}

// Calls work(part) for parts of the pieces, on as many threads as they are worth.
template <typename Work>
void for_parts(std::span<const Piece> pieces, Dtype dtype, std::size_t num_threads, Work work) {
  std::size_t total = 0;
  for (const Piece& piece : pieces) total += piece.n;
  num_threads =
      std::clamp<std::size_t>(total / kPerThread, 1, std::max<std::size_t>(num_threads, 1));
  if (num_threads == 1) {
    for (const Piece& piece : pieces) work(piece);
    return;
  }
  std::vector<Piece> parts;
  for (const Piece& piece : pieces) {
    for (std::size_t done = 0; done < piece.n; done += kChunk) {
      Piece part = piece;
      part.address += done * size_bytes(dtype);
      part.begin += done;
      part.n = std::min(kChunk, piece.n - done);
      parts.push_back(part);
    }
  }
  for_each(parts.size(), num_threads, [&](std::size_t i, std::size_t) { work(parts[i]); });
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
  kernels().words(out, n, begin, stream);
}

void normals_of_words(const std::uint32_t* words, std::size_t n, float* out) {
  kernels().normals(words, n, out);
}

void fill_random(std::span<const Piece> pieces, Dtype dtype, const Direction& direction,
                 std::size_t num_threads) {
  for_parts(pieces, dtype, num_threads,
            [&](const Piece& part) { kernels().fill(part, dtype, direction); });
}

void add_random(std::span<const Piece> pieces, Dtype dtype, const Direction& direction, double a,
                std::uintptr_t source, std::size_t num_threads) {
  for_parts(pieces, dtype, num_threads,
            [&](const Piece& part) { kernels().add(part, dtype, direction, a, source); });
}

void subtract_random(std::span<const Piece> pieces, Dtype dtype,
                     std::span<const ScaledDirection> terms, double decay,
                     std::size_t num_threads) {
  for_parts(pieces, dtype, num_threads,
            [&](const Piece& part) { kernels().subtract(part, dtype, terms, decay); });
}

void release_sum(std::span<const Piece> pieces, Dtype dtype, const Release& release,
                 std::size_t num_threads) {
  for_parts(pieces, dtype, num_threads,
            [&](const Piece& part) { kernels().release(part, dtype, release); });
}

}  // namespace gossamer
