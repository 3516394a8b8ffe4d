// What a build without CUDA has in place of device_cuda.cu, row_sums.cu and example_sums.cu.
#include <stdexcept>

#include "device.h"

namespace gossamer {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error("this build has no CUDA kernels; rebuild where nvcc is on PATH");
}

}  // namespace

std::unique_ptr<Device> make_cuda_device(int) { refuse(); }
void sum_rows_cuda(const RowSums&, DeviceStream) { refuse(); }
void row_dot_cuda(const Rows&, const Rows&, std::size_t, Dtype, double*, DeviceStream) { refuse(); }
void add_rows_cuda(const Rows&, const double*, std::uintptr_t, std::size_t, Dtype, DeviceStream) {
  refuse();
}

}  // namespace gossamer
