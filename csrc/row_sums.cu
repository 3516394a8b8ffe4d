// Weighted sums of rows in one pass: each row is read once, in 16-byte loads where all are aligned,
// and each result written once. The bits are those of the CPU's kernels: every product and sum
// is rounded by itself (the intrinsics are never contracted).
#include <algorithm>
#include <cstring>
#include <vector>

#include "cuda_check.h"
#include "device.h"
#include "elements_cuda.h"

namespace gossamer {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kPacks = 2;         // 16-byte loads in flight per thread and term
constexpr unsigned kBlocksPerSm = 16;  // twice what is resident: blocks end at different times
constexpr unsigned kMostSums = 65535;  // in one launch; the kernel goes around for more

template <typename Acc>
struct KernelTerm {
  std::uintptr_t row;
  Acc weight;
};

// What the kernel works through; few terms travel with the launch, many lie in device memory.
template <typename Acc>
struct Table {
  static constexpr std::size_t kTerms = 64, kSums = 16, kOuts = 32;

  KernelTerm<Acc> terms[kTerms];
  std::uintptr_t outs[kOuts];
  std::uint32_t first[kSums + 1];
  std::uint32_t sums, copies;
  std::size_t d;
  Acc divisor;
  const KernelTerm<Acc>* far_terms;  // null: the arrays above
  const std::uintptr_t* far_outs;
  const std::uint32_t* far_first;
};

template <typename T, typename Acc>
__device__ T finish(Acc sum, Acc divisor) {
  T result = narrow<T>(sum);
  if (divisor != Acc{1}) result = narrow<T>(divide(widen(result), divisor));
  return result;
}

// Adding to -0 changes nothing, not even the sign of a zero; a sum of nothing is +0.
template <typename Acc>
__device__ Acc start(std::uint32_t begin, std::uint32_t end) {
  return begin == end ? Acc{0} : -Acc{0};
}

template <typename T>
union Pack {
  uint4 raw;
  T element[16 / sizeof(T)];
  __device__ Pack() : raw{} {}
};

// The terms of one sum and where it goes.
template <typename Acc>
struct Sum {
  const KernelTerm<Acc>* terms;
  std::uint32_t begin, end;
  const std::uintptr_t* outs;
  std::uint32_t copies;
  Acc divisor;
};

template <typename T, typename Acc>
__device__ void sum_packs(const Sum<Acc>& sum, std::size_t packs) {
  constexpr unsigned kPer = 16 / sizeof(T);
  constexpr std::size_t kTile = std::size_t{kThreads} * kPacks;
  for (std::size_t at = blockIdx.x * kTile + threadIdx.x; at < packs; at += gridDim.x * kTile) {
    Acc acc[kPacks][kPer];
#pragma unroll
    for (unsigned v = 0; v < kPacks; ++v) {
#pragma unroll
      for (unsigned k = 0; k < kPer; ++k) acc[v][k] = start<Acc>(sum.begin, sum.end);
    }
#pragma unroll 4
    for (std::uint32_t t = sum.begin; t < sum.end; ++t) {
      const uint4* row = reinterpret_cast<const uint4*>(sum.terms[t].row);
      const Acc weight = sum.terms[t].weight;
      Pack<T> x[kPacks];
#pragma unroll
      for (unsigned v = 0; v < kPacks; ++v) {
        if (at + v * kThreads < packs) x[v].raw = row[at + v * kThreads];
      }
#pragma unroll
      for (unsigned v = 0; v < kPacks; ++v) {
#pragma unroll
        for (unsigned k = 0; k < kPer; ++k) {
          acc[v][k] = add(acc[v][k], multiply(weight, widen(x[v].element[k])));
        }
      }
    }
#pragma unroll
    for (unsigned v = 0; v < kPacks; ++v) {
      if (at + v * kThreads >= packs) continue;
      Pack<T> result;
#pragma unroll
      for (unsigned k = 0; k < kPer; ++k) result.element[k] = finish<T>(acc[v][k], sum.divisor);
      for (std::uint32_t c = 0; c < sum.copies; ++c) {
        reinterpret_cast<uint4*>(sum.outs[c])[at + v * kThreads] = result.raw;
      }
    }
  }
}

template <typename T, typename Acc>
__device__ void sum_elements(const Sum<Acc>& sum, std::size_t from, std::size_t d) {
  const std::size_t stride = std::size_t{gridDim.x} * kThreads;
  const std::size_t mine = std::size_t{blockIdx.x} * kThreads + threadIdx.x;
  for (std::size_t i = from + mine; i < d; i += stride) {
    Acc acc = start<Acc>(sum.begin, sum.end);
    for (std::uint32_t t = sum.begin; t < sum.end; ++t) {
      const T x = reinterpret_cast<const T*>(sum.terms[t].row)[i];
      acc = add(acc, multiply(sum.terms[t].weight, widen(x)));
    }
    const T result = finish<T>(acc, sum.divisor);
    for (std::uint32_t c = 0; c < sum.copies; ++c) reinterpret_cast<T*>(sum.outs[c])[i] = result;
  }
}

template <typename T, typename Acc, bool kAligned>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Table<Acc> table) {
  const bool far = table.far_terms != nullptr;
  const std::uint32_t* first = far ? table.far_first : table.first;
  const std::uintptr_t* outs = far ? table.far_outs : table.outs;
  for (std::uint32_t r = blockIdx.y; r < table.sums; r += gridDim.y) {
    const Sum<Acc> sum{far ? table.far_terms : table.terms,  first[r],     first[r + 1],
                       outs + std::size_t{r} * table.copies, table.copies, table.divisor};
    std::size_t done = 0;
    if constexpr (kAligned) {
      constexpr std::size_t kPer = 16 / sizeof(T);
      sum_packs<T>(sum, table.d / kPer);
      done = table.d / kPer * kPer;
    }
    sum_elements<T>(sum, done, table.d);
  }
}

