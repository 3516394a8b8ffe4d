// Compiled once per instruction set (GOSSAMER_ISA). Sums are elementwise and inner products use a
// fixed number of lanes, so that each set, whatever its vectors' width, computes the same bits.
#include "row_kernels.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <type_traits>

#include "elements.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gossamer::GOSSAMER_ISA {
namespace {

#if defined(__AVX512F__)
void stream_vector(float* p, __m512 v) { _mm512_stream_ps(p, v); }
void stream_vector(double* p, __m512d v) { _mm512_stream_pd(p, v); }
#elif defined(__AVX2__)
void stream_vector(float* p, __m256 v) { _mm256_stream_ps(p, v); }
void stream_vector(double* p, __m256d v) { _mm256_stream_pd(p, v); }
#elif defined(__SSE2__)
void stream_vector(float* p, __m128 v) { _mm_stream_ps(p, v); }
void stream_vector(double* p, __m128d v) { _mm_stream_pd(p, v); }
#endif
#if defined(__SSE2__)
constexpr bool kHasStream = true;
void stream_fence() { _mm_sfence(); }
#else
constexpr bool kHasStream = false;
#endif

constexpr std::size_t kTile = 64;  // elements whose accumulators stay in registers
constexpr std::size_t kLineBytes = 64;

// A store that leaves the cache alone: the line is not read first. `p` is a multiple of
// kVectorBytes.
template <typename T, typename Acc>
void stream(T* p, Vec<Acc> v) {
  if constexpr (kHasStream && std::is_same_v<T, Acc>) {
    stream_vector(p, v);
  } else {
    store<T, Acc>(p, v);
  }
}

template <typename T>
const T* at(const Term& term, std::size_t offset) {
  return reinterpret_cast<const T*>(term.row) + offset;
}

// Into cache what the next output reads at `offset`: rows far apart defeat the hardware's guess.
template <typename T>
void prefetch(std::span<const Term> terms, std::size_t offset) {
  for (const Term& term : terms) {
    const auto* line = reinterpret_cast<const char*>(at<T>(term, offset));
    for (std::size_t b = 0; b < kTile * sizeof(T); b += kLineBytes) __builtin_prefetch(line + b);
  }
}

// out[0..len) = the sum of the terms at columns [begin, begin + len).
template <typename T, typename Acc, bool kStream>
void sum_row(std::span<const Term> terms, std::span<const Term> next, std::size_t begin,
             std::size_t len, T* out) {
  constexpr std::size_t kVectors = kTile / kLanes<Acc>;
  std::size_t i = 0;
  for (; i + kTile <= len; i += kTile) {
    prefetch<T>(next, begin + i);
    Vec<Acc> acc[kVectors] = {};
    bool first = true;
    for (const Term& term : terms) {
      const Acc w = static_cast<Acc>(term.weight);
      const T* x = at<T>(term, begin + i);
      if (first) {  // not 0 + w x, which would turn -0 into +0
        for (std::size_t v = 0; v < kVectors; ++v) acc[v] = w * load<T, Acc>(x + v * kLanes<Acc>);
      } else {
        for (std::size_t v = 0; v < kVectors; ++v) acc[v] += w * load<T, Acc>(x + v * kLanes<Acc>);
      }
      first = false;
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
      T* to = out + i + v * kLanes<Acc>;
      kStream ? stream<T, Acc>(to, acc[v]) : store<T, Acc>(to, acc[v]);
    }
  }
  for (; i < len; ++i) {
    Acc acc = 0;
    bool first = true;
    for (const Term& term : terms) {
      const Acc product = static_cast<Acc>(term.weight) * load_one<T, Acc>(at<T>(term, begin + i));
      acc = first ? product : acc + product;
      first = false;
    }
    store_one<T, Acc>(out + i, acc);
  }
}

template <typename T, typename Acc>
void sum_block(const Schedule& schedule, const Block& block) {
  const std::size_t begin = block.begin, len = block.len;
  auto* scratch = static_cast<T*>(block.scratch);
  const std::span<const Term> all = schedule.terms;
  const auto terms_of = [&](std::size_t r) {
    if (r >= schedule.outputs.size()) return std::span<const Term>();
    const Schedule::Output& output = schedule.outputs[r];
    return all.subspan(output.first_term, output.last_term - output.first_term);
  };
  for (std::size_t r = 0; r < schedule.outputs.size(); ++r) {
    const Schedule::Output& output = schedule.outputs[r];
    const auto terms = terms_of(r);
    const auto next = block.prefetch ? terms_of(r + 1) : std::span<const Term>();
    T* direct = reinterpret_cast<T*>(output.row) + begin;
    if (output.slot != Schedule::kDirect) {
      sum_row<T, Acc, false>(terms, next, begin, len, scratch + output.slot * len);
    } else if (block.stream && reinterpret_cast<std::uintptr_t>(direct) % kVectorBytes == 0) {
      sum_row<T, Acc, true>(terms, next, begin, len, direct);
    } else {
      sum_row<T, Acc, false>(terms, next, begin, len, direct);
    }
    for (std::size_t s = output.first_store; s < output.last_store; ++s) {
      const Schedule::Output& ready = schedule.outputs[schedule.stores[s]];
      std::memcpy(reinterpret_cast<T*>(ready.row) + begin, scratch + ready.slot * len,
                  len * sizeof(T));
    }
  }
  if constexpr (kHasStream) stream_fence();
}

template <typename T>
void sum_any(const Schedule& schedule, const Block& block, bool wide) {
  wide ? sum_block<T, double>(schedule, block) : sum_block<T, float>(schedule, block);
}

void sum_rows(const Schedule& schedule, const Block& block, Dtype dtype, bool wide) {
  switch (dtype) {
    case Dtype::kFloat32:
      return sum_any<float>(schedule, block, wide);
    case Dtype::kFloat64:
      return sum_block<double, double>(schedule, block);
    case Dtype::kBFloat16:
      return sum_any<BFloat16>(schedule, block, wide);
    case Dtype::kFloat16:
      return sum_any<_Float16>(schedule, block, wide);
  }
}

template <typename T, typename Acc>
void sum_one_as(std::span<const Term> terms, std::size_t begin, std::size_t len, std::uintptr_t to,
                bool stream) {
  T* out = reinterpret_cast<T*>(to);
  if (stream && to % kVectorBytes == 0) {
    sum_row<T, Acc, true>(terms, {}, begin, len, out);
    if constexpr (kHasStream) stream_fence();
  } else {
    sum_row<T, Acc, false>(terms, {}, begin, len, out);
  }
}

void sum_one(std::span<const Term> terms, std::size_t begin, std::size_t len, std::uintptr_t out,
             Dtype dtype, bool stream) {
  as_type(dtype,
          [&]<typename T>(T*) { sum_one_as<T, Accumulator<T>>(terms, begin, len, out, stream); });
}

void copy(const std::byte* from, std::byte* to, std::size_t bytes) {
  std::size_t i = 0;
  if constexpr (kHasStream) {
    const std::size_t head = (kVectorBytes - reinterpret_cast<std::uintptr_t>(to)) % kVectorBytes;
    i = std::min(head, bytes);
    std::memcpy(to, from, i);
    for (; i + kVectorBytes <= bytes; i += kVectorBytes) {
      stream_vector(reinterpret_cast<float*>(to + i),
                    load<float, float>(reinterpret_cast<const float*>(from + i)));
    }
    stream_fence();
  }
  std::memcpy(to + i, from + i, bytes - i);
}

void divide(std::uintptr_t x, std::size_t len, double by, Dtype dtype) {
  as_type(dtype, [&]<typename T>(T*) {
    using Acc = Accumulator<T>;
    T* p = reinterpret_cast<T*>(x);
    const Acc d = static_cast<Acc>(by);
    std::size_t i = 0;
    for (; i + kLanes<Acc> <= len; i += kLanes<Acc>) {
      const Vec<Acc> quotient = load<T, Acc>(p + i) / d;
      store<T, Acc>(p + i, quotient);
    }
    for (; i < len; ++i) store_one<T, Acc>(p + i, load_one<T, Acc>(p + i) / d);
  });
}

// Element i is added to lane i % 32; then the lanes are added in a fixed tree, then the rest.
template <typename T>
double dot(const T* x, const T* y, std::size_t d) {
  constexpr std::size_t kWidth = 32;
  constexpr std::size_t kVectors = kWidth / kLanes<double>;
  Vec<double> acc[kVectors] = {};
  std::size_t i = 0;
  for (; i + kWidth <= d; i += kWidth) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      const std::size_t k = i + v * kLanes<double>;
      acc[v] += load<T, double>(x + k) * load<T, double>(y + k);
    }
  }
  double lanes[kWidth];
  std::memcpy(lanes, acc, sizeof lanes);
  for (std::size_t half = kWidth / 2; half > 0; half /= 2) {
    for (std::size_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  double sum = lanes[0];
  for (; i < d; ++i) sum += load_one<T, double>(x + i) * load_one<T, double>(y + i);
  return sum;
}

double dot_row(std::uintptr_t x, std::uintptr_t y, std::size_t d, Dtype dtype) {
  return as_type(dtype, [&]<typename T>(T*) {
    return dot(reinterpret_cast<const T*>(x), reinterpret_cast<const T*>(y), d);
  });
}

}  // namespace

extern const RowKernels kKernels{sum_rows, sum_one, copy, divide, dot_row};

}  // namespace gossamer::GOSSAMER_ISA
