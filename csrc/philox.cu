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

// Calls change(quad, values) with the elements 4 quad.. of the stream that lie in the piece, one
// quad per thread, and writes them back; those of a quad that lie outside are neither read nor
// written.
template <typename T, bool kRead, typename Change>
__device__ void for_quads(const Piece& piece, Change change) {
  T* x = reinterpret_cast<T*>(piece.address);
  const std::uint64_t end = piece.begin + piece.n, stop = (end + 3) / 4;
  const bool aligned = (piece.address - piece.begin * sizeof(T)) % alignof(Quad<T>) == 0;
  const std::uint64_t stride = std::uint64_t{gridDim.x} * blockDim.x;
  for (std::uint64_t quad = piece.begin / 4 + std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       quad < stop; quad += stride) {
    Quad<T> values{};
    if (aligned && 4 * quad >= piece.begin && 4 * quad + 4 <= end) {
      auto* place = reinterpret_cast<Quad<T>*>(x + (4 * quad - piece.begin));
      if constexpr (kRead) values = *place;
      change(quad, values.at);
      *place = values;
    } else {
      const auto inside = [&](int i) { return 4 * quad + i >= piece.begin && 4 * quad + i < end; };
      for (int i = 0; kRead && i < 4; ++i) {
        if (inside(i)) values.at[i] = x[4 * quad + i - piece.begin];
      }
      change(quad, values.at);
      for (int i = 0; i < 4; ++i) {
        if (inside(i)) x[4 * quad + i - piece.begin] = values.at[i];
      }
    }
  }
}

__global__ void words_kernel(Piece piece, Stream stream) {
  for_quads<std::uint32_t, false>(piece, [&](std::uint64_t quad, std::uint32_t* out) {
    const uint4 words = philox(quad, stream);
    out[0] = words.x, out[1] = words.y, out[2] = words.z, out[3] = words.w;
  });
}

template <typename T>
__global__ void fill_kernel(Piece piece, Direction direction) {
  for_quads<T, false>(piece, [&](std::uint64_t quad, T* x) {
    float z[4];
    draw(direction, piece.c1, quad, z);
    for (int i = 0; i < 4; ++i) x[i] = narrow<T>(z[i]);
  });
}

template <typename T>
__global__ void add_kernel(Piece piece, Direction direction, Accumulator<T> a) {
  using Acc = Accumulator<T>;
  for_quads<T, true>(piece, [&](std::uint64_t quad, T* x) {
    float z[4];
    draw(direction, piece.c1, quad, z);
    for (int i = 0; i < 4; ++i) {
      x[i] = narrow<T>(multiply_add(a, static_cast<Acc>(z[i]), widen(x[i])));
    }
  });
}

struct FewTerms {
  ScaledDirection at[kTermsByValue];
};

// The terms are in `many` where they do not fit into `few`.
template <typename T>
__global__ void subtract_kernel(Piece piece, const __grid_constant__ FewTerms few,
                                const ScaledDirection* many, std::size_t count,
                                Accumulator<T> decay) {
  using Acc = Accumulator<T>;
  for_quads<T, true>(piece, [&](std::uint64_t quad, T* x) {
    Acc sum[4] = {};
    for (std::size_t k = 0; k < count; ++k) {
      const ScaledDirection& term = many != nullptr ? many[k] : few.at[k];
      const Acc coefficient = static_cast<Acc>(term.coefficient);
      float z[4];
      draw(term.direction, piece.c1, quad, z);
      for (int i = 0; i < 4; ++i) {
        sum[i] = multiply_add(coefficient, static_cast<Acc>(z[i]), sum[i]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const Acc t = widen(x[i]);
      x[i] = narrow<T>(subtract(subtract(t, sum[i]), multiply(decay, t)));
    }
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

// Terms in device memory, for one stream: allocated and freed in its order.
class DeviceTerms {
 public:
  DeviceTerms(std::span<const ScaledDirection> terms, cudaStream_t stream) : stream_(stream) {
    check(cudaMallocAsync(&memory_, terms.size_bytes(), stream), "memory for directions");
    // From pageable memory: the call returns when the terms are staged.
    const cudaError_t copied =
        cudaMemcpyAsync(memory_, terms.data(), terms.size_bytes(), cudaMemcpyHostToDevice, stream);
    if (copied != cudaSuccess) {
      cudaFreeAsync(memory_, stream);
      check(copied, "copy of directions");
    }
  }
  ~DeviceTerms() { cudaFreeAsync(memory_, stream_); }
  DeviceTerms(const DeviceTerms&) = delete;
  DeviceTerms& operator=(const DeviceTerms&) = delete;

  [[nodiscard]] const ScaledDirection* data() const noexcept {
    return static_cast<const ScaledDirection*>(memory_);
  }

 private:
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
                     double a, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  for_pieces(pieces, dtype, "add_kernel", [&]<typename T>(T*, const Piece& piece, unsigned blocks) {
    add_kernel<T>
        <<<blocks, kThreads, 0, stream>>>(piece, direction, static_cast<Accumulator<T>>(a));
  });
}

void subtract_random_cuda(std::span<const Piece> pieces, Dtype dtype,
                          std::span<const ScaledDirection> terms, double decay, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const auto run = [&](const FewTerms& few, const ScaledDirection* many) {
    for_pieces(pieces, dtype, "subtract_kernel",
               [&]<typename T>(T*, const Piece& piece, unsigned blocks) {
                 subtract_kernel<T><<<blocks, kThreads, 0, stream>>>(
                     piece, few, many, terms.size(), static_cast<Accumulator<T>>(decay));
               });
  };
  FewTerms few{};
  if (terms.size() <= kTermsByValue) {
    std::copy(terms.begin(), terms.end(), few.at);
    run(few, nullptr);
  } else {
    const DeviceTerms many(terms, stream);
    run(few, many.data());
  }
}

}  // namespace gossamer
