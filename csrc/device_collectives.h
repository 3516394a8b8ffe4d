// The collectives of collectives.h on rows in device memory, ordered on the caller's stream.
//
// How processes agree. Messages go through the group's channels, from host to host, and say what
// was queued: kRows "my rows lie there, ready after this event", kDone "I have read yours, after
// this event". An operation queues work and returns; the host waits only until its peers have
// queued their part of the same operation. In each, this process
//   1. records an event and sends kRows to all who read its rows;
//   2. takes kRows from those whose rows it reads, makes its stream wait for their events, and
//      queues one kernel that reads the rows where they lie;
//   3. records an event and sends kDone to those whose rows it read;
//   4. takes kDone from those who read its rows, and makes its stream wait for their events.
// So what is queued on the stream afterwards may write the rows again. No device is ever waited
// for by the host, except in close().
//
// Events. A wait is for what was recorded last when it is queued, so an event is recorded again
// only when every message that named it was consumed: a message is consumed after its wait has
// been queued.
//
// Memory of peers is opened when a message names it first, and stays open until close().
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "arena.h"
#include "collectives.h"
#include "device.h"
#include "group.h"

namespace gossamer {

struct DeviceBuffer {  // to or from `peer`
  std::uint32_t peer;
  std::byte* data;
  std::size_t bytes;
};

class DeviceGroup {
 public:
  // `group` is this one's alone. Several streams may be used in turn, by one thread at a time.
  DeviceGroup(std::shared_ptr<Group> group, std::unique_ptr<Device> device);
  ~DeviceGroup();
  DeviceGroup(const DeviceGroup&) = delete;
  DeviceGroup& operator=(const DeviceGroup&) = delete;

  // Memory that peers read in place, zeroed on `stream`. Released memory may be handed out again at
  // once: work on it that is queued on other streams must be done.
  std::byte* allocate(std::size_t bytes, DeviceStream stream);
  void release(std::byte* memory);
  [[nodiscard]] bool owns(std::uintptr_t address, std::size_t bytes) const {
    return place_of(address).left >= std::max<std::size_t>(bytes, 1);
  }

  // As those of collectives.h. The group fails where the device does (std::runtime_error).
  Status average(const AveragePlan& plan, const AverageCall& call, DeviceStream stream);
  Status sum(const SumCall& call, DeviceStream stream);
  // Buffers between a pair match in order; both sides make the call with matching lists.
  Status exchange(std::span<const DeviceBuffer> sends, std::span<const DeviceBuffer> receives,
                  double timeout_s, DeviceStream stream);

  // Waits until peers have taken this process's messages and read its rows, then tells them that it
  // has left. May be called twice.
  void close();

  [[nodiscard]] Device& device() noexcept { return *device_; }
  [[nodiscard]] const Group& group() const noexcept { return *group_; }

 private:
  // Those of rows with kind_bits() of the dtype.
  enum Kind : std::uint32_t { kAverage = 16, kSum = 17, kExchange = 18, kDone = 19 };

  struct Block {  // what the device allocated at once
    std::byte* data;
    std::size_t bytes;
    DeviceHandle handle;
    Arena arena;  // offsets in it
  };
  struct Place {
    DeviceHandle handle;
    std::uint32_t block;
    std::uint64_t offset, left;  // in the block
  };
  struct Event {
    void* event;
    DeviceHandle handle;
    std::uint32_t id, count = 0;                                 // as record() returned
    std::vector<std::pair<std::uint32_t, std::uint64_t>> until;  // (peer, messages consumed)
  };
  struct Opened {  // of a peer, by its ids
    std::map<std::uint32_t, std::byte*> blocks;
    std::map<std::uint32_t, void*> events;
  };
  struct Notice;  // what a message says beside its own fields
  struct Heard {  // a peer's rows, and where it wants a result
    std::uintptr_t rows = 0, stride = 0, out = 0;
  };

  // Runs `operation` as the one operation of the group, on `stream`.
  template <typename F>
  Status run(double timeout_s, DeviceStream stream, F&& operation);

  std::byte* take(std::size_t bytes);
  [[nodiscard]] Place place_of(std::uintptr_t address) const;

  // Memory for this operation alone, until the next reserve().
  void reserve(std::size_t bytes);
  std::uintptr_t staged(std::size_t bytes);
  Rows stage(const Rows& rows, std::size_t row_bytes);

  Event& free_event();
  // Steps 1 and 3: `rows` and `out` in exported memory; null: none.
  Status tell(Event& event, std::uint32_t peer, std::uint32_t kind, std::uint64_t total,
              const Rows* rows, std::uintptr_t out);
  Status tell_all(std::span<const std::uint32_t> peers, std::uint32_t kind, std::uint64_t total,
                  const Rows* rows, std::uintptr_t out);
  // Steps 2 and 4.
  Status hear(std::uint32_t peer, std::uint32_t kind, std::uint64_t total, Heard* heard);
  Status hear_done(std::span<const std::uint32_t> peers);
  Status tell_done(std::span<const std::uint32_t> peers);
  // A peer whose call failed may write its rows again although they were not read.
  Status still_whole(std::span<const std::uint32_t> peers);

  Status average_once(const AveragePlan& plan, const AverageCall& call, Rows x,
                      std::optional<Rows> addend);
  Status sum_slices(const SumCall& call);
  [[nodiscard]] std::vector<std::uint32_t> others() const;

  std::shared_ptr<Group> group_;
  std::unique_ptr<Device> device_;
  mutable std::mutex memory_mutex_;  // memory is given back by whatever thread drops a tensor
  std::deque<Block> blocks_;
  std::deque<Event> events_;
  std::vector<Opened> opened_;  // by peer

  std::byte* staging_ = nullptr;
  std::size_t staging_bytes_ = 0, staging_used_ = 0;
  Event fence_;  // recorded after the last operation
  bool fenced_ = false, closed_ = false;
  DeviceStream stream_ = 0;
  double timeout_s_ = 0;
};

}  // namespace gossamer
