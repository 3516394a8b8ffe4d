// One thread makes one counter block: four elements, one vector load and store where they are
// aligned. Every multiplication and addition that could be contracted is written out (nvcc
// contracts by default), so that results do not depend on the compiler.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "elements_cuda.h"
#include "philox_cuda.h"

namespace gossamer {
namespace {

constexpr unsigned kThreads = 256;
constexpr std::size_t kMostBlocks = 1 << 14;  // of threads; beyond these each thread does several
constexpr std::size_t kTermsByValue = 64;     // they fit into a kernel's parameters (4 KiB)
constexpr std::size_t kReleasedByValue = 16;  // directions of noise, and kept rows

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

// --- random numbers -------------------------------------------------------------------------

__device__ uint4 philox(std::uint64_t block, const Stream& s) {
  uint4 c = make_uint4(static_cast<unsigned>(block), s.c1, s.c2, s.c3);
  auto k0 = static_cast<unsigned>(s.key), k1 = static_cast<unsigned>(s.key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const unsigned high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

__device__ float uniform(unsigned w) { return static_cast<float>(2 * (w >> 9) + 1) * 0x1p-24f; }

__device__ void normals(unsigned w0, unsigned w1, float* z) {
  const float radius = sqrtf(-2.0f * logf(uniform(w0)));
  float s, c;
  sincospif(2.0f * uniform(w1), &s, &c);
  z[0] = radius * c;
  z[1] = radius * s;
}

// z[0..4) = elements 4 quad.. of the direction for the tensor c1.
__device__ void draw(const Direction& d, std::uint32_t c1, std::uint64_t quad, float* z) {
  const Stream stream{d.key, c1, d.c2, d.c3};
  if (d.distribution == Distribution::kRademacher) {
    const uint4 words = philox(quad / 32, stream);
    const unsigned part = quad % 32 / 8;
    const unsigned low = part & 1 ? words.y : words.x, high = part & 1 ? words.w : words.z;
    const unsigned bits = (part & 2 ? high : low) >> (quad % 8 * 4);
    for (int i = 0; i < 4; ++i) z[i] = bits >> i & 1 ? -1.0f : 1.0f;
  } else {
    const uint4 words = philox(quad, stream);
    if (d.distribution == Distribution::kNormal) {
      normals(words.x, words.y, z);
      normals(words.z, words.w, z + 2);
    } else {
      z[0] = uniform(words.x), z[1] = uniform(words.y);
      z[2] = uniform(words.z), z[3] = uniform(words.w);
    }
  }
  if (d.dropped > 0) {
    const uint4 words = philox(quad, {d.key, c1, d.mask_c2, d.mask_c3});
    z[0] = words.x < d.dropped ? 0.0f : z[0];
    z[1] = words.y < d.dropped ? 0.0f : z[1];
    z[2] = words.z < d.dropped ? 0.0f : z[2];
    z[3] = words.w < d.dropped ? 0.0f : z[3];
  }
}

// --- kernels --------------------------------------------------------------------------------

template <typename T>
struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) Quad {
  T at[4];
};

// Elements 4 quad.. of the stream that lie in the piece: those from `first` to `last`. The quad's
// own first would stand at `offset` from the piece's, in any row laid out like the piece's.
struct Place {
  std::int64_t offset;
  int first, last;
};

__device__ Place place_of(const Piece& piece, std::uint64_t quad) {
  const auto offset = static_cast<std::int64_t>(4 * quad - piece.begin);
  const std::int64_t left = static_cast<std::int64_t>(piece.n) - offset;
  return {offset, offset < 0 ? static_cast<int>(-offset) : 0,
          left < 4 ? static_cast<int>(left) : 4};
}

// Reads and writes the elements of the place alone; `row` is where the piece begins. `aligned`:
// quads of the row are.
template <typename T>
__device__ Quad<T> read_quad(const T* row, const Place& place, bool aligned) {
  if (aligned && place.first == 0 && place.last == 4) {
    return *reinterpret_cast<const Quad<T>*>(row + place.offset);
  }
  Quad<T> values{};
  for (int i = 0; i < 4; ++i) {
    if (i >= place.first && i < place.last) values.at[i] = row[place.offset + i];
  }
  return values;
}

template <typename T>
__device__ void write_quad(T* row, const Place& place, bool aligned, const Quad<T>& values) {
  if (aligned && place.first == 0 && place.last == 4) {
    *reinterpret_cast<Quad<T>*>(row + place.offset) = values;
    return;
  }
  for (int i = 0; i < 4; ++i) {
    if (i >= place.first && i < place.last) row[place.offset + i] = values.at[i];
  }
}

// Whether the quads of a row are aligned, whose element at `address` is element `begin` of the
// stream.
template <typename T>
__host__ __device__ bool quads_aligned(std::uintptr_t address, std::uint64_t begin) {
  return (address - begin * sizeof(T)) % alignof(Quad<T>) == 0;
}

// Calls visit(quad, place) for the quads of the piece, one per thread.
template <typename Visit>
__device__ void for_quads(const Piece& piece, Visit visit) {
  const std::uint64_t stop = (piece.begin + piece.n + 3) / 4;
  const std::uint64_t stride = std::uint64_t{gridDim.x} * blockDim.x;
  for (std::uint64_t quad = piece.begin / 4 + std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       quad < stop; quad += stride) {
    visit(quad, place_of(piece, quad));
  }
}

// Calls change(quad, values) with the quads of the piece and writes the values back.
template <typename T, bool kRead, typename Change>
__device__ void change_quads(const Piece& piece, Change change) {
  T* x = reinterpret_cast<T*>(piece.address);
  const bool aligned = quads_aligned<T>(piece.address, piece.begin);
  for_quads(piece, [&](std::uint64_t quad, const Place& place) {
    Quad<T> values{};
    if constexpr (kRead) values = read_quad(x, place, aligned);
    change(quad, values.at);
    write_quad(x, place, aligned, values);
  });
}

__global__ void words_kernel(Piece piece, Stream stream) {
  change_quads<std::uint32_t, false>(piece, [&](std::uint64_t quad, std::uint32_t* out) {
    const uint4 words = philox(quad, stream);
    out[0] = words.x, out[1] = words.y, out[2] = words.z, out[3] = words.w;
  });
}

template <typename T>
__global__ void fill_kernel(Piece piece, Direction direction) {
  change_quads<T, false>(piece, [&](std::uint64_t quad, T* x) {
    float z[4];
    draw(direction, piece.c1, quad, z);
    for (int i = 0; i < 4; ++i) x[i] = narrow<T>(z[i]);
  });
}

template <typename T>
__global__ void add_kernel(Piece piece, Direction direction, Accumulator<T> a, const T* y) {
  using Acc = Accumulator<T>;
  T* x = reinterpret_cast<T*>(piece.address);
  const bool aligned = quads_aligned<T>(piece.address, piece.begin) &&
                       quads_aligned<T>(reinterpret_cast<std::uintptr_t>(y), piece.begin);
  for_quads(piece, [&](std::uint64_t quad, const Place& place) {
    Quad<T> values = read_quad(y, place, aligned);
    float z[4];
    draw(direction, piece.c1, quad, z);
    for (int i = 0; i < 4; ++i) {
      values.at[i] = narrow<T>(multiply_add(a, static_cast<Acc>(z[i]), widen(values.at[i])));
    }
    write_quad(x, place, aligned, values);
  });
}

// Few elements travel with the launch, many lie in device memory.
template <typename E, std::size_t kFew>
struct List {
  E few[kFew];
  const E* many;  // null: all are in `few`
  std::size_t count;

  __device__ const E& operator[](std::size_t k) const { return many != nullptr ? many[k] : few[k]; }
};

// sum[0..4) plus the directions at a quad, in order.
template <typename Acc, std::size_t kFew>
__device__ void accumulate(const List<ScaledDirection, kFew>& terms, std::uint32_t c1,
                           std::uint64_t quad, Acc* sum) {
  for (std::size_t k = 0; k < terms.count; ++k) {
    const Acc coefficient = static_cast<Acc>(terms[k].coefficient);
    float z[4];
    draw(terms[k].direction, c1, quad, z);
    for (int i = 0; i < 4; ++i) sum[i] = multiply_add(coefficient, static_cast<Acc>(z[i]), sum[i]);
  }
}

template <typename T>
__global__ void subtract_kernel(Piece piece,
                                const __grid_constant__ List<ScaledDirection, kTermsByValue> terms,
                                Accumulator<T> decay) {
  using Acc = Accumulator<T>;
  change_quads<T, true>(piece, [&](std::uint64_t quad, T* x) {
    Acc sum[4] = {};
    accumulate(terms, piece.c1, quad, sum);
    for (int i = 0; i < 4; ++i) {
      const Acc t = widen(x[i]);
      x[i] = narrow<T>(subtract(subtract(t, sum[i]), multiply(decay, t)));
    }
  });
}

// A Release for one piece: rows begin where the piece does.
template <typename T>
struct ReleasePiece {
  using Acc = Accumulator<T>;
  Piece piece;
  T *out, *raw, *x;            // raw and x may be null
  std::ptrdiff_t begin_bytes;  // from a kept row's start to the piece
  Acc factor, weight, scale;
  bool aligned;  // the quads of all rows are
  List<ScaledDirection, kReleasedByValue> noise;
  List<KeptRow, kReleasedByValue> kept;
};

template <typename T>
__global__ void release_kernel(const __grid_constant__ ReleasePiece<T> job) {
  using Acc = Accumulator<T>;
  const T* sums = reinterpret_cast<const T*>(job.piece.address);
  const bool aligned = job.aligned;
  for_quads(job.piece, [&](std::uint64_t quad, const Place& place) {
    const Quad<T> sum = read_quad(sums, place, aligned);
    Quad<T> x{};
    if (job.x != nullptr) x = read_quad<T>(job.x, place, aligned);  // in flight while noise is made
    Acc u[4], y[4];
    for (int i = 0; i < 4; ++i) u[i] = widen(sum.at[i]);
    accumulate(job.noise, job.piece.c1, quad, u);
    for (int i = 0; i < 4; ++i) {
      u[i] = multiply(job.factor, u[i]);
      y[i] = multiply(job.weight, u[i]);
    }
    for (std::size_t k = 0; k < job.kept.count; ++k) {
      const Acc coefficient = static_cast<Acc>(job.kept[k].coefficient);
      const auto* row = reinterpret_cast<const T*>(job.kept[k].address + job.begin_bytes);
      const Quad<T> past = read_quad(row, place, aligned);
      for (int i = 0; i < 4; ++i) y[i] = add(y[i], multiply(coefficient, widen(past.at[i])));
    }
    Quad<T> out, raw;
    for (int i = 0; i < 4; ++i) {
      out.at[i] = narrow<T>(y[i]);
      raw.at[i] = narrow<T>(u[i]);
      x.at[i] = narrow<T>(add(widen(x.at[i]), multiply(job.scale, y[i])));
    }
    write_quad(job.out, place, aligned, out);
    if (job.raw != nullptr) write_quad(job.raw, place, aligned, raw);
    if (job.x != nullptr) write_quad(job.x, place, aligned, x);
  });
}

// --- launching ------------------------------------------------------------------------------

unsigned blocks_for(const Piece& piece) {
  const std::size_t quads = piece.n / 4 + 2;  // one more at each end where begin is inside a quad
  return static_cast<unsigned>(std::min((quads + kThreads - 1) / kThreads, kMostBlocks));
}

// Calls launch(null pointer to the element type, piece, blocks) for the pieces.
template <typename Launch>
void for_pieces(std::span<const Piece> pieces, Dtype dtype, const char* what, Launch launch) {
  for (const Piece& piece : pieces) {
    if (piece.n == 0) continue;
    const unsigned blocks = blocks_for(piece);
    as_type(dtype, [&]<typename T>(T* type) { launch(type, piece, blocks); });
    check(cudaGetLastError(), what);
  }
}

// A list that kernels of one stream read; what is in device memory is freed in the stream's order.
template <typename E, std::size_t kFew>
class Launched {
 public:
  Launched(std::span<const E> elements, cudaStream_t stream) : stream_(stream) {
    list_.count = elements.size();
    if (elements.size() <= kFew) {
      std::copy(elements.begin(), elements.end(), list_.few);
      return;
    }
    check(cudaMallocAsync(&memory_, elements.size_bytes(), stream), "memory for a list");
    // From pageable memory: the call returns when the elements are staged.
    const cudaError_t copied = cudaMemcpyAsync(memory_, elements.data(), elements.size_bytes(),
                                               cudaMemcpyHostToDevice, stream);
    if (copied != cudaSuccess) {
      cudaFreeAsync(memory_, stream);
      check(copied, "copy of a list");
    }
    list_.many = static_cast<const E*>(memory_);
  }
  ~Launched() {
    if (memory_ != nullptr) cudaFreeAsync(memory_, stream_);
  }
  Launched(const Launched&) = delete;
  Launched& operator=(const Launched&) = delete;

  [[nodiscard]] const List<E, kFew>& list() const noexcept { return list_; }

 private:
  List<E, kFew> list_{};
  void* memory_ = nullptr;
  cudaStream_t stream_;
};

}  // namespace

void fill_words_cuda(std::uint32_t* out, std::size_t n, std::uint64_t begin, const Stream& stream,
                     void* cuda_stream) {
  if (n == 0) return;
  const Piece piece{reinterpret_cast<std::uintptr_t>(out), n, begin, stream.c1};
  words_kernel<<<blocks_for(piece), kThreads, 0, static_cast<cudaStream_t>(cuda_stream)>>>(piece,
                                                                                           stream);
  check(cudaGetLastError(), "words_kernel");
}

void fill_random_cuda(std::span<const Piece> pieces, Dtype dtype, const Direction& direction,
                      void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  for_pieces(pieces, dtype, "fill_kernel",
             [&]<typename T>(T*, const Piece& piece, unsigned blocks) {
               fill_kernel<T><<<blocks, kThreads, 0, stream>>>(piece, direction);
             });
}

void add_random_cuda(std::span<const Piece> pieces, Dtype dtype, const Direction& direction,
                     double a, std::uintptr_t source, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  for_pieces(pieces, dtype, "add_kernel", [&]<typename T>(T*, const Piece& piece, unsigned blocks) {
    const T* y = source == 0 ? reinterpret_cast<const T*>(piece.address)
                             : reinterpret_cast<const T*>(source) + piece.begin;
    add_kernel<T>
        <<<blocks, kThreads, 0, stream>>>(piece, direction, static_cast<Accumulator<T>>(a), y);
  });
}

void subtract_random_cuda(std::span<const Piece> pieces, Dtype dtype,
                          std::span<const ScaledDirection> terms, double decay, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const Launched<ScaledDirection, kTermsByValue> launched(terms, stream);
  for_pieces(pieces, dtype, "subtract_kernel",
             [&]<typename T>(T*, const Piece& piece, unsigned blocks) {
               subtract_kernel<T><<<blocks, kThreads, 0, stream>>>(
                   piece, launched.list(), static_cast<Accumulator<T>>(decay));
             });
}

void release_sum_cuda(std::span<const Piece> pieces, Dtype dtype, const Release& release,
                      void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const Launched<ScaledDirection, kReleasedByValue> noise(release.noise, stream);
  const Launched<KeptRow, kReleasedByValue> kept(release.kept, stream);
  for_pieces(pieces, dtype, "release_kernel",
             [&]<typename T>(T*, const Piece& piece, unsigned blocks) {
               const auto begin_bytes = static_cast<std::ptrdiff_t>(piece.address - release.sum);
               const auto at = [&](std::uintptr_t row) {
                 return row == 0 ? nullptr : reinterpret_cast<T*>(row + begin_bytes);
               };
               const auto aligned = [&](std::uintptr_t row) {
                 return row == 0 || quads_aligned<T>(row + begin_bytes, piece.begin);
               };
               ReleasePiece<T> job{
                   .piece = piece,
                   .out = at(release.out),
                   .raw = at(release.raw),
                   .x = at(release.x),
                   .begin_bytes = begin_bytes,
                   .factor = static_cast<Accumulator<T>>(release.factor),
                   .weight = static_cast<Accumulator<T>>(release.weight),
                   .scale = static_cast<Accumulator<T>>(release.scale),
                   .aligned = aligned(release.sum) && aligned(release.out) &&
                              aligned(release.raw) && aligned(release.x) &&
                              std::all_of(release.kept.begin(), release.kept.end(),
                                          [&](const KeptRow& row) { return aligned(row.address); }),
                   .noise = noise.list(),
                   .kept = kept.list(),
               };
               release_kernel<T><<<blocks, kThreads, 0, stream>>>(job);
             });
}

}  // namespace gossamer
