#include "weighted_sum.h"

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "isa.h"
#include "row_kernels.h"
#include "schedule.h"
#include "threads.h"

namespace gossamer {
namespace {

constexpr std::size_t kCacheBytes = 384 << 10;    // what a block may use of a core's L2
constexpr std::size_t kMinBlockBytes = 2 << 10;   // shorter pieces of rows are read too slowly
constexpr std::size_t kAlign = 64;                // blocks are whole cache lines in every dtype
constexpr std::size_t kStreamBytes = 16 << 20;    // outputs larger than this go past the caches
constexpr std::size_t kColumns = 4096;            // of a sum that stays in L1 while rows are added
constexpr std::size_t kBytesPerThread = 4 << 20;  // starting a thread costs a fraction of this

std::size_t threads_for(std::size_t work_bytes, std::size_t num_threads) {
  return std::clamp<std::size_t>(work_bytes / kBytesPerThread, 1,
                                 std::max<std::size_t>(num_threads, 1));
}

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

}  // namespace

const RowKernels& kernels() {
#ifdef GOSSAMER_X86
  if (isa() == Isa::kAvx512) return avx512::kKernels;
  if (isa() == Isa::kAvx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

void weighted_sum(const WeightedSum& job, std::size_t num_threads) {
  if (job.out.count == 0 || job.d == 0) return;
  const Schedule schedule(job);
  const std::size_t element_bytes = size_bytes(job.dtype);
  num_threads = threads_for(schedule.terms.size() * job.d * element_bytes, num_threads);

  // Columns go in blocks so narrow that a row read for one output is still in cache for the last
  // that needs it: memory is read once and written once, whatever the degree. Where neighbours are
  // near in rank few rows are live, and a block is a whole row.
  const std::size_t live = std::max<std::size_t>(schedule.max_live, 1);
  std::size_t width = std::max(kCacheBytes / live, kMinBlockBytes) / element_bytes;
  width = ceil_div(std::min(width, ceil_div(job.d, num_threads)), kAlign) * kAlign;
  const std::size_t slots_bytes = schedule.num_slots * width * element_bytes;
  const auto scratch = std::make_unique_for_overwrite<std::byte[]>(num_threads * slots_bytes);

  Block block{
      .stream = !schedule.in_place && job.out.count * job.d * element_bytes > kStreamBytes,
      .prefetch = live * width * element_bytes > kCacheBytes,
  };
  for_each(ceil_div(job.d, width), num_threads, [&](std::size_t i, std::size_t thread) {
    Block mine = block;
    mine.begin = i * width;
    mine.len = std::min(width, job.d - mine.begin);
    mine.scratch = scratch.get() + thread * slots_bytes;
    kernels().sum_rows(schedule, mine, job.dtype, job.wide);
  });
}

void row_dot(const Rows& x, const Rows& y, std::size_t d, Dtype dtype, double* out,
             std::size_t num_threads) {
  const std::size_t work_bytes = 2 * x.count * d * size_bytes(dtype);
  num_threads = threads_for(work_bytes, num_threads);
  const std::size_t rows = ceil_div(x.count, 4 * num_threads);  // a few pieces each, for balance
  for_each(ceil_div(x.count, std::max<std::size_t>(rows, 1)), num_threads,
           [&](std::size_t i, std::size_t) {
             for (std::size_t r = i * rows; r < std::min((i + 1) * rows, x.count); ++r) {
               out[r] = kernels().dot_row(x.row(r), y.row(r), d, dtype);
             }
           });
}

void add_rows(const Rows& g, std::span<const double> factors, std::uintptr_t out, std::size_t d,
              Dtype dtype, std::size_t num_threads) {
  constexpr std::size_t kTogether = 4;  // rows that are read side by side
  std::vector<Term> terms;
  for (std::size_t r = 0; r < g.count; ++r) {
    if (factors[r] != 0) terms.push_back({g.row(r), factors[r]});
  }
  const std::size_t element_bytes = size_bytes(dtype);
  num_threads = threads_for(terms.size() * d * element_bytes, num_threads);
  for_each(ceil_div(d, kColumns), num_threads, [&](std::size_t i, std::size_t) {
    const std::size_t begin = i * kColumns, len = std::min(kColumns, d - begin);
    std::array<Term, kTogether + 1> some{Term{out, 1.0}};  // 1 * out is exact
    for (std::size_t k = 0; k < terms.size(); k += kTogether) {
      const std::size_t count = std::min(kTogether, terms.size() - k);
      std::copy_n(terms.begin() + static_cast<std::ptrdiff_t>(k), count, some.begin() + 1);
      kernels().sum_one({some.data(), count + 1}, begin, len, out + begin * element_bytes, dtype,
                        false);
    }
  });
}

}  // namespace gossamer
