// The kernel that chain_kernels.cpp provides once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "chain_moves.h"

namespace gossamer {

constexpr std::size_t kMostLanes = 16;  // that a vector has in any instruction set
constexpr std::size_t kTogether = 4;    // rows that a kernel scans

struct ChainRow {
  const float* scores;
  const float* exponentials;
  const std::size_t* own;  // scanned columns that are not proposed, ascending; then one past them
  std::int32_t burn_in;
  std::int32_t* counts;  // per column
  float* sums;           // scratch of columns + kMostLanes
  std::uint32_t* moves;  // scratch of columns + 1
};

// The state of a chain, which goes on from row to row, and what it did in the last one.
struct Chain {
  std::int64_t column;  // -1: from an earlier visit
  float score;          // -inf: no state
  std::int32_t held, accepted, proposed;
};

// Scans `columns` of up to kTogether rows, one per chain.
using ChainKernel = void (*)(const ChainRow* rows, Chain* chains, std::size_t count,
                             ColumnRange columns);

namespace baseline {
extern const ChainKernel kScanRows;
}
namespace avx2 {
extern const ChainKernel kScanRows;
}
namespace avx512 {
extern const ChainKernel kScanRows;
}

}  // namespace gossamer
