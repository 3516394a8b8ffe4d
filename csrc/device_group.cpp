#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "device_collectives.h"

namespace gossamer {
namespace {

constexpr std::size_t kGrain = 2 << 20;        // devices export memory in pages of this size
constexpr std::size_t kBlockBytes = 32 << 20;  // least to ask the device for
constexpr std::uint64_t kNowhere = Message::kNowhere;

std::uintptr_t address_of(const std::byte* memory) {
  return reinterpret_cast<std::uintptr_t>(memory);
}

}  // namespace

struct DeviceGroup::Notice {
  DeviceHandle event, rows, out;
  std::uint32_t event_id, event_count, rows_block, out_block;
};

DeviceGroup::DeviceGroup(std::shared_ptr<Group> group, std::unique_ptr<Device> device)
    : group_(std::move(group)), device_(std::move(device)), opened_(group_->processes()) {
  fence_.event = device_->make_event(fence_.handle);
}

DeviceGroup::~DeviceGroup() {
  try {
    close();
  } catch (...) {  // interrupted: peers notice when the process ends
    return;
  }
  // What a peer may still have open is left to the end of the process.
  for (const std::uint32_t peer : others()) {
    if (!group_->segments_[peer]) continue;  // never attached
    const Outcome state = group_->state_of(peer);
    if (state != Outcome::kLeft && state != Outcome::kLost) return;
  }
  if (!group_->broken_.ok()) return;
  for (Event& e : events_) device_->free_event(e.event);
  device_->free_event(fence_.event);
  for (Block& block : blocks_) device_->free(block.data);
}

void DeviceGroup::close() {
  {
    const std::lock_guard lock(group_->mutex_);
    if (closed_) return;
    closed_ = true;
    // After a failure work may be queued that never ends, and uses what would be closed.
    if (group_->broken_.ok()) {
      for (const std::uint32_t peer : others()) {  // those who have yet to open what it names
        if (!group_->segments_[peer]) continue;
        const Channel& channel = group_->channel(group_->process(), peer);
        const std::uint64_t count = group_->sent_[peer];
        (void)group_->watch(peer, timeout_s_, [&, count] { return channel.done(count); });
      }
      try {
        if (fenced_) device_->synchronize(fence_.event);
      } catch (const std::runtime_error&) {  // whoever used the device was told
      }
      for (Opened& of_peer : opened_) {
        for (const auto& [id, event] : of_peer.events) device_->free_event(event);
        for (const auto& [id, memory] : of_peer.blocks) device_->close_memory(memory);
      }
      opened_.assign(opened_.size(), {});
    }
  }
  group_->close();
}

std::vector<std::uint32_t> DeviceGroup::others() const {
  std::vector<std::uint32_t> peers;
  for (std::uint32_t k = 1; k < group_->processes(); ++k) {
    peers.push_back((group_->process() + k) % group_->processes());
  }
  return peers;
}

// --- memory ----------------------------------------------------------------------------------

std::byte* DeviceGroup::take(std::size_t bytes) {
  const std::lock_guard lock(memory_mutex_);
  bytes = std::max<std::size_t>(bytes, 1);
  for (Block& block : blocks_) {
    if (const auto offset = block.arena.take(bytes)) return block.data + *offset;
  }
  const std::size_t size = std::max((bytes + kGrain - 1) / kGrain * kGrain, kBlockBytes);
  Block block{.data = nullptr, .bytes = size, .handle = {}, .arena = Arena(0, size)};
  block.data = device_->allocate(size, block.handle);
  blocks_.push_back(std::move(block));
  return blocks_.back().data + *blocks_.back().arena.take(bytes);
}

std::byte* DeviceGroup::allocate(std::size_t bytes, DeviceStream stream) {
  group_->check_member();
  const std::lock_guard lock(group_->mutex_);
  std::byte* memory = take(bytes);
  // Operations may still use what was released.
  if (fenced_ && stream != stream_) device_->wait(fence_.event, fence_.count, stream);
  device_->zero(memory, bytes, stream);
  return memory;
}

void DeviceGroup::release(std::byte* memory) {
  if (group_->is_broken()) return;
  const std::lock_guard lock(memory_mutex_);
  for (Block& block : blocks_) {
    if (memory >= block.data && memory < block.data + block.bytes) {
      block.arena.give_back(static_cast<std::uint64_t>(memory - block.data));
    }
  }
}

DeviceGroup::Place DeviceGroup::place_of(std::uintptr_t at) const {
  const std::lock_guard lock(memory_mutex_);
  for (std::uint32_t id = 0; id < blocks_.size(); ++id) {
    const Block& block = blocks_[id];
    const std::uintptr_t begin = address_of(block.data);
    if (at < begin || at >= begin + block.bytes) continue;
    return {block.handle, id, at - begin, begin + block.bytes - at};
  }
  return {{}, 0, kNowhere, 0};
}

// --- messages --------------------------------------------------------------------------------

DeviceGroup::Event& DeviceGroup::free_event() {
  for (Event& e : events_) {
    const bool free = std::ranges::all_of(e.until, [&](const auto& u) {
      return group_->channel(group_->process(), u.first).done(u.second);
    });
    if (!free) continue;
    e.until.clear();
    return e;
  }
  Event& e = events_.emplace_back();
  e.id = static_cast<std::uint32_t>(events_.size() - 1);
  e.event = device_->make_event(e.handle);
  return e;
}

Status DeviceGroup::tell(Event& event, std::uint32_t peer, std::uint32_t kind, std::uint64_t total,
                         const Rows* rows, std::uintptr_t out) {
  static_assert(sizeof(Notice) <= Message::kInlineBytes);
  const Channel& channel = group_->channel(group_->process(), peer);
  const std::uint64_t count = group_->sent_[peer];
  const Status s = group_->wait(peer, timeout_s_, [&, count] { return channel.has_room(count); });
  if (!s.ok()) return s;
  Message& m = group_->next_slot(peer);
  Notice notice{};
  notice.event = event.handle;
  notice.event_id = event.id;
  notice.event_count = event.count;
  m.kind = kind;
  m.total = total;
  m.offset = m.mark = kNowhere;
  if (rows != nullptr) {
    const Place place = place_of(rows->address);
    notice.rows = place.handle;
    notice.rows_block = place.block;
    m.offset = place.offset;
    m.stride = rows->stride_bytes;
  }
  if (out != 0) {
    const Place place = place_of(out);
    notice.out = place.handle;
    notice.out_block = place.block;
    m.mark = place.offset;
  }
  std::memcpy(m.payload, &notice, sizeof notice);
  group_->post(peer);
  event.until.emplace_back(peer, group_->sent_[peer]);
  return {};
}

Status DeviceGroup::tell_all(std::span<const std::uint32_t> peers, std::uint32_t kind,
                             std::uint64_t total, const Rows* rows, std::uintptr_t out) {
  if (peers.empty()) return {};
  Event& event = free_event();
  event.count = device_->record(event.event, stream_);
  for (const std::uint32_t peer : peers) {
    if (const Status s = tell(event, peer, kind, total, rows, out); !s.ok()) return s;
  }
  return {};
}

Status DeviceGroup::hear(std::uint32_t peer, std::uint32_t kind, std::uint64_t total,
                         Heard* heard) {
  const Status s = group_->wait(peer, timeout_s_, [&] { return group_->has_message(peer); });
  if (!s.ok()) return s;
  if (const Status whole = still_whole({&peer, 1}); !whole.ok()) return whole;
  const Message& m = group_->incoming(peer);
  if (m.kind != kind || m.total != total) return group_->failed({Outcome::kMismatch, peer});
  Notice notice;
  std::memcpy(&notice, m.payload, sizeof notice);
  Opened& opened = opened_[peer];
  void*& event = opened.events[notice.event_id];
  if (event == nullptr) event = device_->open_event(notice.event);
  device_->wait(event, notice.event_count, stream_);
  const auto open = [&](std::uint32_t id, const DeviceHandle& handle, std::uint64_t offset) {
    if (offset == kNowhere) return std::uintptr_t{0};
    std::byte*& memory = opened.blocks[id];
    if (memory == nullptr) memory = device_->open_memory(handle);
    return address_of(memory + offset);
  };
  if (heard != nullptr) {
    heard->rows = open(notice.rows_block, notice.rows, m.offset);
    heard->stride = m.stride;
    heard->out = open(notice.out_block, notice.out, m.mark);
  }
  group_->consume(peer);
  return {};
}

Status DeviceGroup::still_whole(std::span<const std::uint32_t> peers) {
  for (const std::uint32_t peer : peers) {
    if (group_->has_failed(peer)) {
      return group_->failed(group_->root_of({Outcome::kStopped, peer}));
    }
  }
  return {};
}

Status DeviceGroup::tell_done(std::span<const std::uint32_t> peers) {
  const Status s = tell_all(peers, kDone, 0, nullptr, 0);
  return s.ok() ? still_whole(peers) : s;
}

Status DeviceGroup::hear_done(std::span<const std::uint32_t> peers) {
  for (const std::uint32_t peer : peers) {
    if (const Status s = hear(peer, kDone, 0, nullptr); !s.ok()) return s;
  }
  return {};
}

}  // namespace gossamer
