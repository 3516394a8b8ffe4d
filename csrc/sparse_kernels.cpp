// Compiled once per instruction set (GOSSAMER_ISA). Tokens are taken in tiles, transposed: a column
// of x is then a few vectors that stay in the cache, and an element of S multiplies all of them.
#include "sparse_kernels.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "lanes.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

template <typename Acc>
constexpr std::size_t kTokens = kTokenBytes / sizeof(Acc);
constexpr std::size_t kVectors = kTokenBytes / kVectorBytes;
constexpr std::size_t kSide = 8;  // rows of S, or columns of x, that are transposed together

template <typename Acc>
using Column = std::array<Vec<Acc>, kVectors>;

template <typename Acc>
Vec<Acc> add_product(Vec<Acc> x, Vec<Acc> y, Vec<Acc> sum) {
#if defined(__FMA__) || defined(__AVX512F__)
  return fused(x, y, sum);
#else
  return sum + x * y;
#endif
}

template <typename Acc>
Column<Acc> column_at(const Acc* p) {
  Column<Acc> column;
  for (std::size_t k = 0; k < kVectors; ++k) column[k] = load<Acc, Acc>(p + k * kLanes<Acc>);
  return column;
}

template <typename Acc>
void put(Acc* p, const Column<Acc>& column) {
  for (std::size_t k = 0; k < kVectors; ++k) store<Acc, Acc>(p + k * kLanes<Acc>, column[k]);
}

template <typename T>
const T* row_of(const Rows& rows, std::size_t n) {
  return reinterpret_cast<const T*>(rows.row(n));
}

// Columns begin..end of at most kTokens rows from `first` on, transposed; zeros for rows beyond.
template <typename T, typename Acc>
void pack(const Rows& rows, std::size_t first, std::size_t begin, std::size_t end, Acc* out) {
  const std::size_t count = std::min(kTokens<Acc>, rows.count - first);
  if (count < kTokens<Acc>) std::fill_n(out, (end - begin) * kTokens<Acc>, Acc{});
  for (std::size_t j = begin; j < end; j += kSide) {
    const std::size_t side = std::min(kSide, end - j);
    Acc* const to = out + (j - begin) * kTokens<Acc>;
    for (std::size_t n = 0; n < count; ++n) {
      const T* const from = row_of<T>(rows, first + n) + j;
      for (std::size_t k = 0; k < side; ++k) to[k * kTokens<Acc> + n] = load_one<T, Acc>(from + k);
    }
  }
}

// Adds packed columns to columns begin..end of the rows.
template <typename T, typename Acc>
void add_packed(const Acc* packed, const Rows& rows, std::size_t first, std::size_t begin,
                std::size_t end) {
  const std::size_t count = std::min(kTokens<Acc>, rows.count - first);
  for (std::size_t j = begin; j < end; j += kSide) {
    const std::size_t side = std::min(kSide, end - j);
    const Acc* const from = packed + (j - begin) * kTokens<Acc>;
    for (std::size_t n = 0; n < count; ++n) {
      T* const to = const_cast<T*>(row_of<T>(rows, first + n)) + j;
      for (std::size_t k = 0; k < side; ++k) {
        const Acc sum = load_one<T, Acc>(to + k) + from[k * kTokens<Acc> + n];
        store_one<T, Acc>(to + k, sum);
      }
    }
  }
}

template <typename T, typename Acc>
void add(const Support& s, const T* values, const Rows& x, const Rows& y, std::size_t first,
         Acc* scratch) {
  Acc* const columns = scratch;
  Acc* const sums = scratch + s.inputs * kTokens<Acc>;
  pack<T, Acc>(x, first, 0, s.inputs, columns);
  for (std::size_t begin = 0; begin < s.outputs; begin += kSide) {
    const std::size_t end = std::min(begin + kSide, s.outputs);
    for (std::size_t i = begin; i < end; ++i) {
      Column<Acc> sum{};
      const std::size_t base = i * s.inputs;
      for (std::int32_t k = s.starts[i]; k < s.starts[i + 1]; ++k) {
        const std::size_t j = static_cast<std::size_t>(s.indices[k]) - base;
        const Vec<Acc> value = Vec<Acc>{} + load_one<T, Acc>(values + k);
        const Column<Acc> column = column_at(columns + j * kTokens<Acc>);
        for (std::size_t v = 0; v < kVectors; ++v)
          sum[v] = add_product<Acc>(value, column[v], sum[v]);
      }
      put(sums + (i - begin) * kTokens<Acc>, sum);
    }
    add_packed<T, Acc>(sums, y, first, begin, end);
  }
}

