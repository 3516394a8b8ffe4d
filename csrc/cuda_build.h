// Whether this build has CUDA kernels; the sources named *_nocuda.cpp stand in for them if not.
#pragma once

namespace gossamer {

#ifdef GOSSAMER_CUDA_KERNELS
inline constexpr bool kCudaKernels = true;
#else
inline constexpr bool kCudaKernels = false;
#endif

}  // namespace gossamer
