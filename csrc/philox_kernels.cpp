// Compiled once per instruction set (GOSSAMER_ISA). A tile of random numbers is made in cache and
// applied to the row in one pass: each element is read once and written once.
#include "philox_kernels.h"

#include "philox_draws.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Calls visit(first, at, skip, len): elements at..at + len of the piece are elements skip.. of the
// kSpan that start at element `first` of the stream.
template <std::size_t kSpan = kTile, typename Visit>
void for_tiles(std::size_t n, std::uint64_t begin, Visit visit) {
  const std::uint64_t end = begin + n;
  for (std::uint64_t first = begin - begin % kTileAlign; first < end; first += kSpan) {
    const std::uint64_t from = first < begin ? begin : first;
    const std::uint64_t to = first + kSpan < end ? first + kSpan : end;
    visit(first, from - begin, from - first, to - from);
  }
}

template <typename T>
void write_tile(const float* z, std::size_t len, T* x) {
  using Acc = Accumulator<T>;
  std::size_t i = 0;
  for (; i + kLanes<Acc> <= len; i += kLanes<Acc>) store<T, Acc>(x + i, load<float, Acc>(z + i));
  for (; i < len; ++i) store_one<T, Acc>(x + i, static_cast<Acc>(z[i]));
}

// x = fma(a, z, y).
template <typename T>
void add_tile(Accumulator<T> a, const float* z, std::size_t len, const T* y, T* x) {
  using Acc = Accumulator<T>;
  const Vec<Acc> scale = Vec<Acc>{} + a;
  std::size_t i = 0;
  for (; i + kLanes<Acc> <= len; i += kLanes<Acc>) {
    store<T, Acc>(x + i, fused(scale, load<float, Acc>(z + i), load<T, Acc>(y + i)));
  }
  for (; i < len; ++i) {
    store_one<T, Acc>(x + i, std::fma(a, static_cast<Acc>(z[i]), load_one<T, Acc>(y + i)));
  }
}

// sum = fma(a, z, sum) over a whole tile.
template <typename Acc>
void accumulate_tile(Acc a, const float* z, Acc* sum) {
  const Vec<Acc> scale = Vec<Acc>{} + a;
  for (std::size_t i = 0; i < kTile; i += kLanes<Acc>) {
    store<Acc, Acc>(sum + i, fused(scale, load<float, Acc>(z + i), load<Acc, Acc>(sum + i)));
  }
}

// The directions' sum over the kSpan elements from `first` on, added to `sum`.
constexpr std::size_t kSpan = 8 * kTile;  // what a direction is set up for at a time
template <typename Acc>
void accumulate_span(std::span<const ScaledDirection> terms, std::uint32_t c1, std::uint64_t first,
                     std::size_t len, Acc* sum) {
  alignas(64) float z[kTile];
  for (const ScaledDirection& term : terms) {
    Draws draws(term.direction, c1);
    const auto coefficient = static_cast<Acc>(term.coefficient);
    for (std::size_t k = 0; k < len; k += kTile) {
      draws.tile(first + k, z);
      accumulate_tile(coefficient, z, sum + k);
    }
  }
}

// x = (x - s) - (decay * x).
template <typename T>
void subtract_tile(const Accumulator<T>* s, Accumulator<T> decay, std::size_t len, T* x) {
  using Acc = Accumulator<T>;
  std::size_t i = 0;
  for (; i + kLanes<Acc> <= len; i += kLanes<Acc>) {
    const Vec<Acc> t = load<T, Acc>(x + i);
    store<T, Acc>(x + i, (t - load<Acc, Acc>(s + i)) - decay * t);
  }
  for (; i < len; ++i) {
    const Acc t = load_one<T, Acc>(x + i);
    store_one<T, Acc>(x + i, (t - s[i]) - decay * t);
  }
}

// sum = x.
template <typename T>
void read_tile(const T* x, std::size_t len, Accumulator<T>* sum) {
  using Acc = Accumulator<T>;
  std::size_t i = 0;
  for (; i + kLanes<Acc> <= len; i += kLanes<Acc>) store<Acc, Acc>(sum + i, load<T, Acc>(x + i));
  for (; i < len; ++i) sum[i] = load_one<T, Acc>(x + i);
}

// What follows the noise in release_sum, for elements that begin `offset_bytes` into the rows.
template <typename T>
void finish_release(const Release& job, std::size_t offset_bytes, const Accumulator<T>* sum,
                    std::size_t len) {
  using Acc = Accumulator<T>;
  const auto at = [&](std::uintptr_t row) { return reinterpret_cast<T*>(row + offset_bytes); };
  const auto factor = static_cast<Acc>(job.factor), weight = static_cast<Acc>(job.weight);
  const auto scale = static_cast<Acc>(job.scale);
  std::size_t i = 0;
  for (; i + kLanes<Acc> <= len; i += kLanes<Acc>) {
    const Vec<Acc> u = factor * load<Acc, Acc>(sum + i);
    Vec<Acc> y = weight * u;
    for (const KeptRow& row : job.kept) {
      y += static_cast<Acc>(row.coefficient) * load<T, Acc>(at(row.address) + i);
    }
    store<T, Acc>(at(job.out) + i, y);
    if (job.raw != 0) store<T, Acc>(at(job.raw) + i, u);
    if (job.x != 0) store<T, Acc>(at(job.x) + i, load<T, Acc>(at(job.x) + i) + scale * y);
  }
  for (; i < len; ++i) {
    const Acc u = factor * sum[i];
    Acc y = weight * u;
    for (const KeptRow& row : job.kept) {
      y += static_cast<Acc>(row.coefficient) * load_one<T, Acc>(at(row.address) + i);
    }
    store_one<T, Acc>(at(job.out) + i, y);
    if (job.raw != 0) store_one<T, Acc>(at(job.raw) + i, u);
    if (job.x != 0) store_one<T, Acc>(at(job.x) + i, load_one<T, Acc>(at(job.x) + i) + scale * y);
  }
}