template <typename T, typename Acc>
void add_back(const Support& s, const T* values, const Rows& g, const Rows& y, std::size_t first,
              Acc* scratch) {
  Acc* const sums = scratch;
  Acc* const rows = scratch + s.inputs * kTokens<Acc>;
  std::fill_n(sums, s.inputs * kTokens<Acc>, Acc{});
  for (std::size_t begin = 0; begin < s.outputs; begin += kSide) {
    const std::size_t end = std::min(begin + kSide, s.outputs);
    pack<T, Acc>(g, first, begin, end, rows);
    for (std::size_t i = begin; i < end; ++i) {
      const Column<Acc> row = column_at(rows + (i - begin) * kTokens<Acc>);
      const std::size_t base = i * s.inputs;
      for (std::int32_t k = s.starts[i]; k < s.starts[i + 1]; ++k) {
        const std::size_t j = static_cast<std::size_t>(s.indices[k]) - base;
        const Vec<Acc> value = Vec<Acc>{} + load_one<T, Acc>(values + k);
        Acc* const to = sums + j * kTokens<Acc>;
        Column<Acc> column = column_at<Acc>(to);
        for (std::size_t v = 0; v < kVectors; ++v)
          column[v] = add_product<Acc>(value, row[v], column[v]);
        put(to, column);
      }
    }
  }
  add_packed<T, Acc>(sums, y, first, 0, s.inputs);
}

template <typename Acc>
Acc lane_sum(Vec<Acc> v) {
  std::array<Acc, kLanes<Acc>> lanes;
  store<Acc, Acc>(lanes.data(), v);
  for (std::size_t half = kLanes<Acc> / 2; half > 0; half /= 2) {
    for (std::size_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

template <typename T, typename Acc>
void sample(const Support& s, const Rows& g, const Rows& x, T* out, std::size_t begin,
            std::size_t end, Acc* scratch) {
  Acc* const columns = scratch;
  Acc* const rows = columns + s.inputs * kTokens<Acc>;
  Acc* const sums = rows + kSide * kTokens<Acc>;  // of elements, in Acc until all tokens are in
  const std::int32_t origin = s.starts[begin];
  std::fill_n(sums, s.starts[end] - origin, Acc{});
  for (std::size_t first = 0; first < x.count; first += kTokens<Acc>) {
    pack<T, Acc>(x, first, 0, s.inputs, columns);
    for (std::size_t above = begin; above < end; above += kSide) {
      const std::size_t below = std::min(above + kSide, end);
      pack<T, Acc>(g, first, above, below, rows);
      for (std::size_t i = above; i < below; ++i) {
        const Column<Acc> row = column_at(rows + (i - above) * kTokens<Acc>);
        const std::size_t base = i * s.inputs;
        for (std::int32_t k = s.starts[i]; k < s.starts[i + 1]; ++k) {
          const std::size_t j = static_cast<std::size_t>(s.indices[k]) - base;
          const Column<Acc> column = column_at(columns + j * kTokens<Acc>);
          Vec<Acc> product = row[0] * column[0];
          for (std::size_t v = 1; v < kVectors; ++v)
            product = add_product<Acc>(row[v], column[v], product);
          sums[k - origin] += lane_sum<Acc>(product);
        }
      }
    }
  }
  for (std::int32_t k = origin; k < s.starts[end]; ++k)
    store_one<T, Acc>(out + k, sums[k - origin]);
}

void add_any(const Support& s, std::uintptr_t values, const Rows& x, const Rows& y, Dtype dtype,
             std::size_t first, std::byte* scratch) {
  as_type(dtype, [&]<typename T>(T*) {
    using Acc = Accumulator<T>;
    add<T, Acc>(s, reinterpret_cast<const T*>(values), x, y, first,
                reinterpret_cast<Acc*>(scratch));
  });
}

void add_back_any(const Support& s, std::uintptr_t values, const Rows& g, const Rows& y,
                  Dtype dtype, std::size_t first, std::byte* scratch) {
  as_type(dtype, [&]<typename T>(T*) {
    using Acc = Accumulator<T>;
    add_back<T, Acc>(s, reinterpret_cast<const T*>(values), g, y, first,
                     reinterpret_cast<Acc*>(scratch));
  });
}

void sample_any(const Support& s, const Rows& g, const Rows& x, std::uintptr_t out, Dtype dtype,
                std::size_t begin, std::size_t end, std::byte* scratch) {
  as_type(dtype, [&]<typename T>(T*) {
    using Acc = Accumulator<T>;
    sample<T, Acc>(s, g, x, reinterpret_cast<T*>(out), begin, end, reinterpret_cast<Acc*>(scratch));
  });
}

}  // namespace

extern const SparseKernels kSparseKernels{add_any, add_back_any, sample_any};

}  // namespace gossamer::GOSSAMER_ISA
