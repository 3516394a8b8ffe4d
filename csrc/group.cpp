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

constexpr std::uint64_t kMagic = 0x31726d6173736f67;  // "gossamr1"
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kStagingBytes = 16 << 20;    // a few pieces of each peer's: stays in cache
constexpr std::size_t kStagedBytes = 1 << 20;        // larger messages are staged in the arena
constexpr auto kFarewell = std::chrono::seconds(2);  // for peers to read what they were lent
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
      staging_end_(staging_begin_ + kStagingBytes),
      staging_next_(staging_begin_),
      arena_(staging_end_, staging_end_ + round_up(bytes, kPage)),
      sends_(processes),
      receives_(processes) {
  own_ = Segment::create(label_of(job, process), staging_end_ + round_up(bytes, kPage));
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
  const std::lock_guard lock(arena_mutex_);
  const auto offset = arena_.take(std::max<std::size_t>(bytes, 1));
  if (!offset) throw std::bad_alloc();
  std::memset(own_->data() + *offset, 0, bytes);
  return own_->data() + *offset;
}

void Group::release(std::byte* memory) {
  const std::lock_guard lock(arena_mutex_);
  arena_.give_back(offset_of(memory));
}

bool Group::owns(std::uintptr_t address, std::size_t bytes) const noexcept {
  const auto begin = reinterpret_cast<std::uintptr_t>(own_->data()) + staging_end_;
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

bool Group::in_forked_child() const noexcept { return own_->ticket().pid != getpid(); }

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
  std::atomic<std::uint32_t>& read = channel(peer, process_).read;
  const auto before = read.load(std::memory_order_relaxed);  // this process's own count
  read.store(before + static_cast<std::uint32_t>(pieces), std::memory_order_seq_cst);
  header(peer).bell.ring();
}

// --- staging ---------------------------------------------------------------------------------

std::byte* Group::stage(std::size_t bytes) noexcept {
  const auto read = [&](const Staged& part) {
    return std::ranges::all_of(
        part.until, [&](const auto& u) { return channel(process_, u.first).done(u.second); });
  };
  const std::uint64_t size = round_up(bytes, 64);
  if (size > kStagedBytes) {
    const std::lock_guard lock(arena_mutex_);
    while (!parked_.empty() && read(parked_.front())) {
      arena_.give_back(parked_.front().begin);
      parked_.pop_front();
    }
    const auto begin = arena_.take(size);
    if (!begin) return nullptr;
    newest_ = &parked_.emplace_back(Staged{*begin, *begin + size, {}});
    return at(process_, *begin);
  }
  while (!staged_.empty() && read(staged_.front())) staged_.pop_front();
  if (staged_.empty()) staging_next_ = staging_begin_;
  // In use: from the front part's begin up to staging_next_, around the end.
  const bool wrapped = !staged_.empty() && staging_next_ <= staged_.front().begin;
  const std::uint64_t limit = wrapped ? staged_.front().begin : staging_end_;
  if (staging_next_ + size > limit) {
    if (wrapped || staged_.empty() || staging_begin_ + size > staged_.front().begin) return nullptr;
    staging_next_ = staging_begin_;
  }
  newest_ = &staged_.emplace_back(Staged{staging_next_, staging_next_ + size, {}});
  staging_next_ += size;
  return at(process_, newest_->begin);
}

void Group::stage_until(std::uint32_t peer) noexcept {
  newest_->until.emplace_back(peer, sent_[peer]);
}

std::uint32_t Group::oldest_reader() const noexcept {
  for (const auto* parts : {&staged_, &parked_}) {
    for (const Staged& part : *parts) {
      for (const auto& [peer, count] : part.until) {
        if (!channel(process_, peer).done(count)) return peer;
      }
    }
  }
  return process_;
}

// --- waiting ---------------------------------------------------------------------------------

Outcome Group::state_of(std::uint32_t peer) const noexcept {
  const std::uint32_t state = header(peer).state.load(std::memory_order_acquire);
  if (state == kClosed) return Outcome::kLeft;
  if (state == kFailing || state == kFailed) return Outcome::kStopped;
  return segments_[peer]->owner_alive() ? Outcome::kOk : Outcome::kLost;
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
