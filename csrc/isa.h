// The instruction set whose kernels this process uses.
#pragma once

namespace gossamer {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// Chosen at the first call. GOSSAMER_ISA in the environment forces a set (tests compare their
// bits); an unknown or unsupported one is ignored in favour of the best.
[[nodiscard]] Isa isa() noexcept;

// "avx512", "avx2" or "baseline".
[[nodiscard]] const char* instruction_set() noexcept;

}  // namespace gossamer
