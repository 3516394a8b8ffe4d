#include "collectives.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "row_kernels.h"

namespace gossamer {
namespace {

constexpr std::size_t kDirectBytes = 64 << 10;   // rows from here on are read where they lie
constexpr std::size_t kPieceBytes = 512 << 10;   // others in pieces that stay in cache
constexpr std::size_t kWholeBytes = 32 << 10;    // all-reduce: all rows to everyone below it
constexpr std::size_t kScratchBytes = 64 << 10;  // of a slice, in cache until all have it
constexpr std::size_t kAlign = 64;               // elements: whole cache lines in every dtype
constexpr std::size_t kStreamBytes = 1 << 20;    // outputs from here on go past the caches
constexpr std::uint32_t kAhead = 2;              // pieces sent before they are needed

// In `out` of a message: these are all rows of the block, where they lie; not staged ones.
constexpr std::uint64_t kWhere = 1;

enum Kind : std::uint32_t { kAverage = 1, kSum = 2, kResult = 3 };

std::size_t clamp_width(std::size_t bytes, std::size_t element_bytes, std::size_t d) {
  const std::size_t width = std::max<std::size_t>(bytes / element_bytes / kAlign, 1) * kAlign;
  return std::min(width, std::max<std::size_t>(d, 1));
}

bool overlap(const Rows& x, std::size_t row_bytes, const Rows& y) {
  if (x.count == 0 || y.count == 0) return false;
  return x.address < y.row(y.count - 1) + row_bytes && y.address < x.row(x.count - 1) + row_bytes;
}

}  // namespace

// Has the run of the group's channels.
class Collective {
 public:
  Collective(Group& group, double timeout_s)
      : g_(group), timeout_s_(timeout_s), lock_(group.mutex_) {}

  Status average(const AveragePlan& plan, const AverageCall& call);
  Status sum(const SumCall& call);

 private:
  // Until what exchanges have queued is on its way: messages of one pair keep their order.
  Status settle();

  Status average_once(const AveragePlan& plan, const AverageCall& call, const Rows& x,
                      const std::optional<Rows>& addend, bool direct);
  Status send_piece(const AveragePlan& plan, const AverageCall& call, const Rows& x,
                    std::size_t begin, std::size_t len);
  void add_up(const AveragePlan& plan, const AverageCall& call, const Rows& x,
              const std::optional<Rows>& addend, std::size_t begin, std::size_t len);

  Status sum_whole(const SumCall& call);
  Status sum_direct(const SumCall& call, bool& agreed);
  Status sum_by_pieces(const SumCall& call);
  void add_rows(const SumCall& call, std::size_t begin, std::size_t own_begin, std::size_t len,
                std::uintptr_t to, bool stream);

  // A message to `peer`, filled in and sent.
  Status send(std::uint32_t peer, Kind kind, std::uint64_t total, std::uint64_t bytes,
              const std::byte* data, std::uint64_t stride, std::uint64_t out);
  Status stage(std::size_t bytes, std::byte** at);
  Status receive(std::uint32_t peer, Kind kind, std::uint64_t total);
  [[nodiscard]] const std::byte* received(std::uint32_t peer) const {
    const Message& m = g_.incoming(peer);
    return m.offset == Message::kNowhere ? m.payload : g_.at(peer, m.offset);
  }
  // A peer whose call failed (it lost patience with this process, say) may write its rows again
  // although they were not read: what was just read from them does not count.
  Status still_whole(std::uint32_t peer) {
    std::atomic_thread_fence(std::memory_order_acquire);
    if (!g_.has_failed(peer)) return {};
    return g_.failed(g_.root_of({Outcome::kStopped, peer}));
  }
  Status until_read(std::uint32_t peer) {
    const std::uint32_t count = g_.sent_[peer];
    return g_.wait(peer, timeout_s_,
                   [&, count] { return g_.channel(g_.process_, peer).done(count); });
  }
  // Peers, starting after this process so that not all call on the first one.
  template <typename F>
  Status each_peer(F&& f) {
    for (std::uint32_t k = 1; k < g_.processes_; ++k) {
      if (const Status s = f((g_.process_ + k) % g_.processes_); !s.ok()) return s;
    }
    return {};
  }

