// The dtypes of rows, numbered as gossamer.runtime.native does.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gossamer {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

[[nodiscard]] constexpr std::size_t size_bytes(Dtype dtype) noexcept {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// The upper half of a message's kind, so that rows of different dtypes never meet.
[[nodiscard]] constexpr std::uint32_t kind_bits(Dtype dtype) noexcept {
  return (static_cast<std::uint32_t>(dtype) + 1) << 16;
}

}  // namespace gossamer
