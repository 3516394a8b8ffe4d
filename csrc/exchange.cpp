#include "exchange.h"

#include <algorithm>
#include <cstring>

namespace gossamer {
namespace {

constexpr std::size_t kDirectBytes = 16 << 10;  // from here a copy costs more than waiting for the
                                                // peer to read the row where it lies

}  // namespace

bool Group::progress_send(Transfer& t) {
  Channel& out = channel(process_, t.peer);
  if (!out.has_room(sent_[t.peer])) return false;
  const std::size_t left = t.bytes - t.moved;
  Message& message = next_slot(t.peer);
  message.total = t.bytes;
  message.kind = 0;
  message.rows = 1;
  message.mark = 0;
  if (left <= Message::kInlineBytes) {
    message.bytes = left;
    message.offset = Message::kNowhere;
    if (left > 0) std::memcpy(message.payload, t.data + t.moved, left);
    post(t.peer);
    t.moved = t.bytes;
    t.done = true;
    return true;
  }
  if (left > kDirectBytes && owns(reinterpret_cast<std::uintptr_t>(t.data), t.bytes)) {
    message.bytes = left;
    message.offset = offset_of(t.data + t.moved);
    post(t.peer);
    t.moved = t.bytes;
    t.direct = true;
    t.last = lent_[t.peer] = sent_[t.peer];
    unread_.push_back(&t);
    return true;
  }
  const std::size_t piece = std::min(left, kPieceBytes);
  std::byte* staged = stage_piece(t.peer, piece);
  if (staged == nullptr) return false;
  std::memcpy(staged, t.data + t.moved, piece);
  message.bytes = piece;
  message.offset = offset_of(staged);
  post(t.peer);
  stage_until(t.peer);
  t.moved += piece;
  t.done = t.moved == t.bytes;
  return true;
}

bool Group::progress_receive(Transfer& t) {
  if (!has_message(t.peer)) return false;
  const Message& message = incoming(t.peer);
  if (message.kind != 0 || message.total != t.bytes || message.bytes > t.bytes - t.moved) {
    failed({Outcome::kMismatch, t.peer});
    return false;
  }
  const std::byte* from =
      message.offset == Message::kNowhere ? message.payload : at(t.peer, message.offset);
  if (message.bytes > 0) std::memcpy(t.data + t.moved, from, message.bytes);
  std::atomic_thread_fence(std::memory_order_acquire);  // it was read before this look
  if (has_failed(t.peer)) {
    failed(root_of({Outcome::kStopped, t.peer}));
    return false;
  }
  t.moved += message.bytes;
  t.done = t.moved == t.bytes;
  consume(t.peer);
  return true;
}

bool Group::progress() {
  bool moved = false;
  const auto drain = [&](std::deque<Transfer*>& queue, bool (Group::*step)(Transfer&)) {
    while (broken_.ok() && !queue.empty() && (this->*step)(*queue.front())) {
      moved = true;
      Transfer& t = *queue.front();
      if (t.done || t.direct) queue.pop_front();
    }
  };
  for (auto& queue : sends_) drain(queue, &Group::progress_send);
  for (auto& queue : receives_) drain(queue, &Group::progress_receive);
  std::erase_if(unread_, [&](Transfer* t) {
    t->done = channel(process_, t->peer).done(t->last);
    moved |= t->done;
    return t->done;
  });
  return moved;
}

Exchange::Exchange(std::shared_ptr<Group> group, std::vector<Transfer> sends,
                   std::vector<Transfer> receives)
    : group_(std::move(group)), sends_(std::move(sends)), receives_(std::move(receives)) {
  group_->check_member();
  for (const auto* transfers : {&sends_, &receives_}) {
    for (const Transfer& t : *transfers) group_->check_peer(t.peer);
  }
  const std::lock_guard lock(group_->mutex_);
  try {
    for (Transfer& t : receives_) group_->receives_[t.peer].push_back(&t);
    for (Transfer& t : sends_) group_->sends_[t.peer].push_back(&t);
    if (group_->broken_.ok()) group_->progress();
  } catch (...) {  // no memory: the queues must not keep what goes now
    give_up();
    throw;
  }
}

Exchange::~Exchange() {
  if (group_->in_forked_child()) return;
  const std::lock_guard lock(group_->mutex_);
  if (!finished()) give_up();
}

// What the peers expect can no longer come.
void Exchange::give_up() noexcept {
  group_->failed({Outcome::kStopped, group_->process_});
  const auto mine = [&](const Transfer* t) {
    const auto within = [&](const std::vector<Transfer>& all) {
      return std::ranges::any_of(all, [&](const Transfer& own) { return &own == t; });
    };
    return within(sends_) || within(receives_);
  };
  for (auto* queues : {&group_->sends_, &group_->receives_}) {
    for (auto& queue : *queues) std::erase_if(queue, mine);
  }
  std::erase_if(group_->unread_, mine);
}

bool Exchange::finished() const {
  const auto done = [](const Transfer& t) { return t.done; };
  return std::ranges::all_of(sends_, done) && std::ranges::all_of(receives_, done);
}

std::vector<std::uint32_t> Exchange::waiting_for() const {
  std::vector<std::uint32_t> peers;
  for (const auto* transfers : {&receives_, &sends_}) {
    for (const Transfer& t : *transfers) {
      if (!t.done) peers.push_back(t.peer);
    }
  }
  return peers;
}

std::optional<Status> Exchange::test() {
  group_->check_member();
  const std::lock_guard lock(group_->mutex_);
  for (const std::uint32_t peer : waiting_for()) {
    // Looked at first: what a peer sent before it ended is still taken below.
    const Outcome state = group_->state_of(peer);
    if (group_->broken_.ok()) group_->progress();
    if (finished()) break;
    if (!group_->broken_.ok()) return group_->broken_;
    if (state != Outcome::kOk) return group_->failed({state, peer});
  }
  if (finished()) return Status{};
  return std::nullopt;
}

Status Exchange::wait(double timeout_s) {
  group_->check_member();
  const std::lock_guard lock(group_->mutex_);
  if (!group_->broken_.ok()) return group_->broken_;
  const auto ready = [&] {
    group_->progress();
    return finished() || !group_->broken_.ok();
  };
  const Status status = group_->wait_any(timeout_s, ready, [&] { return waiting_for(); });
  if (!status.ok()) return group_->failed(status);
  return group_->broken_;  // a message of another size
}

}  // namespace gossamer
