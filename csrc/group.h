// The processes of a job on one host, and messages between them through shared memory.
//
// Each process owns a segment: a header with its bell, a channel to every other process, staging
// areas for messages on their way, and an arena in which rows live that peers read without a copy.
// Collectives share a staging area; exchanges have one for each peer, so that a peer that does not
// receive yet holds up no message to another.
// Every operation waits for the peers it exchanges with, and for no others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "arena.h"
#include "channel.h"
#include "event.h"
#include "segment.h"
#include "staging.h"

namespace gossamer {

enum class Outcome : int {
  kOk = 0,
  kTimeout = 1,   // the peer did not answer in time
  kLost = 2,      // its process has ended
  kLeft = 3,      // it closed the group
  kStopped = 4,   // an operation of its own failed
  kMismatch = 5,  // it is in another operation, or its message has another size
  kNoMemory = 6,  // this process's shared memory is used up
  kTorn = 7,      // a peer failed in the middle: a row given in place is partly averaged
};

struct Status {
  Outcome outcome = Outcome::kOk;
  std::uint32_t peer = 0;
  [[nodiscard]] bool ok() const noexcept { return outcome == Outcome::kOk; }
};

struct Transfer;  // of exchange.h

class Group : public std::enable_shared_from_this<Group> {
 public:
  // `bytes`: of address space for rows; pages take memory when first written. `cores`: what the
  // processes of the group share, to choose between spinning and sleeping.
  Group(const JobId& job, std::uint32_t process, std::uint32_t processes, std::size_t bytes,
        std::uint32_t cores);
  ~Group();

  [[nodiscard]] const Ticket& ticket() const { return own_->ticket(); }
  // Opens the segments of all, by process. Throws as Segment::attach() and where one is of another
  // job.
  void attach(const std::vector<Ticket>& tickets);
  // Called between sleeps (at most 50 ms apart), may throw.
  void set_interrupt(std::function<void()> interrupt) { interrupt_ = std::move(interrupt); }

  // Zeroed memory that peers read without a copy. Throws std::bad_alloc.
  std::byte* allocate(std::size_t bytes);
  // After a failure it is not handed out again: peers that are late may still write there.
  void release(std::byte* memory);
  [[nodiscard]] bool owns(std::uintptr_t address, std::size_t bytes) const noexcept;

  // Tells the peers that this process has left; memory stays mapped. May be called twice.
  void close();

  [[nodiscard]] std::uint32_t process() const noexcept { return process_; }
  [[nodiscard]] std::uint32_t processes() const noexcept { return processes_; }
  [[nodiscard]] bool shares_cores() const noexcept { return patience_.yields > 0; }

  // Throws where `peer` is no other process of this group.
  void check_peer(std::uint32_t peer) const;
  // A failure has ended this group. For any thread, at any time.
  [[nodiscard]] bool is_broken() const noexcept;
  // Throws in a forked child, which would write into its parent's channels.
  void check_member() const;

 private:
  friend class Exchange;
  friend class Collective;
  friend class DeviceGroup;

  struct Header;
  static constexpr std::size_t kPieceBytes = 512 << 10;  // of an exchange's message

  // A child that this process forked, a data loader's worker say, shares the memory but is no
  // member: what it drops at its end stays open.
  [[nodiscard]] bool in_forked_child() const noexcept;
  [[nodiscard]] Header& header(std::uint32_t process) const noexcept;
  [[nodiscard]] Channel& channel(std::uint32_t from, std::uint32_t to) const noexcept;
  [[nodiscard]] std::byte* at(std::uint32_t process, std::uint64_t offset) const noexcept {
    return segments_[process]->data() + offset;
  }
  [[nodiscard]] std::uint64_t offset_of(const void* own) const noexcept {
    return static_cast<const std::byte*>(own) - own_->data();
  }

  // The next free slot to `peer`, and its sending.
  Message& next_slot(std::uint32_t peer) noexcept {
    return channel(process_, peer).slot(sent_[peer]);
  }
  void post(std::uint32_t peer) noexcept;
  // The oldest message from `peer` that was not consumed, and its end.
  Message& incoming(std::uint32_t peer) noexcept {
    return channel(peer, process_).slot(taken_[peer]);
  }
  [[nodiscard]] bool has_message(std::uint32_t peer) const noexcept {
    return channel(peer, process_).has(taken_[peer]);
  }
  void consume(std::uint32_t peer) noexcept;
  void report(std::uint32_t peer, std::size_t pieces) noexcept;

  // Memory for a message, or nullptr while older ones are still being read: from the staging area
  // of collectives, which stays in cache; large ones from the arena.
  std::byte* stage(std::size_t bytes);
  // Likewise for a piece of an exchange with `peer`, from what is staged for that peer alone.
  std::byte* stage_piece(std::uint32_t peer, std::size_t bytes);
  void stage_until(std::uint32_t peer);  // the part staged last: until its last message
  // A message that keeps a part from being free, as what Channel::done() is asked: the peer and how
  // many it must have consumed. Whoever waits for a change of the counter instead, and reads the
  // counter first after this look, may have missed the last one.
  [[nodiscard]] std::optional<std::pair<std::uint32_t, std::uint64_t>> unread() const noexcept;
  [[nodiscard]] bool is_read(const Staged& part) const noexcept;

  // Waits for what depends on `peer`. Failures are final: the group is told, so that all stop.
  template <typename Ready>
  Status wait(std::uint32_t peer, double timeout_s, Ready&& ready) {
    const Status status = watch(peer, timeout_s, ready);
    return status.ok() ? status : failed(status);
  }
  template <typename Ready>  // leaves the group as it is
  Status watch(std::uint32_t peer, double timeout_s, Ready&& ready) {
    if (ready()) return {};
    return wait_any(timeout_s, ready, [&] { return std::vector{peer}; });
  }
  Status wait_any(double timeout_s, const std::function<bool()>& ready,
                  const std::function<std::vector<std::uint32_t>()>& peers);
  [[nodiscard]] Outcome state_of(std::uint32_t peer) const noexcept;
  [[nodiscard]] bool has_failed(std::uint32_t peer) const noexcept;
  // A peer that stopped by itself often lost another: that one, where its process has ended.
  [[nodiscard]] Status root_of(Status stopped) const noexcept;
  Status failed(Status status) noexcept;

  bool progress();
  bool progress_send(Transfer& transfer);
  bool progress_receive(Transfer& transfer);

  JobId job_;
  std::uint32_t process_, processes_;
  Patience patience_;
  std::shared_ptr<Segment> own_;
  std::vector<std::shared_ptr<Segment>> segments_;
  std::vector<std::uint64_t> sent_, taken_;  // messages per peer
  std::vector<std::uint64_t> asked_;         // pieces to be read, per peer, before this operation
  std::vector<std::uint64_t> lent_;          // per peer, the messages up to the last that points to
                                             // rows of the caller's, where they lie
  std::uint64_t staging_begin_, quota_, arena_begin_;  // `quota_` bytes are staged for each peer
  StagingRing staged_;                                 // of collectives
  std::vector<StagingRing> pieces_;                    // of exchanges, per peer
  std::vector<Staged> parked_;                         // in the arena
  Staged* newest_ = nullptr;
  Arena arena_;
  std::vector<std::deque<Transfer*>> sends_, receives_;  // per peer, in order
  std::vector<Transfer*> unread_;                        // sent from the arena, not yet consumed
  std::function<void()> interrupt_;
  std::mutex mutex_;        // one operation at a time
  std::mutex arena_mutex_;  // memory is given back by whatever thread drops a tensor
  Status broken_;           // the failure that ended this group
};

}  // namespace gossamer