// Memory of the stream: given back when the work queued before that is done.
class StreamMemory {
 public:
  StreamMemory(std::size_t bytes, cudaStream_t stream) : stream_(stream) {
    check(cudaMallocAsync(&memory_, bytes, stream));
  }
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;
  ~StreamMemory() { cudaFreeAsync(memory_, stream_); }
  [[nodiscard]] std::byte* data() const { return static_cast<std::byte*>(memory_); }

 private:
  void* memory_ = nullptr;
  cudaStream_t stream_;
};

bool all_aligned(const RowSums& sums) {
  const auto aligned = [](std::uintptr_t address) { return address % 16 == 0; };
  return std::all_of(sums.outs.begin(), sums.outs.end(), aligned) &&
         std::all_of(sums.terms.begin(), sums.terms.end(),
                     [&](const Term& term) { return aligned(term.row); });
}

template <typename T, typename Acc>
void launch(const RowSums& sums, const Table<Acc>& table, cudaStream_t stream) {
  int device = 0, num_sms = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  const bool aligned = all_aligned(sums);
  const std::size_t per_block = std::size_t{kThreads} * (aligned ? kPacks * 16 / sizeof(T) : 1);
  const auto y = std::min(table.sums, kMostSums);
  const std::size_t most = std::max(1u, static_cast<unsigned>(num_sms) * kBlocksPerSm / y);
  const auto x = static_cast<unsigned>(std::min((sums.d + per_block - 1) / per_block, most));
  const dim3 grid(x, y);
  if (aligned) {
    sum_kernel<T, Acc, true><<<grid, kThreads, 0, stream>>>(table);
  } else {
    sum_kernel<T, Acc, false><<<grid, kThreads, 0, stream>>>(table);
  }
  check(cudaGetLastError());
}

template <typename T, typename Acc>
void run(const RowSums& sums, cudaStream_t stream) {
  Table<Acc> table{};
  table.sums = static_cast<std::uint32_t>(sums.first.size() - 1);
  table.copies = static_cast<std::uint32_t>(sums.copies);
  table.d = sums.d;
  table.divisor = static_cast<Acc>(sums.divisor);
  std::vector<KernelTerm<Acc>> terms;
  for (const Term& term : sums.terms) {
    terms.push_back({term.row, static_cast<Acc>(term.weight)});
  }
  if (terms.size() <= table.kTerms && table.sums <= table.kSums &&
      sums.outs.size() <= table.kOuts) {
    std::copy(terms.begin(), terms.end(), table.terms);
    std::copy(sums.outs.begin(), sums.outs.end(), table.outs);
    std::copy(sums.first.begin(), sums.first.end(), table.first);
    return launch<T, Acc>(sums, table, stream);
  }
  const std::size_t term_bytes = terms.size() * sizeof terms[0];
  const std::size_t out_bytes = sums.outs.size() * sizeof sums.outs[0];
  const std::size_t first_bytes = sums.first.size() * sizeof sums.first[0];
  std::vector<std::byte> packed(term_bytes + out_bytes + first_bytes);
  if (term_bytes > 0) std::memcpy(packed.data(), terms.data(), term_bytes);
  std::memcpy(packed.data() + term_bytes, sums.outs.data(), out_bytes);
  std::memcpy(packed.data() + term_bytes + out_bytes, sums.first.data(), first_bytes);
  const StreamMemory far(packed.size(), stream);
  // Returns when `packed`, which is pageable, has been read; the device is not waited for.
  check(cudaMemcpyAsync(far.data(), packed.data(), packed.size(), cudaMemcpyHostToDevice, stream));
  table.far_terms = reinterpret_cast<const KernelTerm<Acc>*>(far.data());
  table.far_outs = reinterpret_cast<const std::uintptr_t*>(far.data() + term_bytes);
  table.far_first = reinterpret_cast<const std::uint32_t*>(far.data() + term_bytes + out_bytes);
  launch<T, Acc>(sums, table, stream);
}

}  // namespace

void sum_rows_cuda(const RowSums& sums, DeviceStream stream) {
  if (sums.d == 0 || sums.first.size() < 2) return;  // a grid of zero blocks is a launch error
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  as_type(sums.dtype, [&]<typename T>(T*) { run<T, Accumulator<T>>(sums, s); });
}

}  // namespace gossamer
