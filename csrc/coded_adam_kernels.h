// The kernel that coded_adam_kernels.cpp provides once per instruction set.
#pragma once

#include "coded_adam.h"

namespace gossamer {

// Block `index` of the job.
using CodedAdamKernel = void (*)(const CodedAdam& job, std::size_t index);

namespace baseline {
extern const CodedAdamKernel kCodedAdam;
}
namespace avx2 {
extern const CodedAdamKernel kCodedAdam;
}
namespace avx512 {
extern const CodedAdamKernel kCodedAdam;
}

}  // namespace gossamer
