#include "collective.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace gossamer {

Status Collective::settle() {
  if (!g_.broken_.ok()) return g_.broken_;
  for (std::uint32_t p = 0; p < g_.processes_; ++p) {
    if (g_.sends_[p].empty() && g_.receives_[p].empty()) continue;
    const auto idle = [&] {
      g_.progress();
      return (g_.sends_[p].empty() && g_.receives_[p].empty()) || !g_.broken_.ok();
    };
    if (const Status s = g_.wait(p, timeout_s_, idle); !s.ok()) return s;
  }
  return {};
}

Status Collective::send(std::uint32_t peer, Kind kind, std::uint64_t total, std::uint64_t bytes,
                        const std::byte* data, std::uint64_t stride, std::uint64_t mark) {
  const std::uint64_t count = g_.sent_[peer];
  const Channel& channel = g_.channel(g_.process_, peer);
  if (const Status s = g_.wait(peer, timeout_s_, [&, count] { return channel.has_room(count); });
      !s.ok()) {
    return s;
  }
  Message& m = g_.next_slot(peer);
  m.total = total;
  m.bytes = bytes;
  m.stride = stride;
  m.mark = mark;
  m.kind = static_cast<std::uint32_t>(kind) | bits_;
  if (data != nullptr && bytes <= Message::kInlineBytes) {
    std::memcpy(m.payload, data, bytes);
    m.offset = Message::kNowhere;
  } else {
    m.offset = data == nullptr ? Message::kNowhere : g_.offset_of(data);
  }
  g_.post(peer);
  return {};
}

Status Collective::stage(std::size_t bytes, std::byte** at) {
  while ((*at = g_.stage(bytes)) == nullptr) {
    const auto unread = g_.unread();
    if (!unread) return g_.failed({Outcome::kNoMemory, g_.process_});
    const auto& [reader, count] = *unread;
    const Channel& channel = g_.channel(g_.process_, reader);
    const Status s = g_.wait(reader, timeout_s_, [&, n = count] { return channel.done(n); });
    if (!s.ok()) return s;
  }
  return {};
}

Status Collective::receive(std::uint32_t peer, Kind kind, std::uint64_t total) {
  const Status s = g_.wait(peer, timeout_s_, [&] { return g_.has_message(peer); });
  if (!s.ok()) return s;
  const Message& m = g_.incoming(peer);
  if (m.kind != (static_cast<std::uint32_t>(kind) | bits_) || m.total != total)
    return g_.failed({Outcome::kMismatch, peer});
  return {};
}

Status Collective::until_read(std::uint32_t peer) {
  const std::uint64_t count = g_.sent_[peer];
  const Channel& channel = g_.channel(g_.process_, peer);
  return g_.wait(peer, timeout_s_, [&, count] { return channel.done(count); });
}

Status Collective::still_whole(std::uint32_t peer) {
  std::atomic_thread_fence(std::memory_order_acquire);  // the rows were read before this look
  if (!g_.has_failed(peer)) return {};
  return g_.failed(g_.root_of({Outcome::kStopped, peer}));
}

std::size_t Collective::clamp_width(std::size_t bytes, std::size_t element_bytes, std::size_t d) {
  const std::size_t width = std::max<std::size_t>(bytes / element_bytes / kAlign, 1) * kAlign;
  return std::min(width, std::max<std::size_t>(d, 1));
}

}  // namespace gossamer
