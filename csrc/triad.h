// What memory gives: the triad of the STREAM benchmark.
#pragma once

#include <cstddef>

namespace gossamer {

// a[i] = b[i] + s * c[i] for i < n, on this thread; the arrays must not overlap. `stream`: a is
// written past the caches, so that its lines are not read first (where the machine can, and `a` is
// aligned to 16 bytes). Three arrays move, four with ordinary stores.
void triad(double* __restrict__ a, const double* __restrict__ b, const double* __restrict__ c,
           double s, std::size_t n, bool stream);

}  // namespace gossamer
