#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace gossamer {
namespace {

Isa choose() {
#ifdef GOSSAMER_X86
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                        __builtin_cpu_supports("fma");
  const char* forced = std::getenv("GOSSAMER_ISA");
  const bool any = forced == nullptr;
  if (!any && std::strcmp(forced, "baseline") == 0) return Isa::kBaseline;
  if (has_avx512 && (any || std::strcmp(forced, "avx2") != 0)) return Isa::kAvx512;
  if (has_avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

}  // namespace

Isa isa() noexcept {
  static const Isa chosen = choose();
  return chosen;
}

const char* instruction_set() noexcept {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(isa())];
}

}  // namespace gossamer