void words(std::uint32_t* out, std::size_t n, std::uint64_t begin, const Stream& stream) {
  const Philox philox(stream);
  Wide wide[4 * kGroups];
  std::uint32_t tile[kTile];
  for_tiles(n, begin, [&](std::uint64_t first, std::size_t at, std::size_t skip, std::size_t len) {
    philox.tile(first / 4, wide);
    write_words(wide, tile);
    std::memcpy(out + at, tile + skip, len * sizeof *out);
  });
}

void normals(const std::uint32_t* words, std::size_t n, float* out) {
  const BlockOrder order;
  for (std::size_t i = 0; i < n; i += kTile) {
    const std::size_t len = n - i < kTile ? n - i : kTile;
    Wide wide[4 * kGroups] = {};
    for (std::size_t g = 0; g < kGroups; ++g) {
      for (std::size_t lane = 0; lane < kReals; ++lane) {
        const std::size_t block = g / 2 * kFloats + order.offset[g % 2][lane];
        for (std::size_t w = 0; w < 4 && 4 * block < len; ++w) {
          wide[4 * g + w][lane] = words[i + 4 * block + w];
        }
      }
    }
    float z[kTile];
    write_normals(wide, z);
    std::memcpy(out + i, z, len * sizeof *z);
  }
}

void fill(const Piece& piece, Dtype dtype, const Direction& direction) {
  Draws draws(direction, piece.c1);
  alignas(64) float z[kTile];
  as_type(dtype, [&]<typename T>(T*) {
    T* x = reinterpret_cast<T*>(piece.address);
    for_tiles(piece.n, piece.begin,
              [&](std::uint64_t first, std::size_t at, std::size_t skip, std::size_t len) {
                draws.tile(first, z);
                write_tile(z + skip, len, x + at);
              });
  });
}

void add(const Piece& piece, Dtype dtype, const Direction& direction, double a,
         std::uintptr_t source) {
  Draws draws(direction, piece.c1);
  alignas(64) float z[kTile];
  as_type(dtype, [&]<typename T>(T*) {
    T* x = reinterpret_cast<T*>(piece.address);
    const T* y = source == 0 ? x : reinterpret_cast<const T*>(source) + piece.begin;
    for_tiles(piece.n, piece.begin,
              [&](std::uint64_t first, std::size_t at, std::size_t skip, std::size_t len) {
                draws.tile(first, z);
                add_tile(static_cast<Accumulator<T>>(a), z + skip, len, y + at, x + at);
              });
  });
}

void subtract(const Piece& piece, Dtype dtype, std::span<const ScaledDirection> terms,
              double decay) {
  as_type(dtype, [&]<typename T>(T*) {
    T* x = reinterpret_cast<T*>(piece.address);
    using Acc = Accumulator<T>;
    alignas(64) Acc sum[kSpan];
    for_tiles<kSpan>(piece.n, piece.begin,
                     [&](std::uint64_t first, std::size_t at, std::size_t skip, std::size_t len) {
                       std::memset(sum, 0, sizeof sum);
                       accumulate_span(terms, piece.c1, first, skip + len, sum);
                       subtract_tile(sum + skip, static_cast<Acc>(decay), len, x + at);
                     });
  });
}

void release(const Piece& piece, Dtype dtype, const Release& job) {
  const std::size_t begin_bytes = piece.address - job.sum;
  as_type(dtype, [&]<typename T>(T*) {
    using Acc = Accumulator<T>;
    alignas(64) Acc sum[kSpan];
    for_tiles<kSpan>(piece.n, piece.begin,
                     [&](std::uint64_t first, std::size_t at, std::size_t skip, std::size_t len) {
                       const std::size_t offset_bytes = begin_bytes + at * sizeof(T);
                       std::memset(sum, 0, sizeof sum);
                       read_tile(reinterpret_cast<const T*>(job.sum + offset_bytes), len,
                                 sum + skip);
                       accumulate_span(job.noise, piece.c1, first, skip + len, sum);
                       finish_release<T>(job, offset_bytes, sum + skip, len);
                     });
  });
}

}  // namespace

extern const PhiloxKernels kPhiloxKernels{words, normals, fill, add, subtract, release};

}  // namespace gossamer::GOSSAMER_ISA
