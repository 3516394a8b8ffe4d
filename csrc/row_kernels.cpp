// Compiled once per instruction set (GOSSAMER_ISA). Sums are elementwise and inner products use a
// fixed number of lanes, so that each set, whatever its vectors' width, computes the same bits.
#include "row_kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>

#define GOSSAMER_STRING2(x) #x
#define GOSSAMER_STRING(x) GOSSAMER_STRING2(x)

namespace gossamer::GOSSAMER_ISA {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t kVectorBytes = 32;
#else
constexpr std::size_t kVectorBytes = 16;
#endif

constexpr std::size_t kTile = 64;             // elements whose accumulators stay in registers
constexpr std::size_t kBlockBytes = 1 << 20;  // sources and scratch of a block stay in L2
constexpr std::size_t kMinBlockBytes = 512;   // below this, rows are read in too small pieces

struct BFloat16 {
  std::uint16_t bits;
};

template <typename E, std::size_t kCount>
struct VectorOf {
  typedef E type __attribute__((vector_size(kCount * sizeof(E))));
};
template <typename Acc>
constexpr std::size_t kLanes = kVectorBytes / sizeof(Acc);
template <typename E, typename Acc>  // as many E as there are lanes of Acc
using Raw = typename VectorOf<E, kLanes<Acc>>::type;
template <typename Acc>
using Vec = Raw<Acc, Acc>;

float to_float(float x) { return x; }
float to_float(_Float16 x) { return static_cast<float>(x); }
float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

template <typename T, typename Acc>
Vec<Acc> load(const T* p) {
  if constexpr (std::is_same_v<T, Acc>) {
    Vec<Acc> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    Raw<std::uint16_t, Acc> raw;
    std::memcpy(&raw, p, sizeof raw);
    const auto wide = __builtin_convertvector(raw, Raw<std::uint32_t, Acc>) << 16;
    return __builtin_convertvector(reinterpret_cast<const Raw<float, Acc>&>(wide), Vec<Acc>);
  } else {
    Raw<T, Acc> raw;
    std::memcpy(&raw, p, sizeof raw);
    return __builtin_convertvector(raw, Vec<Acc>);
  }
}

// Round to nearest, ties to even; a NaN stays a NaN.
BFloat16 to_bfloat16(float x) {
  if (std::isnan(x)) return {0x7FC0};
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return {static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

template <typename T, typename Acc>
void store(T* p, Vec<Acc> v) {
  if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(p, &v, sizeof v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    for (std::size_t i = 0; i < kLanes<Acc>; ++i) p[i] = to_bfloat16(static_cast<float>(v[i]));
  } else {
    const auto raw = __builtin_convertvector(v, Raw<T, Acc>);
    std::memcpy(p, &raw, sizeof raw);
  }
}

template <typename T, typename Acc>
Acc load_one(const T* p) {
  if constexpr (std::is_same_v<T, double>) {
    return *p;
  } else {
    return static_cast<Acc>(to_float(*p));
  }
}

template <typename T, typename Acc>
void store_one(T* p, Acc v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    *p = to_bfloat16(static_cast<float>(v));
  } else {
    *p = static_cast<T>(v);
  }
}

template <typename T>
const T* at(std::uintptr_t row, std::size_t offset) {
  return reinterpret_cast<const T*>(row) + offset;
}

// out[0..len) = the terms of output r at columns [begin, begin + len).
template <typename T, typename Acc>
void sum_row(const WeightedSum& job, std::size_t r, std::size_t begin, std::size_t len, T* out) {
  const std::int64_t first = job.indptr[r], last = job.indptr[r + 1];
  const Acc a = static_cast<Acc>(job.a);
  constexpr std::size_t kVectors = kTile / kLanes<Acc>;
  std::size_t i = 0;
  for (; i + kTile <= len; i += kTile) {
    Vec<Acc> acc[kVectors] = {};
    for (std::int64_t e = first; e < last; ++e) {
      const Acc w = static_cast<Acc>(job.weights[e]);
      const T* x = at<T>(job.rows[job.columns[e]], begin + i);
      if (e == first) {  // not 0 + w x, which would turn -0 into +0
        for (std::size_t v = 0; v < kVectors; ++v) acc[v] = w * load<T, Acc>(x + v * kLanes<Acc>);
      } else {
        for (std::size_t v = 0; v < kVectors; ++v) acc[v] += w * load<T, Acc>(x + v * kLanes<Acc>);
      }
    }
    if (job.addend != nullptr) {
      const T* y = at<T>(job.addend[r], begin + i);
      for (std::size_t v = 0; v < kVectors; ++v) acc[v] += a * load<T, Acc>(y + v * kLanes<Acc>);
    }
    for (std::size_t v = 0; v < kVectors; ++v) {
      store<T, Acc>(out + i + v * kLanes<Acc>, acc[v]);
    }
  }
  for (; i < len; ++i) {
    Acc acc = 0;
    for (std::int64_t e = first; e < last; ++e) {
      const Acc w = static_cast<Acc>(job.weights[e]);
      const Acc term = w * load_one<T, Acc>(at<T>(job.rows[job.columns[e]], begin + i));
      acc = e == first ? term : acc + term;
    }
    if (job.addend != nullptr) acc += a * load_one<T, Acc>(at<T>(job.addend[r], begin + i));
    store_one<T, Acc>(out + i, acc);
  }
}

// Columns go in blocks small enough that a source row read for one output is still in cache for
// the next: memory is read once and written once, whatever the degree.
template <typename T, typename Acc>
void run(const WeightedSum& job) {
  const std::size_t rows = std::max<std::size_t>(1, job.num_rows + (job.staged ? job.num_out : 0));
  std::size_t block = std::max(kBlockBytes / rows, kMinBlockBytes) / sizeof(T);
  block = std::max(kTile, block / kTile * kTile);
  block = std::min(block, job.d);
  std::unique_ptr<T[]> scratch;
  if (job.staged) scratch = std::make_unique_for_overwrite<T[]>(job.num_out * block);
  for (std::size_t begin = 0; begin < job.d; begin += block) {
    const std::size_t len = std::min(block, job.d - begin);
    for (std::size_t r = 0; r < job.num_out; ++r) {
      T* direct = reinterpret_cast<T*>(job.out[r]) + begin;
      sum_row<T, Acc>(job, r, begin, len, job.staged ? scratch.get() + r * block : direct);
    }
    if (!job.staged) continue;
    for (std::size_t r = 0; r < job.num_out; ++r) {
      std::memcpy(reinterpret_cast<T*>(job.out[r]) + begin, scratch.get() + r * block,
                  len * sizeof(T));
    }
  }
}

template <typename T>
void run_any(const WeightedSum& job) {
  job.wide ? run<T, double>(job) : run<T, float>(job);
}

void weighted_sum(const WeightedSum& job, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run_any<float>(job);
    case Dtype::kFloat64:
      return run<double, double>(job);
    case Dtype::kBFloat16:
      return run_any<BFloat16>(job);
    case Dtype::kFloat16:
      return run_any<_Float16>(job);
  }
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

template <typename T>
void dots(const std::uintptr_t* x, const std::uintptr_t* y, std::size_t num_rows, std::size_t d,
          double* out) {
  for (std::size_t r = 0; r < num_rows; ++r) out[r] = dot<T>(at<T>(x[r], 0), at<T>(y[r], 0), d);
}

void row_dot(const std::uintptr_t* x, const std::uintptr_t* y, std::size_t num_rows, std::size_t d,
             Dtype dtype, double* out) {
  switch (dtype) {
    case Dtype::kFloat32:
      return dots<float>(x, y, num_rows, d, out);
    case Dtype::kFloat64:
      return dots<double>(x, y, num_rows, d, out);
    case Dtype::kBFloat16:
      return dots<BFloat16>(x, y, num_rows, d, out);
    case Dtype::kFloat16:
      return dots<_Float16>(x, y, num_rows, d, out);
  }
}

}  // namespace

extern const RowKernels kKernels{GOSSAMER_STRING(GOSSAMER_ISA), weighted_sum, row_dot};

}  // namespace gossamer::GOSSAMER_ISA