  Group& g_;
  double timeout_s_;
  std::lock_guard<std::mutex> lock_;
  std::vector<Term> terms_;
};

Status average(Group& group, const AveragePlan& plan, const AverageCall& call) {
  return Collective(group, call.timeout_s).average(plan, call);
}

Status sum(Group& group, const SumCall& call) {
  return Collective(group, call.timeout_s).sum(call);
}

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
                        const std::byte* data, std::uint64_t stride, std::uint64_t out) {
  const std::uint32_t count = g_.sent_[peer];
  const Channel& channel = g_.channel(g_.process_, peer);
  if (const Status s = g_.wait(peer, timeout_s_, [&, count] { return channel.has_room(count); });
      !s.ok()) {
    return s;
  }
  Message& m = g_.next_slot(peer);
  m.total = total;
  m.bytes = bytes;
  m.stride = stride;
  m.out = out;
  m.kind = kind;
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
    const std::uint32_t reader = g_.oldest_reader();
    const std::uint32_t before = g_.channel(g_.process_, reader).consumed.load();
    const Status s = g_.wait(reader, timeout_s_, [&] {
      return reader == g_.process_ || g_.channel(g_.process_, reader).consumed.load() != before;
    });
    if (!s.ok()) return s;
  }
  return {};
}

Status Collective::receive(std::uint32_t peer, Kind kind, std::uint64_t total) {
  const Status s = g_.wait(peer, timeout_s_, [&] { return g_.has_message(peer); });
  if (!s.ok()) return s;
  const Message& m = g_.incoming(peer);
  if (m.kind != kind || m.total != total) return g_.failed({Outcome::kMismatch, peer});
  return {};
}

// --- averages over the graph -----------------------------------------------------------------

Status Collective::average(const AveragePlan& plan, const AverageCall& call) {
  if (const Status s = settle(); !s.ok()) return s;
  Rows x = call.x;
  const std::size_t row_bytes = call.d * size_bytes(call.dtype);
  for (int k = 0; k < call.rounds; ++k) {
    const auto addend = k + 1 == call.rounds ? call.addend : std::nullopt;
    const bool direct = row_bytes >= kDirectBytes && !overlap(x, row_bytes, call.out) &&
                        g_.owns(x.address, (x.count - 1) * x.stride_bytes + row_bytes);
    if (const Status s = average_once(plan, call, x, addend, direct); !s.ok()) return s;
    x = call.out;
  }
  return {};
}

// Rows of the arena are sent once and read where they lie; others are staged piece by piece. Each
// process does as its own rows allow, and takes what comes.
Status Collective::average_once(const AveragePlan& plan, const AverageCall& call, const Rows& x,
                                const std::optional<Rows>& addend, bool direct) {
  const std::size_t element_bytes = size_bytes(call.dtype), row_bytes = call.d * element_bytes;
  const std::size_t width =
      clamp_width(kPieceBytes / std::max<std::size_t>(plan.most_staged, 1), element_bytes, call.d);
  const std::size_t pieces = call.d == 0 ? 0 : (call.d + width - 1) / width;
  const auto piece_of = [&](std::size_t i) { return std::min(width, call.d - i * width); };
  if (direct) {
    const auto* rows = reinterpret_cast<const std::byte*>(x.address);
    for (const std::uint32_t peer : plan.targets) {
      const Status s = send(peer, kAverage, row_bytes, row_bytes, rows, x.stride_bytes, kWhere);
      if (!s.ok()) return s;
    }
  }
  std::size_t sent = direct ? pieces : 0;
  for (std::size_t i = 0; i < pieces; ++i) {
    for (; sent < std::min(pieces, i + 1 + kAhead); ++sent) {
      const Status s = send_piece(plan, call, x, sent * width, piece_of(sent));
      if (!s.ok()) return s;
    }
    for (const auto& source : plan.sources) {
      if (const Status s = receive(source.peer, kAverage, row_bytes); !s.ok()) return s;
    }
    add_up(plan, call, x, addend, i * width, piece_of(i));
    for (const auto& source : plan.sources) {
      if (const Status s = still_whole(source.peer); !s.ok()) return s;
      if (g_.incoming(source.peer).out != kWhere || i + 1 == pieces) g_.consume(source.peer);
    }
  }
  if (!direct) return {};
  for (const std::uint32_t peer : plan.targets) {  // x may be written again when all have read it
    if (const Status s = until_read(peer); !s.ok()) return s;
  }
  return {};
}

