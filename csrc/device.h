// What collectives need of a device: memory and events that the processes of a host share, streams
// that work in order, copies and sums of rows. CUDA is one (device_cuda.cu); the other one runs on
// the CPU (device_host.cpp), so that the protocol between processes is tested where no GPU is.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "schedule.h"
#include "weighted_sum.h"

namespace gossamer {

// What a peer needs to open memory or an event of this process.
using DeviceHandle = std::array<std::byte, 64>;

// A queue of work, done in order: a cudaStream_t.
using DeviceStream = std::uintptr_t;

// Sum r is that of terms first[r]..first[r + 1], over the divisor, rounded as weighted_sum.h says
// and then as RowKernels::divide; it is written to outs[r * copies] and the copies - 1 after it.
struct RowSums {
  std::vector<Term> terms;
  std::vector<std::uint32_t> first;
  std::vector<std::uintptr_t> outs;
  std::size_t copies = 1;
  std::size_t d;
  Dtype dtype;
  double divisor = 1;  // 1: none
};

// Calls queue work and return; all may throw std::runtime_error with the device's own words.
class Device {
 public:
  virtual ~Device() = default;

  // Memory that peers may open; its contents are undefined.
  virtual std::byte* allocate(std::size_t bytes, DeviceHandle& handle) = 0;
  virtual void free(std::byte* memory) noexcept = 0;
  virtual std::byte* open_memory(const DeviceHandle& handle) = 0;
  virtual void close_memory(std::byte* memory) noexcept = 0;

  // An event that peers may open. A wait is for what was recorded last when wait() was called:
  // recording again before a peer has called it would make the peer wait for the wrong work.
  // `count` is what record() returned; a device for tests throws std::logic_error on such a wait.
  virtual void* make_event(DeviceHandle& handle) = 0;
  virtual void* open_event(const DeviceHandle& handle) = 0;
  virtual void free_event(void* event) noexcept = 0;  // own or opened
  virtual std::uint32_t record(void* event, DeviceStream stream) = 0;
  virtual void wait(void* event, std::uint32_t count, DeviceStream stream) = 0;
  virtual void synchronize(void* event) = 0;  // blocks the calling thread

  // What DLPack calls it: a type and a number.
  [[nodiscard]] virtual std::pair<int, int> dlpack() const = 0;

  virtual void zero(std::byte* memory, std::size_t bytes, DeviceStream stream) = 0;
  virtual void copy(std::byte* to, const std::byte* from, std::size_t bytes,
                    DeviceStream stream) = 0;
  // No output overlaps a term, save one that is the same row as a term of its own sum alone.
  virtual void sum(const RowSums& sums, DeviceStream stream) = 0;
};

// Throws std::runtime_error where the build has no CUDA kernels.
std::unique_ptr<Device> make_cuda_device(int index);

// The same sums alone, on the current CUDA device.
void sum_rows_cuda(const RowSums& sums, DeviceStream stream);

// out[r] = sum_i x[r][i] * y[r][i] in double, on the current CUDA device; `out` is on it too. The
// order of the additions is fixed, but not row_dot's.
void row_dot_cuda(const Rows& x, const Rows& y, std::size_t d, Dtype dtype, double* out,
                  DeviceStream stream);

// add_rows() on the current CUDA device, where `factors` are too: the same bits.
void add_rows_cuda(const Rows& g, const double* factors, std::uintptr_t out, std::size_t d,
                   Dtype dtype, DeviceStream stream);

// Streams are threads, by number, that dawdle up to `most_delay_us` before each piece of work.
std::unique_ptr<Device> make_host_device(std::uint32_t seed, std::uint32_t most_delay_us);

}  // namespace gossamer
