// A device made of threads: each stream is one, its memory is shared memory, and an event is two
// counters there. It dawdles at random, so that work that was not ordered comes out of order.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <span>
#include <stdexcept>
#include <thread>

#include "device.h"
#include "row_kernels.h"
#include "segment.h"

namespace gossamer {
namespace {

struct HostEvent {
  std::atomic<std::uint32_t> recorded;   // calls of record(), as the host made them
  std::atomic<std::uint32_t> completed;  // of those, how many the stream has come to

  [[nodiscard]] bool reached(std::uint32_t count) const {
    return static_cast<std::int32_t>(completed.load(std::memory_order_acquire) - count) >= 0;
  }
};

void pause() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

class Worker {
 public:
  Worker(std::uint32_t seed, std::uint32_t most_delay_us, const std::atomic<bool>& stopping)
      : random_(seed),
        delay_us_(0, most_delay_us),
        stopping_(stopping),
        thread_([this] { run(); }) {}

  ~Worker() {
    add([this] { done_ = true; });
    thread_.join();
  }

  void add(std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    filled_.notify_one();
  }

 private:
  void run() {
    while (!done_) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        filled_.wait(lock, [&] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      const std::uint32_t us = delay_us_(random_);
      if (us > 0 && !stopping_) std::this_thread::sleep_for(std::chrono::microseconds(us));
      task();
    }
  }

  std::minstd_rand random_;
  std::uniform_int_distribution<std::uint32_t> delay_us_;
  const std::atomic<bool>& stopping_;
  bool done_ = false;
  std::mutex mutex_;
  std::condition_variable filled_;
  std::deque<std::function<void()>> tasks_;
  std::thread thread_;  // last: it uses the others
};

void sum_now(const RowSums& sums) {
  for (std::size_t r = 0; r + 1 < sums.first.size(); ++r) {
    const std::span<const Term> terms(sums.terms.data() + sums.first[r],
                                      sums.terms.data() + sums.first[r + 1]);
    const std::uintptr_t out = sums.outs[r * sums.copies];
    kernels().sum_one(terms, 0, sums.d, out, sums.dtype, false);
    if (sums.divisor != 1) kernels().divide(out, sums.d, sums.divisor, sums.dtype);
    for (std::size_t k = 1; k < sums.copies; ++k) {
      std::memcpy(reinterpret_cast<void*>(sums.outs[r * sums.copies + k]),
                  reinterpret_cast<const void*>(out), sums.d * size_bytes(sums.dtype));
    }
  }
}

class HostDevice : public Device {
 public:
  HostDevice(std::uint32_t seed, std::uint32_t most_delay_us)
      : seed_(seed), most_delay_us_(most_delay_us) {}

  ~HostDevice() override { stopping_ = true; }

  std::byte* allocate(std::size_t bytes, DeviceHandle& handle) override {
    const auto segment = Segment::create("gossamer-device", bytes);
    std::memcpy(handle.data(), &segment->ticket(), sizeof(Ticket));
    return keep(segment);
  }
  void free(std::byte* memory) noexcept override { segments_.erase(memory); }
  std::byte* open_memory(const DeviceHandle& handle) override {
    Ticket ticket;
    std::memcpy(&ticket, handle.data(), sizeof ticket);
    return keep(Segment::attach(ticket));
  }
  void close_memory(std::byte* memory) noexcept override { segments_.erase(memory); }

  void* make_event(DeviceHandle& handle) override { return allocate(sizeof(HostEvent), handle); }
  void* open_event(const DeviceHandle& handle) override { return open_memory(handle); }
  void free_event(void* event) noexcept override { free(static_cast<std::byte*>(event)); }

  std::uint32_t record(void* event, DeviceStream stream) override {
    auto* e = static_cast<HostEvent*>(event);
    const std::uint32_t count = e->recorded.fetch_add(1) + 1;
    add(stream, [e, count] { e->completed.store(count, std::memory_order_release); });
    return count;
  }
  void wait(void* event, std::uint32_t count, DeviceStream stream) override {
    auto* e = static_cast<HostEvent*>(event);
    if (e->recorded.load() != count) throw std::logic_error("the event was recorded again");
    add(stream, [this, e, count] { until(*e, count); });
  }
  void synchronize(void* event) override {
    auto* e = static_cast<HostEvent*>(event);
    until(*e, e->recorded.load());
  }

  [[nodiscard]] std::pair<int, int> dlpack() const override { return {1, 0}; }  // kDLCPU

  void zero(std::byte* memory, std::size_t bytes, DeviceStream stream) override {
    add(stream, [=] { std::memset(memory, 0, bytes); });
  }
  void copy(std::byte* to, const std::byte* from, std::size_t bytes, DeviceStream stream) override {
    add(stream, [=] { std::memcpy(to, from, bytes); });
  }
  void sum(const RowSums& sums, DeviceStream stream) override {
    add(stream, [sums] { sum_now(sums); });
  }

 private:
  static_assert(sizeof(Ticket) <= sizeof(DeviceHandle));

  std::byte* keep(const std::shared_ptr<Segment>& segment) {
    segments_[segment->data()] = segment;
    return segment->data();
  }
  void add(DeviceStream stream, std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    auto& worker = workers_[stream];
    if (!worker) {
      const auto seed = seed_ * 31 + static_cast<std::uint32_t>(stream) + 1;
      worker = std::make_unique<Worker>(seed, most_delay_us_, stopping_);
    }
    worker->add(std::move(task));
  }
  void until(const HostEvent& event, std::uint32_t count) const {
    while (!event.reached(count) && !stopping_) pause();
  }

  std::uint32_t seed_, most_delay_us_;
  std::atomic<bool> stopping_ = false;
  std::mutex mutex_;
  std::map<const void*, std::shared_ptr<Segment>> segments_;
  std::map<DeviceStream, std::unique_ptr<Worker>> workers_;  // gone before the memory they use
};

}  // namespace

std::unique_ptr<Device> make_host_device(std::uint32_t seed, std::uint32_t most_delay_us) {
  return std::make_unique<HostDevice>(seed, most_delay_us);
}

}  // namespace gossamer