Status Collective::send_piece(const AveragePlan& plan, const AverageCall& call, const Rows& x,
                              std::size_t begin, std::size_t len) {
  if (plan.targets.empty()) return {};
  const std::size_t element_bytes = size_bytes(call.dtype), row_bytes = call.d * element_bytes;
  const std::size_t bytes = len * element_bytes;
  const auto* first = reinterpret_cast<const std::byte*>(x.row(plan.staged_rows[0]));
  if (plan.staged_rows.size() == 1 && bytes <= Message::kInlineBytes) {
    for (const std::uint32_t peer : plan.targets) {
      const auto* data = first + begin * element_bytes;
      if (const Status s = send(peer, kAverage, row_bytes, bytes, data, bytes, 0); !s.ok())
        return s;
    }
    return {};
  }
  std::byte* at = nullptr;
  if (const Status s =
          stage(std::max(plan.staged_rows.size() * bytes, Message::kInlineBytes + 1), &at);
      !s.ok()) {
    return s;
  }
  for (std::size_t k = 0; k < plan.staged_rows.size(); ++k) {
    const auto* row = reinterpret_cast<const std::byte*>(x.row(plan.staged_rows[k]));
    std::memcpy(at + k * bytes, row + begin * element_bytes, bytes);
  }
  const std::size_t whole = std::max(plan.staged_rows.size() * bytes, Message::kInlineBytes + 1);
  for (const std::uint32_t peer : plan.targets) {
    if (const Status s = send(peer, kAverage, row_bytes, whole, at, bytes, 0); !s.ok()) return s;
    g_.stage_until(peer);
  }
  return {};
}

void Collective::add_up(const AveragePlan& plan, const AverageCall& call, const Rows& x,
                        const std::optional<Rows>& addend, std::size_t begin, std::size_t len) {
  const std::size_t shift = begin * size_bytes(call.dtype);
  const auto shifted = [&](Rows rows) {
    rows.address += shift;
    return rows;
  };
  const auto row_of = [&](const AveragePlan::Source& source, std::size_t k) {
    const Message& m = g_.incoming(source.peer);
    const auto base = reinterpret_cast<std::uintptr_t>(received(source.peer));
    return m.out == kWhere ? base + source.rows[k] * m.stride + shift
                           : base + source.staged[k] * m.stride;
  };
  if (call.out.count == 1) {  // one rank per process: no row is read twice
    terms_.clear();
    for (std::size_t t = 0; t < plan.columns.size(); ++t) {
      terms_.push_back({0, plan.weights[t]});
    }
    std::size_t column = x.count;
    const auto set = [&](std::size_t c, std::uintptr_t row) {
      for (std::size_t t = 0; t < plan.columns.size(); ++t) {
        if (static_cast<std::size_t>(plan.columns[t]) == c) terms_[t].row = row;
      }
    };
    set(0, x.address + shift);
    for (const auto& source : plan.sources) {
      for (std::size_t k = 0; k < source.rows.size(); ++k) set(column++, row_of(source, k));
    }
    if (addend) terms_.push_back({addend->address + shift, call.a});
    const bool stream =
        call.d * size_bytes(call.dtype) >= kStreamBytes && x.address != call.out.address;
    kernels().sum_one(terms_, 0, len, call.out.address + shift, call.dtype, stream);
    return;
  }
  WeightedSum job{
      .blocks = {shifted(x)},
      .indptr = plan.indptr,
      .columns = plan.columns,
      .weights = plan.weights,
      .out = shifted(call.out),
      .addend = std::nullopt,
      .a = call.a,
      .d = len,
      .dtype = call.dtype,
      .wide = false,
  };
  if (addend) job.addend = shifted(*addend);
  for (const auto& source : plan.sources) {
    for (std::size_t k = 0; k < source.rows.size(); ++k) {
      job.blocks.push_back({row_of(source, k), 1, 0});
    }
  }
  weighted_sum(job, call.num_threads);
}

