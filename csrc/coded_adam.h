// Adam whose moments are kept as 8-bit codes: decoded, moved, encoded and used in one pass.
//
// Elements go in blocks of kCodedBlock, the last one maybe shorter; a moment's element is
// values[code] * scale, with one scale per block, its largest magnitude. All arithmetic is float,
// each operation rounded once, so that the bits depend neither on the number of threads nor on the
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace gossamer {

constexpr std::size_t kCodedBlock = 256;

// What codes mean, and how the nearest to a number in [-1, 1] is found: the floats with the same
// upper 16 bits lie between bounds[i - 1] and bounds[i + 1], with i their entry in `cells`.
struct Codebook {
  const float* values;        // 256, ascending
  const float* bounds;        // 256: halfway from each value to the next; infinity at last
  const std::uint8_t* cells;  // 65536
};

struct CodedMoment {
  std::uint8_t* codes;  // one per element
  float* scales;        // one per block
  Codebook book;
};

struct AdamFactors {
  float keep1, add1;  // m = keep1 * m + add1 * g
  float keep2, add2;  // v = keep2 * v + add2 * g^2
  float grow1, grow2, eps;
};

// direction[i] = (grow1 * m[i]) / (sqrt(grow2 * v[i]) + eps) for i < count, with m and v before
// they are encoded again. `direction` may be `grad`; both are of `dtype`, all other memory is
// apart. Uses up to `num_threads` threads, fewer for small work.
struct CodedAdam {
  std::uintptr_t grad, direction;
  std::size_t count;
  Dtype dtype;
  CodedMoment m, v;
  AdamFactors factors;
};
void coded_adam(const CodedAdam& job, std::size_t num_threads);

}  // namespace gossamer
