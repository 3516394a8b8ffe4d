// The kernel that chain_kernels.cpp provides once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gossamer {

constexpr std::size_t kMostLanes = 16;  // that a vector has in any instruction set

struct ChainRow {
  const float* scores;
  const float* exponentials;
  std::size_t begin, end;  // columns to scan
  const std::size_t* own;  // those of them that are not proposed, ascending; then one >= end
  std::int32_t burn_in;
  std::int32_t* counts;  // per column
  float* sums;           // scratch of end + kMostLanes
};

// The state of a chain, which goes on from row to row, and what it did in the last one.
struct Chain {
  std::int64_t column;  // -1: from an earlier visit
  float score;          // -inf: no state
  std::int32_t held, accepted, proposed;
};

using ChainKernel = void (*)(const ChainRow& row, Chain& chain);

namespace baseline {
extern const ChainKernel kScanRow;
}
namespace avx2 {
extern const ChainKernel kScanRow;
}
namespace avx512 {
extern const ChainKernel kScanRow;
}

}  // namespace gossamer
