// Compiled once per instruction set (GOSSAMER_ISA). Loops without table look-ups are left to the
// compiler's vectors: each operation is rounded once, and the largest magnitude is one of integers.
#include "coded_adam_kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "elements.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

void decode(const CodedMoment& moment, std::size_t index, std::size_t len, float* out) {
  const std::uint8_t* codes = moment.codes + index * kCodedBlock;
  const float* values = moment.book.values;
  const float scale = moment.scales[index];
  for (std::size_t i = 0; i < len; ++i) out[i] = values[codes[i]] * scale;
}

// Overwrites `x`, of which it keeps nothing.
void encode(const CodedMoment& moment, std::size_t index, std::size_t len, float* x) {
  std::uint32_t largest = 0;  // the magnitudes of floats are in the order of their bits
  for (std::size_t i = 0; i < len; ++i) {
    largest = std::max(largest, std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFF);
  }
  const auto scale = std::bit_cast<float>(largest);
  moment.scales[index] = scale;
  const float divisor = largest == 0 ? 1.0f : scale;
  for (std::size_t i = 0; i < len; ++i) x[i] /= divisor;
  std::uint8_t* __restrict__ codes = moment.codes + index * kCodedBlock;
  const std::uint8_t* __restrict__ cells = moment.book.cells;
  const float* __restrict__ bounds = moment.book.bounds;
  for (std::size_t i = 0; i < len; ++i) {
    const std::size_t least = cells[std::bit_cast<std::uint32_t>(x[i]) >> 16];
    codes[i] = static_cast<std::uint8_t>(least + (bounds[least] < x[i]));
  }
}

constexpr std::size_t kFloats = kLanes<float>;

template <typename T>
void widen(const T* from, std::size_t len, float* to) {
  std::size_t i = 0;
  for (; i + kFloats <= len; i += kFloats) store<float, float>(to + i, load<T, float>(from + i));
  for (; i < len; ++i) to[i] = load_one<T, float>(from + i);
}

template <typename T>
void round_to(const float* from, std::size_t len, T* to) {
  std::size_t i = 0;
  for (; i + kFloats <= len; i += kFloats) store<T, float>(to + i, load<float, float>(from + i));
  for (; i < len; ++i) store_one<T, float>(to + i, from[i]);
}

template <typename T>
void step(const CodedAdam& job, std::size_t index) {
  alignas(64) float g[kCodedBlock], m[kCodedBlock], v[kCodedBlock];
  const std::size_t begin = index * kCodedBlock, len = std::min(kCodedBlock, job.count - begin);
  widen(reinterpret_cast<const T*>(job.grad) + begin, len, g);
  decode(job.m, index, len, m);
  decode(job.v, index, len, v);
  const AdamFactors f = job.factors;
  for (std::size_t i = 0; i < len; ++i) {
    m[i] = f.keep1 * m[i] + f.add1 * g[i];
    v[i] = f.keep2 * v[i] + f.add2 * (g[i] * g[i]);
    g[i] = (f.grow1 * m[i]) / (std::sqrt(f.grow2 * v[i]) + f.eps);
  }
  round_to(g, len, reinterpret_cast<T*>(job.direction) + begin);
  encode(job.m, index, len, m);
  encode(job.v, index, len, v);
}

void run(const CodedAdam& job, std::size_t index) {
  as_type(job.dtype, [&]<typename T>(T*) { step<T>(job, index); });
}

}  // namespace

extern const CodedAdamKernel kCodedAdam = run;

}  // namespace gossamer::GOSSAMER_ISA