// --- sums over all ranks ---------------------------------------------------------------------

Status Collective::sum(const SumCall& call) {
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

// terms_ = the rows of all ranks; those of peers from the messages they sent last.
void Collective::add_rows(const SumCall& call, std::size_t begin, std::size_t own_begin,
                          std::size_t len, std::uintptr_t to, bool stream) {
  const std::size_t element_bytes = size_bytes(call.dtype);
  terms_.clear();
  for (std::uint32_t p = 0; p < g_.processes_; ++p) {
    if (p == g_.process_) {
      for (std::size_t r = 0; r < call.x.count; ++r) {
        terms_.push_back({call.x.row(r) + own_begin * element_bytes, 1.0});
      }
      continue;
    }
    const auto base = reinterpret_cast<std::uintptr_t>(received(p)) + begin * element_bytes;
    for (std::size_t r = 0; r < call.counts[p]; ++r) {
      terms_.push_back({base + r * g_.incoming(p).stride, 1.0});
    }
  }
  kernels().sum_one(terms_, 0, len, to, call.dtype, stream);
  if (call.divisor != 1) kernels().divide(to, len, call.divisor, call.dtype);
}

// Everyone gets all rows and adds them all: one message each way.
Status Collective::sum_whole(const SumCall& call) {
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
    const Status s = send(p, kSum, row_bytes, whole, fits ? data : at, row_bytes, 0);
    if (s.ok() && !fits) g_.stage_until(p);
    return s;
  });
  if (!sent.ok()) return sent;
  const Status s = each_peer([&](std::uint32_t p) { return receive(p, kSum, row_bytes); });
  if (!s.ok()) return s;
  add_rows(call, 0, 0, call.d, call.out, false);
  return each_peer([&](std::uint32_t p) {
    g_.consume(p);
    return Status{};
  });
}

