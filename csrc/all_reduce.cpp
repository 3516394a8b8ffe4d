#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "collective.h"
#include "collectives.h"
#include "row_kernels.h"

namespace gossamer {
namespace {

constexpr std::size_t kPieceBytes = 1 << 20;     // staged rows go in pieces that stay in cache
constexpr std::size_t kWholeBytes = 32 << 10;    // all rows to everyone below it
constexpr std::size_t kScratchBytes = 64 << 10;  // of a slice, in cache until all have it

class AllReduce : Collective {
 public:
  using Collective::Collective;
  Status run(const SumCall& call) {
    return run_whole([&] { return sum(call); });
  }

 private:
  Status sum(const SumCall& call);
  Status sum_whole(const SumCall& call);
  Status sum_direct(const SumCall& call, bool& agreed);
  Status sum_by_pieces(const SumCall& call);
  // to[0..len) = the sum over ranks; columns from `begin` of what peers sent last, from `own_begin`
  // of this process's rows.
  void add_rows(const SumCall& call, std::size_t begin, std::size_t own_begin, std::size_t len,
                std::uintptr_t to);
};

Status AllReduce::sum(const SumCall& call) {
  if (const Status s = settle(); !s.ok()) return s;
  const std::size_t n = std::accumulate(call.counts.begin(), call.counts.end(), std::size_t{0});
  const std::size_t row_bytes = call.d * size_bytes(call.dtype);
  if (call.d == 0) return {};
  if (n * row_bytes <= kWholeBytes) return sum_whole(call);
  bool agreed = false;
  if (row_bytes >= kDirectBytes) {
    if (const Status s = sum_direct(call, agreed); !s.ok() || agreed) return s;
  }
  return sum_by_pieces(call);
}

void AllReduce::add_rows(const SumCall& call, std::size_t begin, std::size_t own_begin,
                         std::size_t len, std::uintptr_t to) {
  const std::size_t element_bytes = size_bytes(call.dtype);
  terms_.clear();
  for (std::uint32_t p = 0; p < g_.processes(); ++p) {
    if (p == g_.process()) {
      for (std::size_t r = 0; r < call.x.count; ++r) {
        terms_.push_back({call.x.row(r) + own_begin * element_bytes, 1.0});
      }
      continue;
    }
    const auto base = reinterpret_cast<std::uintptr_t>(received(p)) + begin * element_bytes;
    for (std::size_t r = 0; r < call.counts[p]; ++r) {
      terms_.push_back({base + r * message(p).stride, 1.0});
    }
  }
  kernels().sum_one(terms_, 0, len, to, call.dtype, false);
  if (call.divisor != 1) kernels().divide(to, len, call.divisor, call.dtype);
}

// Everyone gets all rows and adds them all: one message each way.
Status AllReduce::sum_whole(const SumCall& call) {
  const std::size_t row_bytes = call.d * size_bytes(call.dtype);
  const std::size_t bytes = call.x.count * row_bytes;
  const auto* data = reinterpret_cast<const std::byte*>(call.x.address);
  const bool fits = call.x.count == 1 && bytes <= Message::kInlineBytes;
  std::byte* at = nullptr;
  if (!fits) {
    if (const Status s = stage(std::max(bytes, Message::kInlineBytes + 1), &at); !s.ok()) return s;
    for (std::size_t r = 0; r < call.x.count; ++r) {
      std::memcpy(at + r * row_bytes, reinterpret_cast<const std::byte*>(call.x.row(r)), row_bytes);
    }
  }
  const Status sent = each_peer([&](std::uint32_t p) {
    const std::size_t whole = fits ? bytes : std::max(bytes, Message::kInlineBytes + 1);
    const Status s = send(p, Kind::kSum, row_bytes, whole, fits ? data : at, row_bytes, 0);
    if (s.ok() && !fits) stage_until(p);
    return s;
  });
  if (!sent.ok()) return sent;
  const Status s = each_peer([&](std::uint32_t p) { return receive(p, Kind::kSum, row_bytes); });
  if (!s.ok()) return s;
  add_rows(call, 0, 0, call.d, call.out);
  return consume_all();
}

// Where all rows and results lie in shared memory: each process adds up a slice and writes it to
// everyone's result. Each row is read once and each result written once, which is the least.
Status AllReduce::sum_direct(const SumCall& call, bool& agreed) {
  const std::size_t element_bytes = size_bytes(call.dtype), row_bytes = call.d * element_bytes;
  const Rows out{call.out, 1, row_bytes};
  const std::size_t x_bytes = (call.x.count - 1) * call.x.stride_bytes + row_bytes;
  const bool able = g_.owns(call.x.address, x_bytes) && g_.owns(call.out, row_bytes) &&
                    !overlap(call.x, row_bytes, out);
  const auto* x = reinterpret_cast<const std::byte*>(call.x.address);
  const std::uint64_t to =
      able ? offset_of(reinterpret_cast<const std::byte*>(call.out)) : Message::kNowhere;
  const Status sent = each_peer([&](std::uint32_t p) {
    const Status s =
        send(p, Kind::kSum, row_bytes, row_bytes, able ? x : nullptr, call.x.stride_bytes, to);
    if (s.ok() && able) lend(p);
    return s;
  });
  if (!sent.ok()) return sent;
  agreed = able;
  const Status s = each_peer([&](std::uint32_t p) {
    const Status got = receive(p, Kind::kSum, row_bytes);
    if (got.ok()) agreed &= message(p).mark != Message::kNowhere;
    return got;
  });
  if (!s.ok()) return s;
  if (agreed) {
    const std::size_t lines = (call.d + kAlign - 1) / kAlign;
    const auto begin_of = [&](std::size_t p) {
      return std::min(call.d, lines * p / g_.processes() * kAlign);
    };
    const std::size_t width = clamp_width(kScratchBytes, element_bytes, call.d);
    std::vector<std::byte> scratch(width * element_bytes + 64);
    auto at = reinterpret_cast<std::uintptr_t>(scratch.data());
    at = (at + 63) / 64 * 64;
    const std::size_t end = begin_of(g_.process() + 1);
    for (std::size_t b = begin_of(g_.process()); b < end; b += width) {
      const std::size_t len = std::min(width, end - b);
      add_rows(call, b, b, len, at);
      for (std::uint32_t p = 0; p < g_.processes(); ++p) {
        // One that gave up uses its rows again.
        if (const Status s = p == g_.process() ? Status{} : still_whole(p); !s.ok()) return s;
        std::byte* result = p == g_.process() ? reinterpret_cast<std::byte*>(call.out)
                                              : memory_of(p, message(p).mark);
        kernels().copy(reinterpret_cast<const std::byte*>(at), result + b * element_bytes,
                       len * element_bytes);
      }
    }
  }
  const Status read = each_peer([&](std::uint32_t p) {
    const Status whole = still_whole(p);
    if (whole.ok()) consume(p);
    return whole;
  });
  if (!read.ok()) return read;
  // Read by all: x is free, and what they had to write into the result is there.
  return each_peer([&](std::uint32_t p) { return until_read(p); });
}

// In pieces that stay in cache: all rows of a piece are staged, each process adds up a part of it
// and stages the result, and everyone collects the parts.
Status AllReduce::sum_by_pieces(const SumCall& call) {
  const std::size_t element_bytes = size_bytes(call.dtype), row_bytes = call.d * element_bytes;
  const std::size_t most = *std::ranges::max_element(call.counts);
  const std::size_t width = clamp_width(kPieceBytes / most, element_bytes, call.d);
  for (std::size_t begin = 0; begin < call.d; begin += width) {
    const std::size_t len = std::min(width, call.d - begin);
    const std::size_t lines = (len + kAlign - 1) / kAlign;
    const auto part_of = [&](std::size_t p) {
      return std::min(len, lines * p / g_.processes() * kAlign);
    };
    const std::size_t bytes = len * element_bytes;
    std::byte* at = nullptr;
    const std::size_t staged = std::max(call.x.count * bytes, Message::kInlineBytes + 1);
    if (const Status s = stage(staged, &at); !s.ok()) return s;
    for (std::size_t r = 0; r < call.x.count; ++r) {
      const auto* row = reinterpret_cast<const std::byte*>(call.x.row(r));
      std::memcpy(at + r * bytes, row + begin * element_bytes, bytes);
    }
    Status s = each_peer([&](std::uint32_t p) {
      const Status sent = send(p, Kind::kSum, row_bytes, staged, at, bytes, 0);
      if (sent.ok()) stage_until(p);
      return sent;
    });
    if (!s.ok()) return s;
    s = each_peer([&](std::uint32_t p) { return receive(p, Kind::kSum, row_bytes); });
    if (!s.ok()) return s;
    const std::size_t first = part_of(g_.process()), part = part_of(g_.process() + 1) - first;
    const std::size_t part_bytes = std::max(part * element_bytes, Message::kInlineBytes + 1);
    if (s = stage(part_bytes, &at); !s.ok()) return s;
    add_rows(call, first, begin + first, part, reinterpret_cast<std::uintptr_t>(at));
    consume_all();
    const auto collect = [&](std::size_t p, const std::byte* from) {
      const std::size_t b = part_of(p);
      auto* to = reinterpret_cast<std::byte*>(call.out) + (begin + b) * element_bytes;
      std::memcpy(to, from, (part_of(p + 1) - b) * element_bytes);
    };
    s = each_peer([&](std::uint32_t p) {
      const Status sent = send(p, Kind::kResult, row_bytes, part_bytes, at, part_bytes, 0);
      if (sent.ok()) stage_until(p);
      return sent;
    });
    if (!s.ok()) return s;
    collect(g_.process(), at);
    s = each_peer([&](std::uint32_t p) {
      const Status got = receive(p, Kind::kResult, row_bytes);
      if (!got.ok()) return got;
      collect(p, received(p));
      consume(p);
      return got;
    });
    if (!s.ok()) return s;
  }
  return {};
}

}  // namespace

Status sum(Group& group, const SumCall& call) {
  check(group, call);
  const std::size_t row_bytes = call.d * size_bytes(call.dtype);
  if (overlap_of(call.x, {call.out, 1, row_bytes}, row_bytes) == Overlap::kPart) {
    throw std::invalid_argument("sum: out overlaps a row of x in part");
  }
  return AllReduce(group, call.timeout_s, kind_bits(call.dtype)).run(call);
}

}  // namespace gossamer
