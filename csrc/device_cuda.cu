// CUDA as a Device: memory and events by CUDA's interprocess handles.
#include <cstring>

#include "cuda_check.h"
#include "device.h"

namespace gossamer {
namespace {

static_assert(sizeof(cudaIpcMemHandle_t) <= sizeof(DeviceHandle));
static_assert(sizeof(cudaIpcEventHandle_t) <= sizeof(DeviceHandle));

// The calling thread's current device, while this lives.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    check(cudaGetDevice(&before_));
    if (before_ != index) check(cudaSetDevice(index));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

cudaStream_t to_stream(DeviceStream stream) { return reinterpret_cast<cudaStream_t>(stream); }
cudaEvent_t to_event(void* event) { return static_cast<cudaEvent_t>(event); }

template <typename Handle>
Handle unpack(const DeviceHandle& bytes) {
  Handle handle;
  std::memcpy(&handle, bytes.data(), sizeof handle);
  return handle;
}

class CudaDevice : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) { const OnDevice on(index_); }

  std::byte* allocate(std::size_t bytes, DeviceHandle& handle) override {
    const OnDevice on(index_);
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes));
    cudaIpcMemHandle_t exported;
    const cudaError_t status = cudaIpcGetMemHandle(&exported, memory);
    if (status != cudaSuccess) cudaFree(memory);
    check(status);
    std::memcpy(handle.data(), &exported, sizeof exported);
    return static_cast<std::byte*>(memory);
  }
  void free(std::byte* memory) noexcept override { cudaFree(memory); }

  std::byte* open_memory(const DeviceHandle& handle) override {
    const OnDevice on(index_);
    void* memory = nullptr;
    check(cudaIpcOpenMemHandle(&memory, unpack<cudaIpcMemHandle_t>(handle),
                               cudaIpcMemLazyEnablePeerAccess));
    return static_cast<std::byte*>(memory);
  }
  void close_memory(std::byte* memory) noexcept override { cudaIpcCloseMemHandle(memory); }

  void* make_event(DeviceHandle& handle) override {
    const OnDevice on(index_);
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess));
    cudaIpcEventHandle_t exported;
    const cudaError_t status = cudaIpcGetEventHandle(&exported, event);
    if (status != cudaSuccess) cudaEventDestroy(event);
    check(status);
    std::memcpy(handle.data(), &exported, sizeof exported);
    return event;
  }
  void* open_event(const DeviceHandle& handle) override {
    const OnDevice on(index_);
    cudaEvent_t event = nullptr;
    check(cudaIpcOpenEventHandle(&event, unpack<cudaIpcEventHandle_t>(handle)));
    return event;
  }
  void free_event(void* event) noexcept override { cudaEventDestroy(to_event(event)); }

  std::uint32_t record(void* event, DeviceStream stream) override {
    const OnDevice on(index_);
    check(cudaEventRecord(to_event(event), to_stream(stream)));
    return 0;
  }
  void wait(void* event, std::uint32_t, DeviceStream stream) override {
    const OnDevice on(index_);
    check(cudaStreamWaitEvent(to_stream(stream), to_event(event), 0));
  }
  void synchronize(void* event) override {
    const OnDevice on(index_);
    check(cudaEventSynchronize(to_event(event)));
  }

  [[nodiscard]] std::pair<int, int> dlpack() const override { return {2, index_}; }  // kDLCUDA

  void zero(std::byte* memory, std::size_t bytes, DeviceStream stream) override {
    const OnDevice on(index_);
    check(cudaMemsetAsync(memory, 0, bytes, to_stream(stream)));
  }
  void copy(std::byte* to, const std::byte* from, std::size_t bytes, DeviceStream stream) override {
    const OnDevice on(index_);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, to_stream(stream)));
  }
  void sum(const RowSums& sums, DeviceStream stream) override {
    const OnDevice on(index_);
    sum_rows_cuda(sums, stream);
  }

 private:
  int index_;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int index) { return std::make_unique<CudaDevice>(index); }

}  // namespace gossamer
