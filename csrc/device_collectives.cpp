#include "device_collectives.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace gossamer {
namespace {

constexpr std::size_t kLine = 64;   // bytes; rows start at multiples of it
constexpr std::size_t kAlign = 64;  // elements: whole lines in every dtype

std::size_t up_to_multiple(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

std::byte* pointer(std::uintptr_t address) { return reinterpret_cast<std::byte*>(address); }
std::uintptr_t address(const std::byte* memory) { return reinterpret_cast<std::uintptr_t>(memory); }

// Rows with nothing but padding between them, which are then copied at once.
bool is_dense(const Rows& rows, std::size_t row_bytes) {
  return rows.stride_bytes >= row_bytes && rows.stride_bytes < row_bytes + kLine;
}

std::size_t extent(const Rows& rows, std::size_t row_bytes) {
  return rows.count == 0 ? 0 : (rows.count - 1) * rows.stride_bytes + row_bytes;
}

std::size_t staged_bytes(const Rows& rows, std::size_t row_bytes) {
  return rows.count * up_to_multiple(row_bytes + kLine, kLine);
}

}  // namespace

template <typename F>
Status DeviceGroup::run(double timeout_s, DeviceStream stream, F&& operation) {
  group_->check_member();
  const std::lock_guard lock(group_->mutex_);
  if (!group_->broken_.ok()) return group_->broken_;
  try {
    // The staging area is still in use by what was queued on the stream before.
    if (fenced_ && stream != stream_) device_->wait(fence_.event, fence_.count, stream);
    stream_ = stream;
    timeout_s_ = timeout_s;
    const Status status = operation();
    if (status.ok()) fence_.count = device_->record(fence_.event, stream);
    fenced_ = true;
    return status;
  } catch (const std::runtime_error&) {
    // What a process exported cannot be opened any more when it has ended.
    const Status status = group_->root_of({Outcome::kStopped, group_->process()});
    group_->failed(status);
    if (status.outcome == Outcome::kLost) return status;
    throw;
  } catch (...) {  // peers would take what was sent for the messages of the next operation
    group_->failed({Outcome::kStopped, group_->process()});
    throw;
  }
}

void DeviceGroup::reserve(std::size_t bytes) {
  staging_used_ = 0;
  if (bytes <= staging_bytes_) return;
  // All that used the old one is queued before what will use the new one: run() sees to it.
  if (staging_ != nullptr) release(staging_);
  staging_bytes_ = 0;
  staging_ = take(bytes);
  staging_bytes_ = bytes;
}

std::uintptr_t DeviceGroup::staged(std::size_t bytes) {
  const std::size_t at = staging_used_;
  staging_used_ += up_to_multiple(bytes, kLine);
  return address(staging_ + at);
}

Rows DeviceGroup::stage(const Rows& rows, std::size_t row_bytes) {
  Rows copy{staged(staged_bytes(rows, row_bytes)), rows.count, rows.stride_bytes};
  if (rows.count == 1 || is_dense(rows, row_bytes)) {
    device_->copy(pointer(copy.address), pointer(rows.address), extent(rows, row_bytes), stream_);
    return copy;
  }
  copy.stride_bytes = up_to_multiple(row_bytes, kLine);
  for (std::size_t r = 0; r < rows.count; ++r) {
    device_->copy(pointer(copy.row(r)), pointer(rows.row(r)), row_bytes, stream_);
  }
  return copy;
}

Status DeviceGroup::average(const AveragePlan& plan, const AverageCall& call, DeviceStream stream) {
  check(*group_, plan, call);
  return run(call.timeout_s, stream, [&]() -> Status {
    Rows x = call.x;
    for (int k = 0; k < call.rounds; ++k) {
      const auto addend = k + 1 == call.rounds ? call.addend : std::nullopt;
      if (const Status s = average_once(plan, call, x, addend); !s.ok()) return s;
      x = call.out;
    }
    return {};
  });
}

Status DeviceGroup::average_once(const AveragePlan& plan, const AverageCall& call, Rows x,
                                 std::optional<Rows> addend) {
  const std::size_t row_bytes = call.d * size_bytes(call.dtype);
  if (row_bytes == 0 || x.count == 0) return {};
  const std::uint32_t kind = kAverage | kind_bits(call.dtype);
  // Rows that this process overwrites, or that peers cannot open, are copied first.
  const bool copies_x = overlap(x, row_bytes, call.out) ||
                        (!plan.targets.empty() && !owns(x.address, extent(x, row_bytes)));
  const bool same = addend && addend->address == call.out.address &&
                    (addend->stride_bytes == call.out.stride_bytes || addend->count == 1);
  const bool copies_addend = addend && !same && overlap(*addend, row_bytes, call.out);
  reserve((copies_x ? staged_bytes(x, row_bytes) : 0) +
          (copies_addend ? staged_bytes(*addend, row_bytes) : 0));
  if (copies_x) x = stage(x, row_bytes);
  if (copies_addend) addend = stage(*addend, row_bytes);

  if (const Status s = tell_all(plan.targets, kind, row_bytes, &x, 0); !s.ok()) return s;
  std::vector<std::uintptr_t> table;
  for (std::size_t r = 0; r < x.count; ++r) table.push_back(x.row(r));
  std::vector<std::uint32_t> sources;
  for (const AveragePlan::Source& source : plan.sources) {
    Heard heard;
    const Status s = hear(source.peer, kind, row_bytes, &heard);
    if (!s.ok()) return s;
    for (const std::uint32_t row : source.rows) table.push_back(heard.rows + row * heard.stride);
    sources.push_back(source.peer);
  }
  RowSums sums{
      .terms = {}, .first = {0}, .outs = {}, .copies = 1, .d = call.d, .dtype = call.dtype};
  for (std::size_t r = 0; r < x.count; ++r) {
    for (auto t = plan.indptr[r]; t < plan.indptr[r + 1]; ++t) {
      const auto term = static_cast<std::size_t>(t);
      sums.terms.push_back(
          {table.at(static_cast<std::size_t>(plan.columns[term])), plan.weights[term]});
    }
    if (addend) sums.terms.push_back({addend->row(r), call.a});
    sums.first.push_back(static_cast<std::uint32_t>(sums.terms.size()));
    sums.outs.push_back(call.out.row(r));
  }
  device_->sum(sums, stream_);
  if (const Status s = tell_done(sources); !s.ok()) {
    // The sum is queued: it may read what a source that gave up has changed.
    const bool torn =
        overlap(call.x, row_bytes, call.out) &&
        std::ranges::any_of(sources, [&](std::uint32_t p) { return group_->has_failed(p); });
    return torn ? Status{Outcome::kTorn, s.peer} : s;
  }
  return hear_done(plan.targets);
}

Status DeviceGroup::sum(const SumCall& call, DeviceStream stream) {
  check(*group_, call);
  return run(call.timeout_s, stream, [&] { return sum_slices(call); });
}

// Each process sums a slice of all rows and writes it into every process's result.
Status DeviceGroup::sum_slices(const SumCall& call) {
  const std::size_t element_bytes = size_bytes(call.dtype), row_bytes = call.d * element_bytes;
  if (row_bytes == 0) return {};
  const bool copies_x = !owns(call.x.address, extent(call.x, row_bytes)) ||
                        overlap(call.x, row_bytes, {call.out, 1, row_bytes});
  const bool copies_out = !owns(call.out, row_bytes);
  reserve((copies_x ? staged_bytes(call.x, row_bytes) : 0) +
          (copies_out ? up_to_multiple(row_bytes, kLine) : 0));
  const Rows x = copies_x ? stage(call.x, row_bytes) : call.x;
  const std::uintptr_t out = copies_out ? staged(row_bytes) : call.out;

  const std::uint32_t kind = kSum | kind_bits(call.dtype);
  const std::uint32_t me = group_->process(), processes = group_->processes();
  const std::vector<std::uint32_t> peers = others();
  if (const Status s = tell_all(peers, kind, row_bytes, &x, out); !s.ok()) return s;
  std::vector<Heard> heard(processes);
  heard[me] = {x.address, x.stride_bytes, out};
  for (const std::uint32_t peer : peers) {
    if (const Status s = hear(peer, kind, row_bytes, &heard[peer]); !s.ok()) return s;
  }
  const std::size_t lines = (call.d + kAlign - 1) / kAlign;
  const auto begin_of = [&](std::size_t p) {
    return std::min(call.d, lines * p / processes * kAlign);
  };
  const std::size_t begin = begin_of(me), shift = begin * element_bytes;
  RowSums sums{.terms = {},
               .first = {0},
               .outs = {},
               .copies = processes,
               .d = begin_of(me + 1) - begin,
               .dtype = call.dtype,
               .divisor = call.divisor};
  for (std::uint32_t p = 0; p < processes; ++p) {
    for (std::size_t r = 0; r < call.counts[p]; ++r) {
      sums.terms.push_back({heard[p].rows + r * heard[p].stride + shift, 1.0});
    }
    sums.outs.push_back(heard[p].out + shift);
  }
  sums.first.push_back(static_cast<std::uint32_t>(sums.terms.size()));
  if (sums.d > 0) device_->sum(sums, stream_);
  if (const Status s = tell_done(peers); !s.ok()) return s;
  if (const Status s = hear_done(peers); !s.ok()) return s;
  if (copies_out) device_->copy(pointer(call.out), pointer(out), row_bytes, stream_);
  return {};
}

// One message per peer: several buffers travel as one, each at a multiple of a line.
Status DeviceGroup::exchange(std::span<const DeviceBuffer> sends,
                             std::span<const DeviceBuffer> receives, double timeout_s,
                             DeviceStream stream) {
  for (const auto buffers : {sends, receives}) {
    for (const DeviceBuffer& b : buffers) group_->check_peer(b.peer);
  }
  const auto by_peer = [](std::span<const DeviceBuffer> buffers) {
    std::map<std::uint32_t, std::vector<DeviceBuffer>> sorted;
    for (const DeviceBuffer& b : buffers) {
      if (b.bytes > 0) sorted[b.peer].push_back(b);
    }
    return sorted;
  };
  const auto total_of = [](const std::vector<DeviceBuffer>& buffers, std::size_t unit) {
    return std::accumulate(buffers.begin(), buffers.end(), std::size_t{0},
                           [&](std::size_t sum, const DeviceBuffer& b) {
                             return sum + up_to_multiple(b.bytes, unit);
                           });
  };
  return run(timeout_s, stream, [&]() -> Status {
    const auto outgoing = by_peer(sends), incoming = by_peer(receives);
    std::size_t needed = 0;
    for (const auto& [peer, buffers] : outgoing) needed += total_of(buffers, kLine);
    reserve(needed);
    std::map<std::pair<std::byte*, std::size_t>, std::uintptr_t> once;  // for many peers: one copy
    std::vector<std::pair<std::uint32_t, Rows>> rows;
    for (const auto& [peer, buffers] : outgoing) {
      const DeviceBuffer& first = buffers[0];
      const std::size_t total = total_of(buffers, 1);
      if (buffers.size() == 1) {
        std::uintptr_t& at = once[{first.data, first.bytes}];
        if (at == 0 && owns(address(first.data), first.bytes)) at = address(first.data);
        if (at == 0) {
          at = staged(first.bytes);
          device_->copy(pointer(at), first.data, first.bytes, stream_);
        }
        rows.push_back({peer, {at, 1, total}});
        continue;
      }
      std::uintptr_t at = staged(total_of(buffers, kLine));
      rows.push_back({peer, {at, 1, total}});
      for (const DeviceBuffer& b : buffers) {
        device_->copy(pointer(at), b.data, b.bytes, stream_);
        at += up_to_multiple(b.bytes, kLine);
      }
    }
    std::vector<std::uint32_t> targets, sources;
    if (!rows.empty()) {
      Event& event = free_event();
      event.count = device_->record(event.event, stream_);
      for (const auto& [peer, block] : rows) {
        const Status s = tell(event, peer, kExchange, block.stride_bytes, &block, 0);
        if (!s.ok()) return s;
        targets.push_back(peer);
      }
    }
    for (const auto& [peer, buffers] : incoming) {
      Heard heard;
      if (const Status s = hear(peer, kExchange, total_of(buffers, 1), &heard); !s.ok()) return s;
      std::uintptr_t at = heard.rows;
      for (const DeviceBuffer& b : buffers) {
        device_->copy(b.data, pointer(at), b.bytes, stream_);
        at += up_to_multiple(b.bytes, kLine);
      }
      sources.push_back(peer);
    }
    if (const Status s = tell_done(sources); !s.ok()) return s;
    return hear_done(targets);
  });
}

}  // namespace gossamer
