// What every collective is made of: messages of the group's channels, one operation at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "group.h"
#include "schedule.h"
#include "weighted_sum.h"

namespace gossamer {

// Kinds of messages: one of another kind than expected means that processes went apart.
enum class Kind : std::uint32_t { kTransfer = 0, kAverage = 1, kSum = 2, kResult = 3, kGather = 4 };

// Holds the group for the time of one operation.
class Collective {
 public:
  // `bits`: kind_bits() of the rows' dtype, where they have one.
  Collective(Group& group, double timeout_s, std::uint32_t bits = 0)
      : g_(member(group)), timeout_s_(timeout_s), bits_(bits), lock_(group.mutex_) {}

 protected:
  static constexpr std::size_t kDirectBytes = 64
                                              << 10;  // rows from here on are read where they lie
  static constexpr std::size_t kAlign = 64;           // elements: whole cache lines in every dtype

  // Runs an operation. One that throws ends the group: peers would take what it has sent for the
  // messages of the next one.
  template <typename F>
  Status run_whole(F&& operation) {
    try {
      return operation();
    } catch (...) {
      g_.failed({Outcome::kStopped, g_.process_});
      throw;
    }
  }

  // Until what exchanges have queued is on its way: messages of one pair keep their order.
  Status settle();

  // A message to `peer`: `data` lies in this process's segment, or fits into the message, or there
  // is none. `mark` is for the receiver.
  Status send(std::uint32_t peer, Kind kind, std::uint64_t total, std::uint64_t bytes,
              const std::byte* data, std::uint64_t stride, std::uint64_t mark);
  // Memory of this process's segment that the peers named to stage_until() will read.
  Status stage(std::size_t bytes, std::byte** at);
  // Until the next message of `peer` is there; of another kind or size it is a mismatch.
  Status receive(std::uint32_t peer, Kind kind, std::uint64_t total);

  [[nodiscard]] const Message& message(std::uint32_t peer) const { return g_.incoming(peer); }
  [[nodiscard]] const std::byte* received(std::uint32_t peer) const {
    const Message& m = message(peer);
    return m.offset == Message::kNowhere ? m.payload : g_.at(peer, m.offset);
  }
  // Until `peer` has read all that was sent to it.
  Status until_read(std::uint32_t peer);

  // A peer whose call failed (it lost patience with this process, say) may write its rows again
  // although they were not read: what was just read from them does not count.
  Status still_whole(std::uint32_t peer);

  // Peers, starting after this process so that not all call on the first one.
  template <typename F>
  Status each_peer(F&& f) {
    for (std::uint32_t k = 1; k < g_.processes_; ++k) {
      if (const Status s = f((g_.process_ + k) % g_.processes_); !s.ok()) return s;
    }
    return {};
  }
  void consume(std::uint32_t peer) { g_.consume(peer); }
  Status consume_all() {
    return each_peer([&](std::uint32_t p) {
      consume(p);
      return Status{};
    });
  }
  void stage_until(std::uint32_t peer) { g_.stage_until(peer); }
  // The last message to `peer` points to rows of the caller's: they stay until it has read them,
  // even where this operation fails.
  void lend(std::uint32_t peer) { g_.lent_[peer] = g_.sent_[peer]; }

  // Pieces of rows that their owner waits to overwrite: `count` more of `peer`'s were read here;
  // and how many of this process's `peer` had been asked to read before this operation.
  void report(std::uint32_t peer, std::size_t count) { g_.report(peer, count); }
  [[nodiscard]] std::uint64_t reported_by(std::uint32_t peer) const { return g_.asked_[peer]; }
  void count_reported(std::uint32_t peer, std::size_t count) { g_.asked_[peer] += count; }

  // As Group::wait, without ending the group where it fails; and ending it.
  template <typename Ready>
  Status watch(std::uint32_t peer, Ready&& ready) {
    return g_.watch(peer, timeout_s_, ready);
  }
  Status give_up(Status status) { return g_.failed(status); }

  [[nodiscard]] const Channel& channel_to(std::uint32_t peer) const {
    return g_.channel(g_.process_, peer);
  }
  [[nodiscard]] std::byte* memory_of(std::uint32_t process, std::uint64_t offset) const {
    return g_.at(process, offset);
  }
  [[nodiscard]] std::uint64_t offset_of(const void* own) const { return g_.offset_of(own); }

  static std::size_t clamp_width(std::size_t bytes, std::size_t element_bytes, std::size_t d);

 private:
  static Group& member(Group& group) {
    group.check_member();  // before it is locked: the lock may have been held when it was forked
    return group;
  }

 protected:
  Group& g_;
  const double timeout_s_;
  const std::uint32_t bits_;
  const std::lock_guard<std::mutex> lock_;
  std::vector<Term> terms_;
};

}  // namespace gossamer
