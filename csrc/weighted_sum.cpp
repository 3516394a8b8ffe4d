#include "weighted_sum.h"

#include <cstdlib>
#include <cstring>

#include "row_kernels.h"

namespace gossamer {
namespace {

// GOSSAMER_ISA in the environment forces a set (tests compare their bits); an unknown or
// unsupported one is ignored in favour of the best.
const RowKernels& choose() {
#ifdef GOSSAMER_X86
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const char* forced = std::getenv("GOSSAMER_ISA");
  const bool any = forced == nullptr;
  if (!any && std::strcmp(forced, "baseline") == 0) return baseline::kKernels;
  if (has_avx512 && (any || std::strcmp(forced, "avx2") != 0)) return avx512::kKernels;
  if (has_avx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

const RowKernels& kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

}  // namespace

void weighted_sum(const WeightedSum& job, Dtype dtype) { kernels().weighted_sum(job, dtype); }

void row_dot(const std::uintptr_t* x, const std::uintptr_t* y, std::size_t num_rows, std::size_t d,
             Dtype dtype, double* out) {
  kernels().row_dot(x, y, num_rows, d, dtype, out);
}

const char* instruction_set() noexcept { return kernels().name; }

}  // namespace gossamer
