#include "group.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>

namespace gossamer {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kMagic = 0x32726d6173736f67;  // "gossamr2"
constexpr std::uint64_t kPage = 4096;
// For collectives, and as much for the pieces of exchanges with all peers: stays in cache.
constexpr std::uint64_t kStagingBytes = 16 << 20;
constexpr std::uint64_t kLeastPieces = 2;      // staged for a peer: one is read, one is written
constexpr std::size_t kStagedBytes = 1 << 20;  // larger messages are staged in the arena
constexpr auto kFarewell = std::chrono::seconds(2);     // for peers to read what they were lent
constexpr auto kSlice = std::chrono::milliseconds(50);  // between looks whether a peer still lives

// kFailing: an operation failed, and what was lent to peers is still as it was; kFailed: no longer.
enum State : std::uint32_t { kJoining = 0, kOpen = 1, kClosed = 2, kFailing = 3, kFailed = 4 };

std::uint64_t round_up(std::uint64_t bytes, std::uint64_t to) { return (bytes + to - 1) / to * to; }

std::string label_of(const JobId& job, std::uint32_t process) {
  std::string text = "gossamer-" + std::to_string(geteuid()) + "-";
  for (std::size_t k = 0; k < 4; ++k) {
    constexpr char kDigits[] = "0123456789abcdef";
    const auto byte = std::to_integer<unsigned>(job[k]);
    text += {kDigits[byte >> 4], kDigits[byte & 15]};
  }
  return text + "-" + std::to_string(process);
}

// Processes that share a core give it away sooner: the one they wait for may need it.
Patience patience_of(std::uint32_t processes, std::uint32_t cores) {
  if (processes <= cores) return {std::chrono::microseconds(50), 0};
  return {std::chrono::microseconds(1), 20};
}

}  // namespace

struct Group::Header {
  std::uint64_t magic;
  std::uint32_t process, processes;
  JobId job;
  alignas(64) std::atomic<std::uint32_t> state;
  Bell bell;
};

Group::Group(const JobId& job, std::uint32_t process, std::uint32_t processes, std::size_t bytes,
             std::uint32_t cores)
    : job_(job),
      process_(process),
      processes_(processes),
      patience_(patience_of(processes, cores)),
      sent_(processes),
      taken_(processes),
      asked_(processes),
      lent_(processes),
      staging_begin_(round_up(sizeof(Header), kPage) +
                     round_up(processes * sizeof(Channel), kPage)),
      quota_(std::max(kStagingBytes / processes / kPieceBytes, kLeastPieces) * kPieceBytes),
      arena_begin_(staging_begin_ + kStagingBytes + processes * quota_),
      staged_(staging_begin_, staging_begin_ + kStagingBytes),
      arena_(arena_begin_, arena_begin_ + round_up(bytes, kPage)),
      sends_(processes),
      receives_(processes) {
  for (std::uint32_t p = 0; p < processes; ++p) {
    const std::uint64_t begin = staging_begin_ + kStagingBytes + p * quota_;
    pieces_.emplace_back(begin, begin + quota_);
  }
  own_ = Segment::create(label_of(job, process), arena_begin_ + round_up(bytes, kPage));
  segments_.resize(processes);
  segments_[process] = own_;
  Header& own = header(process);  // new memory is zero: every counter starts at 0
  own.magic = kMagic;
  own.process = process;
  own.processes = processes;
  own.job = job;
  own.state.store(kOpen, std::memory_order_release);
}

Group::~Group() { close(); }

void Group::attach(const std::vector<Ticket>& tickets) {
  if (tickets.size() != processes_) throw std::runtime_error("a ticket per process is needed");
  for (std::uint32_t p = 0; p < processes_; ++p) {
    if (p == process_) continue;
    segments_[p] = Segment::attach(tickets[p]);
    const Header& other = header(p);
    if (segments_[p]->size() < sizeof(Header) || other.magic != kMagic || other.job != job_ ||
        other.process != p || other.processes != processes_) {
      throw std::runtime_error("process " + std::to_string(p) + " is of another job");
    }
  }
}