// Where all rows and results lie in shared memory: each process adds up a slice and writes it to
// everyone's result. Each row is read once and each result written once, which is the least.
Status Collective::sum_direct(const SumCall& call, bool& agreed) {
  const std::size_t element_bytes = size_bytes(call.dtype), row_bytes = call.d * element_bytes;
  const Rows out{call.out, 1, row_bytes};
  const std::size_t x_bytes = (call.x.count - 1) * call.x.stride_bytes + row_bytes;
  const bool able = g_.owns(call.x.address, x_bytes) && g_.owns(call.out, row_bytes) &&
                    !overlap(call.x, row_bytes, out);
  const auto* x = reinterpret_cast<const std::byte*>(call.x.address);
  const std::uint64_t to =
      able ? g_.offset_of(reinterpret_cast<const std::byte*>(call.out)) : Message::kNowhere;
  const Status sent = each_peer([&](std::uint32_t p) {
    return send(p, kSum, row_bytes, row_bytes, able ? x : nullptr, call.x.stride_bytes, to);
  });
  if (!sent.ok()) return sent;
  agreed = able;
  const Status s = each_peer([&](std::uint32_t p) {
    const Status got = receive(p, kSum, row_bytes);
    if (got.ok()) agreed &= g_.incoming(p).out != Message::kNowhere;
    return got;
  });
  if (!s.ok()) return s;
  if (agreed) {
    const std::size_t lines = (call.d + kAlign - 1) / kAlign;
    const auto begin_of = [&](std::size_t p) {
      return std::min(call.d, lines * p / g_.processes_ * kAlign);
    };
    const std::size_t width = clamp_width(kScratchBytes, element_bytes, call.d);
    std::vector<std::byte> scratch(width * element_bytes + 64);
    auto at = reinterpret_cast<std::uintptr_t>(scratch.data());
    at = (at + 63) / 64 * 64;
    const std::size_t end = begin_of(g_.process_ + 1);
    for (std::size_t b = begin_of(g_.process_); b < end; b += width) {
      const std::size_t len = std::min(width, end - b);
      add_rows(call, b, b, len, at, false);
      for (std::uint32_t p = 0; p < g_.processes_; ++p) {
        std::byte* result = p == g_.process_ ? reinterpret_cast<std::byte*>(call.out)
                                             : g_.at(p, g_.incoming(p).out);
        kernels().copy(reinterpret_cast<const std::byte*>(at), result + b * element_bytes,
                       len * element_bytes);
      }
    }
  }
  const Status read = each_peer([&](std::uint32_t p) {
    const Status whole = still_whole(p);
    if (whole.ok()) g_.consume(p);
    return whole;
  });
  if (!read.ok()) return read;
  // Read by all: x is free, and what they had to write into the result is there.
  return each_peer([&](std::uint32_t p) { return until_read(p); });
}

// In pieces that stay in cache: all rows of a piece are staged, each process adds up a part of it
// and stages the result, and everyone collects the parts.
Status Collective::sum_by_pieces(const SumCall& call) {
  const std::size_t element_bytes = size_bytes(call.dtype), row_bytes = call.d * element_bytes;
  const std::size_t most = *std::ranges::max_element(call.counts);
  const std::size_t width = clamp_width(2 * kPieceBytes / most, element_bytes, call.d);
  for (std::size_t begin = 0; begin < call.d; begin += width) {
    const std::size_t len = std::min(width, call.d - begin);
    const std::size_t lines = (len + kAlign - 1) / kAlign;
    const auto part_of = [&](std::size_t p) {
      return std::min(len, lines * p / g_.processes_ * kAlign);
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
      const Status sent = send(p, kSum, row_bytes, staged, at, bytes, 0);
      if (sent.ok()) g_.stage_until(p);
      return sent;
    });
    if (!s.ok()) return s;
    s = each_peer([&](std::uint32_t p) { return receive(p, kSum, row_bytes); });
    if (!s.ok()) return s;
    const std::size_t first = part_of(g_.process_), part = part_of(g_.process_ + 1) - first;
    const std::size_t part_bytes = std::max(part * element_bytes, Message::kInlineBytes + 1);
    if (s = stage(part_bytes, &at); !s.ok()) return s;
    add_rows(call, first, begin + first, part, reinterpret_cast<std::uintptr_t>(at), false);
    each_peer([&](std::uint32_t p) {
      g_.consume(p);
      return Status{};
    });
    const auto collect = [&](std::size_t p, const std::byte* from) {
      const std::size_t b = part_of(p);
      auto* to = reinterpret_cast<std::byte*>(call.out) + (begin + b) * element_bytes;
      std::memcpy(to, from, (part_of(p + 1) - b) * element_bytes);
    };
    s = each_peer([&](std::uint32_t p) {
      const Status sent = send(p, kResult, row_bytes, part_bytes, at, part_bytes, 0);
      if (sent.ok()) g_.stage_until(p);
      return sent;
    });
    if (!s.ok()) return s;
    collect(g_.process_, at);
    s = each_peer([&](std::uint32_t p) {
      const Status got = receive(p, kResult, row_bytes);
      if (!got.ok()) return got;
      collect(p, received(p));
      g_.consume(p);
      return got;
    });
    if (!s.ok()) return s;
  }
  return {};
}

}  // namespace gossamer
