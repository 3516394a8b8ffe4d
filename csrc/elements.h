// Vectors of this instruction set's width, and elements of each dtype read into them and rounded
// back to memory. For sources compiled once per instruction set (GOSSAMER_ISA) alone: everything is
// internal to the source that includes it, so that no two sets share a function.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t kVectorBytes = 32;
#else
constexpr std::size_t kVectorBytes = 16;
#endif

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

inline float to_float(float x) { return x; }
inline float to_float(_Float16 x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) {
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
    return __builtin_convertvector(std::bit_cast<Raw<float, Acc>>(wide), Vec<Acc>);
  } else {
    Raw<T, Acc> raw;
    std::memcpy(&raw, p, sizeof raw);
    const auto single = __builtin_convertvector(raw, Raw<float, Acc>);
    return __builtin_convertvector(single, Vec<Acc>);
  }
}

// Round to nearest, ties to even; a NaN stays a NaN.
inline BFloat16 to_bfloat16(float x) {
  if (std::isnan(x)) return {0x7FC0};
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return {static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

template <typename T, typename Acc>
void store(T* p, Vec<Acc> v) {
  if constexpr (std::is_same_v<T, Acc>) {
    std::memcpy(p, &v, sizeof v);
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // to_bfloat16(), lane by lane
    using Words = Raw<std::uint32_t, Acc>;
    const auto x = __builtin_convertvector(v, Raw<float, Acc>);
    const auto bits = std::bit_cast<Words>(x);
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Words chosen = x == x ? rounded : Words{} + 0x7FC0;
    const auto raw = __builtin_convertvector(chosen, Raw<std::uint16_t, Acc>);
    std::memcpy(p, &raw, sizeof raw);
  } else {
    const auto single = __builtin_convertvector(v, Raw<float, Acc>);
    const auto raw = __builtin_convertvector(single, Raw<T, Acc>);
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
  if constexpr (std::is_same_v<T, Acc>) {
    *p = v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    *p = to_bfloat16(static_cast<float>(v));
  } else {
    *p = static_cast<T>(static_cast<float>(v));
  }
}

// Calls f with a null pointer to the element type.
template <typename F>
auto as_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(static_cast<double*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<_Float16*>(nullptr));
    case Dtype::kFloat32:
      break;
  }
  return f(static_cast<float*>(nullptr));
}

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