std::byte* Group::allocate(std::size_t bytes) {
  check_member();
  const std::lock_guard lock(arena_mutex_);
  const auto offset = arena_.take(std::max<std::size_t>(bytes, 1));
  if (!offset) throw std::bad_alloc();
  std::memset(own_->data() + *offset, 0, bytes);
  return own_->data() + *offset;
}

void Group::release(std::byte* memory) {
  if (is_broken()) return;
  const std::lock_guard lock(arena_mutex_);
  arena_.give_back(offset_of(memory));
}

bool Group::owns(std::uintptr_t address, std::size_t bytes) const noexcept {
  const auto begin = reinterpret_cast<std::uintptr_t>(own_->data()) + arena_begin_;
  const auto end = reinterpret_cast<std::uintptr_t>(own_->data()) + own_->size();
  return address >= begin && address + bytes <= end;
}

void Group::close() {
  if (in_forked_child()) return;
  const std::lock_guard lock(mutex_);
  std::uint32_t open = kOpen;
  if (!header(process_).state.compare_exchange_strong(open, kClosed)) return;
  for (std::uint32_t p = 0; p < processes_; ++p) {
    if (segments_[p]) header(p).bell.ring();
  }
}

bool Group::in_forked_child() const noexcept { return own_->ticket().pid != process_id(); }

void Group::check_member() const {
  if (in_forked_child()) {
    throw std::runtime_error(
        "this process was forked from a member of the group and is none: it must not call it");
  }
}

void Group::check_peer(std::uint32_t peer) const {
  if (peer >= processes_) {
    throw std::out_of_range("process " + std::to_string(peer) + " is none of the " +
                            std::to_string(processes_) + " of this group");
  }
  if (peer == process_) {
    throw std::invalid_argument("process " + std::to_string(peer) +
                                " cannot exchange messages with itself");
  }
}

Group::Header& Group::header(std::uint32_t process) const noexcept {
  return *reinterpret_cast<Header*>(segments_[process]->data());
}

Channel& Group::channel(std::uint32_t from, std::uint32_t to) const noexcept {
  const std::uint64_t first = round_up(sizeof(Header), kPage);
  return reinterpret_cast<Channel*>(at(from, first))[to];
}

void Group::post(std::uint32_t peer) noexcept {
  channel(process_, peer).posted.store(++sent_[peer], std::memory_order_seq_cst);
  header(peer).bell.ring();
}

void Group::consume(std::uint32_t peer) noexcept {
  channel(peer, process_).consumed.store(++taken_[peer], std::memory_order_seq_cst);
  header(peer).bell.ring();
}

void Group::report(std::uint32_t peer, std::size_t pieces) noexcept {
  std::atomic<std::uint64_t>& read = channel(peer, process_).read;
  const std::uint64_t before = read.load(std::memory_order_relaxed);  // this process's own count
  read.store(before + pieces, std::memory_order_seq_cst);
  header(peer).bell.ring();
}

// --- staging ---------------------------------------------------------------------------------

bool Group::is_read(const Staged& part) const noexcept {
  return std::ranges::all_of(
      part.until, [&](const auto& u) { return channel(process_, u.first).done(u.second); });
}

std::byte* Group::stage(std::size_t bytes) {
  const auto read = [&](const Staged& part) { return is_read(part); };
  const std::uint64_t size = round_up(bytes, 64);
  if (size <= kStagedBytes) {
    newest_ = staged_.take(size, read);
    return newest_ == nullptr ? nullptr : at(process_, newest_->begin);
  }
  const std::lock_guard lock(arena_mutex_);
  std::erase_if(parked_, [&](const Staged& part) {
    const bool free = read(part);
    if (free) arena_.give_back(part.begin);
    return free;
  });
  const auto begin = arena_.take(size);
  if (!begin) return nullptr;
  newest_ = &parked_.emplace_back(Staged{*begin, *begin + size, {}});
  return at(process_, *begin);
}

