#include <algorithm>
#include <cstring>

#include "collective.h"
#include "collectives.h"

namespace gossamer {
namespace {

class Gather : Collective {
 public:
  using Collective::Collective;
  template <typename Call>
  Status run(const Call& call) {
    return run_whole([&] { return copies(call); });
  }

 private:
  Status copies(const GatherCall& call);
  Status copies(const BroadcastCall& call);
  // Sends the rows to all: in the message, from where they lie (then `direct`), or staged.
  Status send_rows(const Rows& x, std::size_t row_bytes, bool& direct);
  // The rows of the next message of `peer`, one after another, at `out`.
  Status take(std::uint32_t peer, std::size_t rows, std::size_t row_bytes, std::byte* out);
  Status until_all_read(bool direct) {
    return direct ? each_peer([&](std::uint32_t p) { return until_read(p); }) : Status{};
  }
};

void copy_rows(const Rows& x, std::size_t row_bytes, std::byte* to) {
  for (std::size_t r = 0; r < x.count; ++r) {
    const auto* row = reinterpret_cast<const std::byte*>(x.row(r));
    if (row != to + r * row_bytes) std::memcpy(to + r * row_bytes, row, row_bytes);
  }
}

Status Gather::send_rows(const Rows& x, std::size_t row_bytes, bool& direct) {
  const std::size_t bytes = x.count * row_bytes;
  const auto* data = reinterpret_cast<const std::byte*>(x.address);
  std::size_t stride = row_bytes;
  const bool fits = x.count == 1 && bytes <= Message::kInlineBytes;
  direct = !fits && bytes >= kDirectBytes &&
           g_.owns(x.address, (x.count - 1) * x.stride_bytes + row_bytes);
  if (direct) {
    stride = x.stride_bytes;
  } else if (!fits) {
    std::byte* at = nullptr;
    if (const Status s = stage(std::max(bytes, Message::kInlineBytes + 1), &at); !s.ok()) return s;
    copy_rows(x, row_bytes, at);
    data = at;
  }
  return each_peer([&](std::uint32_t p) {
    const std::size_t sent = fits ? bytes : std::max(bytes, Message::kInlineBytes + 1);
    const Status s = send(p, Kind::kGather, row_bytes, sent, data, stride, 0);
    if (s.ok() && direct) lend(p);
    if (s.ok() && !fits && !direct) stage_until(p);
    return s;
  });
}

Status Gather::take(std::uint32_t peer, std::size_t rows, std::size_t row_bytes, std::byte* out) {
  if (const Status s = receive(peer, Kind::kGather, row_bytes); !s.ok()) return s;
  const auto from = reinterpret_cast<std::uintptr_t>(received(peer));
  copy_rows({from, rows, message(peer).stride}, row_bytes, out);
  if (const Status s = still_whole(peer); !s.ok()) return s;
  consume(peer);
  return {};
}

Status Gather::copies(const GatherCall& call) {
  if (const Status s = settle(); !s.ok()) return s;
  if (call.row_bytes == 0) return {};
  auto* out = reinterpret_cast<std::byte*>(call.out);
  std::vector<std::size_t> first(call.counts.size() + 1);
  for (std::size_t p = 0; p < call.counts.size(); ++p) first[p + 1] = first[p] + call.counts[p];
  bool direct = false;
  if (const Status s = send_rows(call.x, call.row_bytes, direct); !s.ok()) return s;
  copy_rows(call.x, call.row_bytes, out + first[g_.process()] * call.row_bytes);
  const Status taken = each_peer([&](std::uint32_t p) {
    return take(p, call.counts[p], call.row_bytes, out + first[p] * call.row_bytes);
  });
  return taken.ok() ? until_all_read(direct) : taken;
}

Status Gather::copies(const BroadcastCall& call) {
  if (const Status s = settle(); !s.ok()) return s;
  if (call.row_bytes == 0) return {};
  auto* out = reinterpret_cast<std::byte*>(call.out);
  if (g_.process() != call.root) return take(call.root, 1, call.row_bytes, out);
  const Rows x{call.x, 1, call.row_bytes};
  bool direct = false;
  if (const Status s = send_rows(x, call.row_bytes, direct); !s.ok()) return s;
  copy_rows(x, call.row_bytes, out);
  return until_all_read(direct);
}

}  // namespace

Status gather(Group& group, const GatherCall& call) {
  check(group, call);
  return Gather(group, call.timeout_s).run(call);
}

Status broadcast(Group& group, const BroadcastCall& call) {
  check(group, call);
  return Gather(group, call.timeout_s).run(call);
}

}  // namespace gossamer
