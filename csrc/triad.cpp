#include "triad.h"

#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gossamer {

void triad(double* __restrict__ a, const double* __restrict__ b, const double* __restrict__ c,
           double s, std::size_t n, bool stream) {
  std::size_t i = 0;
#if defined(__SSE2__)
  if (stream && reinterpret_cast<std::uintptr_t>(a) % 16 == 0) {
    const __m128d factor = _mm_set1_pd(s);
    for (; i + 2 <= n; i += 2) {
      _mm_stream_pd(a + i,
                    _mm_add_pd(_mm_loadu_pd(b + i), _mm_mul_pd(factor, _mm_loadu_pd(c + i))));
    }
    _mm_sfence();
  }
#else
  static_cast<void>(stream);
#endif
  for (; i < n; ++i) a[i] = b[i] + s * c[i];
}

}  // namespace gossamer