std::byte* Group::stage_piece(std::uint32_t peer, std::size_t bytes) {
  newest_ = pieces_[peer].take(round_up(bytes, 64), [&](const Staged& p) { return is_read(p); });
  return newest_ == nullptr ? nullptr : at(process_, newest_->begin);
}

void Group::stage_until(std::uint32_t peer) { newest_->until.emplace_back(peer, sent_[peer]); }

std::optional<std::pair<std::uint32_t, std::uint64_t>> Group::unread() const noexcept {
  const auto of = [&](const auto& parts) -> std::optional<std::pair<std::uint32_t, std::uint64_t>> {
    for (const Staged& part : parts) {
      for (const auto& u : part.until) {
        if (!channel(process_, u.first).done(u.second)) return u;
      }
    }
    return std::nullopt;
  };
  const auto staged = of(staged_.parts());
  return staged ? staged : of(parked_);
}

// --- waiting ---------------------------------------------------------------------------------

Outcome Group::state_of(std::uint32_t peer) const noexcept {
  const std::uint32_t state = header(peer).state.load(std::memory_order_acquire);
  if (state == kClosed) return Outcome::kLeft;
  if (state == kFailing || state == kFailed) return Outcome::kStopped;
  return segments_[peer]->owner_alive() ? Outcome::kOk : Outcome::kLost;
}

bool Group::is_broken() const noexcept {
  const std::uint32_t state = header(process_).state.load(std::memory_order_acquire);
  return state == kFailing || state == kFailed;
}

bool Group::has_failed(std::uint32_t peer) const noexcept {
  return header(peer).state.load(std::memory_order_acquire) == kFailed;
}

Status Group::root_of(Status stopped) const noexcept {
  for (std::uint32_t p = 0; p < processes_; ++p) {
    if (!segments_[p]->owner_alive()) return {Outcome::kLost, p};
  }
  return stopped;
}

Status Group::failed(Status status) noexcept {
  if (!broken_.ok()) return broken_;
  broken_ = status;
  const auto say = [&](State state) {
    header(process_).state.store(state, std::memory_order_seq_cst);
    for (std::uint32_t p = 0; p < processes_; ++p) {
      if (p != process_) header(p).bell.ring();
    }
  };
  say(kFailing);
  // The rows that a peer reads here are right, and its result may be: let it finish.
  const auto begin = Clock::now();
  for (std::uint32_t p = 0; p < processes_; ++p) {
    const auto read = [&] { return channel(process_, p).done(lent_[p]); };
    const auto stop = [&] {
      return state_of(p) != Outcome::kOk || Clock::now() - begin > kFarewell;
    };
    if (p != process_) wait_until(header(process_).bell, patience_, kSlice, read, stop);
  }
  say(kFailed);
  // Whoever sees what is written here from now on sees that this process failed, too.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return status;
}

Status Group::wait_any(double timeout_s, const std::function<bool()>& ready,
                       const std::function<std::vector<std::uint32_t>()>& peers) {
  const auto limit = std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(std::min(timeout_s, 1e9)));
  const auto deadline = Clock::now() + limit;
  Status found;
  const auto stop = [&] {
    if (interrupt_) interrupt_();
    for (const std::uint32_t peer : peers()) {
      found = {state_of(peer), peer};
      if (found.outcome == Outcome::kStopped) found = root_of(found);
      if (!found.ok()) return true;
      if (Clock::now() > deadline) found.outcome = Outcome::kTimeout;
      if (!found.ok()) return true;
    }
    return false;
  };
  try {
    const auto slice = std::min<std::chrono::nanoseconds>(kSlice, limit);
    if (wait_until(header(process_).bell, patience_, slice, ready, stop)) return {};
  } catch (...) {
    failed({Outcome::kStopped, process_});
    throw;
  }
  return found;
}

}  // namespace gossamer
