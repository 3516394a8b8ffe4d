#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "collective.h"
#include "collectives.h"
#include "row_kernels.h"

namespace gossamer {
namespace {

constexpr std::size_t kStreamBytes = 1 << 20;  // rows from here on are written past the caches
constexpr std::size_t kAveragePieceBytes = 128 << 10;
constexpr std::size_t kTurnBytes = 256 << 10;  // of a row, then processes on one core take turns
constexpr std::size_t kSlots = 16;  // pieces of a result that may wait to be written in place

// What `mark` of a message says about the rows behind it.
enum Mark : std::uint64_t {
  kStaged = 0,   // those of `staged_rows`, copied
  kInPlace = 1,  // all of the block, where they lie
  kToReport = 2  // likewise, and the sender waits for each piece that was read, to overwrite it
};

struct Scratch {
  std::unique_ptr<std::byte[]> memory;
  std::uintptr_t at;  // on a cache line
  explicit Scratch(std::size_t bytes)
      : memory(std::make_unique_for_overwrite<std::byte[]>(bytes + 64)),
        at((reinterpret_cast<std::uintptr_t>(memory.get()) + 63) / 64 * 64) {}
};

class Average : Collective {
 public:
  Average(Group& group, const AveragePlan& plan, const AverageCall& call)
      : Collective(group, call.timeout_s, kind_bits(call.dtype)),
        plan_(plan),
        call_(call),
        element_bytes_(size_bytes(call.dtype)),
        row_bytes_(call.d * element_bytes_),
        width_(clamp_width(kAveragePieceBytes / std::max<std::size_t>(plan.most_staged, 1),
                           element_bytes_, call.d)),
        pieces_((call.d + width_ - 1) / width_) {}

  Status run() {
    return run_whole([&] { return all_rounds(); });
  }

 private:
  Status all_rounds();
  Status round(const Rows& x, const std::optional<Rows>& addend);
  Status send_staged(const Rows& x);
  Status overwrite(const Rows& x, const std::optional<Rows>& addend);
  void add_up_together(const Rows& x, const std::optional<Rows>& addend, bool stream);
  // Columns [begin, begin + len) of the result, at `out`.
  void add_up(const Rows& x, const std::optional<Rows>& addend, std::size_t begin, std::size_t len,
              const Rows& out, bool stream);
  [[nodiscard]] bool has_read(std::uint32_t target, std::uint64_t pieces) const {
    return channel_to(target).read.load(std::memory_order_seq_cst) >= pieces;
  }
  // Of a failure after rows of `out` were written from what a peer may have changed meanwhile.
  [[nodiscard]] Status torn(Status failure) const {
    const bool in_place = overlap(call_.x, row_bytes_, call_.out);
    return in_place ? Status{Outcome::kTorn, failure.peer} : failure;
  }

