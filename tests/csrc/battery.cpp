#include "battery.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <ranges>
#include <utility>

#include "exchange.h"

namespace gossamer::test {
namespace {

constexpr double kTimeout_s = 300;
constexpr std::size_t kArenaBytes = std::size_t{512} << 20;
constexpr std::uint32_t kX = 1, kAddend = 2;

std::string text_of(std::uint64_t number) { return std::to_string(number); }

}  // namespace

// Rows in the arena, or elsewhere at any alignment that suits the elements.
class Participant::Buffer {
 public:
  Buffer(Group& group, Random& random, std::size_t rows, std::size_t row_bytes,
         std::size_t element_bytes, bool in_arena)
      : group_(group) {
    const std::size_t stride =
        row_bytes + (random.one_in(2) ? 0 : element_bytes * (1 + random.below(64)));
    const std::size_t shift = element_bytes * random.below(5);
    const std::size_t bytes = shift + rows * stride + 1;
    if (in_arena) {
      arena_ = group.allocate(bytes);
    } else {
      heap_.resize(bytes);
    }
    data_ = std::span((in_arena ? arena_ : heap_.data()) + shift, rows * stride);
    rows_ = {reinterpret_cast<std::uintptr_t>(data_.data()), rows, stride};
  }
  ~Buffer() {
    spoil();
    if (arena_ != nullptr) group_.release(arena_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  [[nodiscard]] const Rows& rows() const { return rows_; }
  [[nodiscard]] std::byte* row(std::size_t r) const {
    return data_.data() + r * rows_.stride_bytes;
  }
  void spoil() { std::memset(data_.data(), 0xff, data_.size()); }

 private:
  Group& group_;
  std::byte* arena_ = nullptr;
  std::vector<std::byte> heap_;
  std::span<std::byte> data_;
  Rows rows_{};
};

std::shared_ptr<Group> make_group(const Job& job, std::uint32_t process) {
  Random random(key_of(job.seed, 77));
  // More or fewer than there are: to spin, or to yield and sleep at once.
  const std::uint32_t cores = random.one_in(2) ? 1 : 64;
  return std::make_shared<Group>(job.id, process, job.processes(), kArenaBytes, cores);
}

Participant::Participant(std::shared_ptr<Group> group, Job job)
    : group_(std::move(group)),
      job_(std::move(job)),
      process_(group_->process()),
      own_(key_of(job_.seed, 1000 + process_)) {
  group_->set_interrupt([this] { pause(); });
}

void Participant::pause() {
  switch (own_.below(16)) {
    case 0:
      usleep(static_cast<useconds_t>(own_.below(300)));
      break;
    case 1:
    case 2:
    case 3:
      sched_yield();
      break;
  }
}

Status Participant::round(std::uint64_t k) {
  pause();
  Random random(key_of(job_.seed, k, 1));
  const std::size_t choice = random.below(8);
  if (choice < 4) return average(k);
  return choice < 6 ? sum(k) : exchange(k);
}

Participant::Buffer Participant::rows_of(std::uint64_t k, Dtype dtype, std::size_t d) {
  // In half of the rounds mostly all alike, so that all-reduce finds everyone's rows in place.
  const bool in_arena = (key_of(job_.seed, k, 5) & 1) != 0 ? !own_.one_in(20) : own_.one_in(2);
  return {*group_, own_, job_.counts[process_], d * size_bytes(dtype), size_bytes(dtype), in_arena};
}

std::vector<std::vector<std::byte>> Participant::all_rows(std::uint64_t k, Dtype dtype,
                                                          std::size_t d, std::uint32_t what) const {
  std::vector<std::vector<std::byte>> rows(job_.ranks(),
                                           std::vector<std::byte>(d * size_bytes(dtype)));
  for (std::uint32_t r = 0; r < job_.ranks(); ++r) {
    fill(rows[r].data(), d, dtype, key_of(job_.seed, k, what, r));
  }
  return rows;
}

void Participant::compare(const std::byte* found, std::span<const std::byte> expected,
                          const std::string& what) const {
  if (expected.empty() || std::memcmp(found, expected.data(), expected.size()) == 0) return;
  std::size_t i = 0;
  while (found[i] == expected[i]) ++i;
  std::fprintf(stderr, "WRONG: seed %llu, process %u of %u: %s: byte %zu of %zu\n",
               static_cast<unsigned long long>(job_.seed), process_, job_.processes(), what.c_str(),
               i, expected.size());
  std::_Exit(3);
}

Status Participant::average(std::uint64_t k) {
  Random random(key_of(job_.seed, k, 2));
  const auto dtype = static_cast<Dtype>(random.below(4));
  const std::size_t d = draw_width(random, dtype), row_bytes = d * size_bytes(dtype);
  const Graph graph = draw_graph(job_, random);
  const int rounds = random.one_in(4) ? 2 + static_cast<int>(random.below(2)) : 1;
  const bool with_addend = random.one_in(2);
  const std::uint32_t first = job_.first(process_), local = job_.counts[process_];

  auto given = all_rows(k, dtype, d, kX);
  const auto addends = with_addend ? all_rows(k, dtype, d, kAddend) : decltype(given){};
  Buffer x = rows_of(k, dtype, d), addend = rows_of(k, dtype, d);
  std::optional<Buffer> apart;
  if (!own_.one_in(3)) {
    apart.emplace(*group_, own_, local, row_bytes, size_bytes(dtype), own_.one_in(2));
  }
  const Buffer& out = apart ? *apart : x;
  for (std::uint32_t r = 0; r < local && d > 0; ++r) {
    std::memcpy(x.row(r), given[first + r].data(), row_bytes);
    if (with_addend) std::memcpy(addend.row(r), addends[first + r].data(), row_bytes);
  }
  AverageCall call{.x = x.rows(),
                   .out = out.rows(),
                   .addend = std::nullopt,
                   .a = -0.3,
                   .d = d,
                   .dtype = dtype,
                   .rounds = rounds,
                   .num_threads = 1 + own_.below(2),
                   .timeout_s = kTimeout_s};
  if (with_addend) call.addend = addend.rows();
  const Status status = gossamer::average(*group_, plan_of(job_, graph, process_), call);
  const std::string what = "average " + text_of(k) + ", d " + text_of(d);
  if (!status.ok()) {
    if (status.outcome == Outcome::kTorn && !apart) return status;
    const bool untouched = std::ranges::all_of(std::views::iota(0u, local), [&](std::uint32_t r) {
      return row_bytes == 0 || std::memcmp(x.row(r), given[first + r].data(), row_bytes) == 0;
    });
    if (untouched || (!apart && rounds > 1)) return status;
    // In place, a round may have been done before the failure was seen: then all of it.
    if (!apart) reference_average(graph, given, addends, call.a, rounds, d, dtype);
    for (std::uint32_t r = 0; r < local; ++r)
      compare(x.row(r), given[first + r], what + ", failed");
    return status;
  }
  if (apart) x.spoil();
  addend.spoil();
  pause();
  reference_average(graph, given, addends, call.a, rounds, d, dtype);
  for (std::uint32_t r = 0; r < local; ++r) compare(out.row(r), given[first + r], what);
  return {};
}

Status Participant::sum(std::uint64_t k) {
  Random random(key_of(job_.seed, k, 3));
  const auto dtype = static_cast<Dtype>(random.below(4));
  const std::size_t d = draw_width(random, dtype), row_bytes = d * size_bytes(dtype);
  const double divisor = random.one_in(2) ? job_.ranks() : 1;
  const std::uint32_t first = job_.first(process_), local = job_.counts[process_];

  const auto given = all_rows(k, dtype, d, kX);
  Buffer x = rows_of(k, dtype, d);
  Buffer out = rows_of(k, dtype, d);  // its first row
  const bool in_place = local == 1 && own_.one_in(6);
  for (std::uint32_t r = 0; r < local && d > 0; ++r) {
    std::memcpy(x.row(r), given[first + r].data(), row_bytes);
  }
  const auto to = in_place ? x.rows().address : out.rows().address;
  const Status status = gossamer::sum(*group_, {.x = x.rows(),
                                                .counts = job_.counts,
                                                .out = to,
                                                .d = d,
                                                .dtype = dtype,
                                                .divisor = divisor,
                                                .timeout_s = kTimeout_s});
  const std::string what = "sum " + text_of(k) + ", d " + text_of(d);
  if (!status.ok()) {
    for (std::uint32_t r = 0; !in_place && r < local; ++r) {
      compare(x.row(r), given[first + r], what);
    }
    return status;
  }
  if (!in_place) x.spoil();
  pause();
  compare(in_place ? x.row(0) : out.row(0), reference_sum(given, d, dtype, divisor), what);
  return {};
}

// Two batches at once, waited for in any order; in between, now and then, an average.
Status Participant::exchange(std::uint64_t k) {
  Random random(key_of(job_.seed, k, 4));
  struct Message {
    std::uint64_t key;
    std::size_t bytes;
    std::unique_ptr<Buffer> buffer;
  };
  std::vector<Message> sent[2], received[2];
  std::vector<Transfer> sends[2], receives[2];
  bool large = random.one_in(100);  // one message that is larger than the staging area
  for (std::uint32_t from = 0; from < job_.processes(); ++from) {
    for (std::uint32_t to = 0; to < job_.processes(); ++to) {
      if (from == to) continue;
      const std::size_t messages = random.below(5) / 2;
      for (std::size_t m = 0; m < messages; ++m) {
        const std::size_t bytes =
            std::exchange(large, false) ? (17 << 20) + 5 : draw_message(random);
        const std::uint64_t key = random.next();
        const std::size_t batch = std::min<std::size_t>(m, 1);
        if (from != process_ && to != process_) continue;
        auto buffer = std::make_unique<Buffer>(*group_, own_, 1, bytes, 1, own_.one_in(2));
        if (from == process_) {
          fill(buffer->row(0), bytes / 2, Dtype::kFloat16, key);
          sends[batch].push_back({.peer = to, .data = buffer->row(0), .bytes = bytes});
          sent[batch].push_back({key, bytes, std::move(buffer)});
        } else {
          receives[batch].push_back({.peer = from, .data = buffer->row(0), .bytes = bytes});
          received[batch].push_back({key, bytes, std::move(buffer)});
        }
      }
    }
  }
  Exchange first(group_, sends[0], receives[0]);
  pause();
  Exchange second(group_, sends[1], receives[1]);
  if (random.one_in(3)) {
    if (const Status s = average(k); !s.ok()) return s;
  }
  while (own_.one_in(2)) {
    if (const auto done = first.test()) {
      if (!done->ok()) return *done;
      break;
    }
    pause();
  }
  Exchange* order[] = {&first, &second};
  const std::size_t begin = own_.below(2);
  for (const std::size_t batch : {begin, 1 - begin}) {
    if (const Status s = order[batch]->wait(kTimeout_s); !s.ok()) return s;
    for (const Message& m : sent[batch]) m.buffer->spoil();
    pause();
    for (const Message& m : received[batch]) {
      std::vector<std::byte> expected(m.bytes / 2 * 2);
      fill(expected.data(), m.bytes / 2, Dtype::kFloat16, m.key);
      compare(m.buffer->row(0), expected, "exchange " + text_of(k));
    }
  }
  return {};
}

}  // namespace gossamer::test