  const AveragePlan& plan_;
  const AverageCall& call_;
  const std::size_t element_bytes_, row_bytes_, width_, pieces_;
  std::vector<std::uintptr_t> table_;
};

Status Average::all_rounds() {
  if (const Status s = settle(); !s.ok()) return s;
  if (call_.d == 0) return {};
  Rows x = call_.x;
  for (int k = 0; k < call_.rounds; ++k) {
    const auto addend = k + 1 == call_.rounds ? call_.addend : std::nullopt;
    if (const Status s = round(x, addend); !s.ok()) return s;
    x = call_.out;
  }
  return {};
}

// Rows of the arena are read where they lie, others are staged. Each process does as its own rows
// allow, and takes what comes. Nothing is written before all that the round needs is there, so that
// a peer's death leaves each row as it was, or averaged.
Status Average::round(const Rows& x, const std::optional<Rows>& addend) {
  const bool in_place = overlap(x, row_bytes_, call_.out);
  const bool direct =
      row_bytes_ >= kDirectBytes && g_.owns(x.address, (x.count - 1) * x.stride_bytes + row_bytes_);
  if (direct) {
    const auto* rows = reinterpret_cast<const std::byte*>(x.address);
    for (const std::uint32_t target : plan_.targets) {
      const Status s = send(target, Kind::kAverage, row_bytes_, row_bytes_, rows, x.stride_bytes,
                            in_place ? kToReport : kInPlace);
      if (!s.ok()) return s;
      lend(target);
    }
  } else if (const Status s = send_staged(x); !s.ok()) {
    return s;
  }
  for (const auto& source : plan_.sources) {
    if (const Status s = receive(source.peer, Kind::kAverage, row_bytes_); !s.ok()) return s;
  }
  if (direct && in_place) return overwrite(x, addend);
  // What is staged stays as it is, even where its sender fails.
  const bool may_change = std::ranges::any_of(
      plan_.sources, [&](const auto& source) { return message(source.peer).mark != kStaged; });
  add_up_together(x, addend, row_bytes_ >= kStreamBytes && !in_place);
  for (const auto& source : plan_.sources) {
    if (const Status s = still_whole(source.peer); !s.ok()) return may_change ? torn(s) : s;
    if (message(source.peer).mark == kToReport) report(source.peer, pieces_);
    consume(source.peer);
  }
  if (!direct) return {};
  for (const std::uint32_t target :
       plan_.targets) {  // x may be written again when all have read it
    if (const Status s = until_read(target); !s.ok()) return s;
  }
  return {};
}

Status Average::send_staged(const Rows& x) {
  if (plan_.targets.empty()) return {};
  const std::size_t count = plan_.staged_rows.size();
  const auto row = [&](std::size_t k) {
    return reinterpret_cast<const std::byte*>(x.row(plan_.staged_rows[k]));
  };
  const bool fits = count == 1 && row_bytes_ <= Message::kInlineBytes;
  const std::size_t bytes = std::max(count * row_bytes_, Message::kInlineBytes + !fits);
  const std::byte* data = row(0);
  if (!fits) {
    std::byte* at = nullptr;
    if (const Status s = stage(bytes, &at); !s.ok()) return s;
    for (std::size_t k = 0; k < count; ++k) std::memcpy(at + k * row_bytes_, row(k), row_bytes_);
    data = at;
  }
  for (const std::uint32_t target : plan_.targets) {
    const Status s = send(target, Kind::kAverage, row_bytes_, fits ? row_bytes_ : bytes, data,
                          row_bytes_, kStaged);
    if (!s.ok()) return s;
    if (!fits) stage_until(target);
  }
  return {};
}

// The result goes where the peers read: piece by piece into a few slots, and on to its place when
// all targets have read that piece. A target that died or stopped no longer reads; the others do.
// One that is late may come back and read on: no piece that it has not read is written before it
// can see that this process failed. Until then all the rest waits, in as much memory as that takes.
Status Average::overwrite(const Rows& x, const std::optional<Rows>& addend) {
  const std::size_t piece_bytes = width_ * element_bytes_, slot_bytes = x.count * piece_bytes;
  const std::size_t slots = std::min(kSlots, pieces_);
  const Scratch scratch(slots * slot_bytes);
  std::optional<Scratch> rest;
  std::size_t rest_from = pieces_;  // pieces from here on are in `rest`
  const auto slot = [&](std::size_t i) {
    const auto at = i < rest_from ? scratch.at + i % slots * slot_bytes
                                  : rest->at + (i - rest_from) * slot_bytes;
    return Rows{at, x.count, piece_bytes};
  };
  const auto len_of = [&](std::size_t i) { return std::min(width_, call_.d - i * width_); };

  std::vector<std::uint32_t> targets = plan_.targets;
  Status lost;
  bool late = false;
  std::size_t written = 0;
  const auto read_by_all = [&](std::size_t i) {
    return std::ranges::all_of(
        targets, [&](std::uint32_t t) { return has_read(t, reported_by(t) + i + 1); });
  };
  const auto write_one = [&] {
    const Rows from = slot(written);
    for (std::size_t r = 0; r < x.count; ++r) {
      std::memcpy(reinterpret_cast<std::byte*>(call_.out.row(r)) + written * piece_bytes,
                  reinterpret_cast<const std::byte*>(from.row(r)),
                  len_of(written) * element_bytes_);
    }
    ++written;
  };
  // Until the targets have read `pieces` of them.
  const auto wait_for = [&](std::size_t pieces) {
    for (const std::uint32_t t : std::vector(targets)) {
      const Status s = watch(t, [&] { return has_read(t, reported_by(t) + pieces); });
      if (s.ok()) continue;
      lost = s;
      late |= s.outcome == Outcome::kTimeout;
      std::erase(targets, t);
    }
  };

  for (std::size_t i = 0; i < pieces_; ++i) {
    if (!late && i - written == slots) wait_for(written + 1);
    if (late && !rest) {
      rest.emplace((pieces_ - i) * slot_bytes);
      rest_from = i;
    }
    while (!late && written < i && (i - written == slots || read_by_all(written))) write_one();
    add_up(x, addend, i * width_, len_of(i), slot(i), false);
    if (g_.shares_cores() && (i + 1) % (kTurnBytes / kAveragePieceBytes) == 0) give_way();
    for (const auto& source : plan_.sources) {
      // After its failure a peer's rows may change: then there is no whole average any more.
      if (const Status s = still_whole(source.peer); !s.ok()) return written == 0 ? s : torn(s);
      if (message(source.peer).mark == kToReport) report(source.peer, 1);
    }
  }
  for (const auto& source : plan_.sources) consume(source.peer);
  while (!late && written < pieces_) {
    wait_for(written + 1);
    if (!late) write_one();
  }
  if (late) {
    wait_for(pieces_);
    give_up(lost);
  }
  while (written < pieces_) write_one();
  for (const std::uint32_t t : plan_.targets) count_reported(t, pieces_);
  return lost.ok() ? lost : give_up(lost);
}

// Processes that share cores take turns piece by piece: then they read the same columns at about
// the same time, and a row that several of them read comes from memory once (a ring of 4 on 2
// cores: up to a quarter less time). Nobody waits for anybody.
void Average::add_up_together(const Rows& x, const std::optional<Rows>& addend, bool stream) {
  const std::size_t width =
      g_.shares_cores() ? clamp_width(kTurnBytes, element_bytes_, call_.d) : call_.d;
  for (std::size_t begin = 0; begin < call_.d; begin += width) {
    Rows to = call_.out;
    to.address += begin * element_bytes_;
    add_up(x, addend, begin, std::min(width, call_.d - begin), to, stream);
    if (begin + width < call_.d) give_way();
  }
}

void Average::add_up(const Rows& x, const std::optional<Rows>& addend, std::size_t begin,
                     std::size_t len, const Rows& out, bool stream) {
  const std::size_t shift = begin * element_bytes_;
  table_.clear();
  for (std::size_t r = 0; r < x.count; ++r) table_.push_back(x.row(r) + shift);
  for (const auto& source : plan_.sources) {
    const Message& m = message(source.peer);
    const auto base = reinterpret_cast<std::uintptr_t>(received(source.peer)) + shift;
    for (const std::uint32_t row : m.mark == kStaged ? source.staged : source.rows) {
      table_.push_back(base + row * m.stride);
    }
  }
  if (out.count == 1) {  // one rank per process: no row is read twice
    terms_.clear();
    for (std::size_t t = 0; t < plan_.columns.size(); ++t) {
      terms_.push_back({table_[plan_.columns[t]], plan_.weights[t]});
    }
    if (addend) terms_.push_back({addend->address + shift, call_.a});
    kernels().sum_one(terms_, 0, len, out.address, call_.dtype, stream);
    return;
  }
  WeightedSum job{
      .blocks = {},
      .indptr = plan_.indptr,
      .columns = plan_.columns,
      .weights = plan_.weights,
      .out = out,
      .addend = std::nullopt,
      .a = call_.a,
      .d = len,
      .dtype = call_.dtype,
      .wide = false,
  };
  for (const std::uintptr_t row : table_) job.blocks.push_back({row, 1, 0});
  if (addend) job.addend = Rows{addend->address + shift, addend->count, addend->stride_bytes};
  weighted_sum(job, call_.num_threads);
}

}  // namespace

Status average(Group& group, const AveragePlan& plan, const AverageCall& call) {
  check(group, plan, call);
  const std::size_t row_bytes = call.d * size_bytes(call.dtype);
  if (overlap_of(call.x, call.out, row_bytes) == Overlap::kPart ||
      (call.addend && overlap_of(*call.addend, call.out, row_bytes) == Overlap::kPart)) {
    throw std::invalid_argument("average: an output row overlaps a source row in part");
  }
  return Average(group, plan, call).run();
}

}  // namespace gossamer
