// Collectives called with tensors, for small ones: what Python would check and count is checked and
// counted here. A call with anything out of the ordinary returns kNotHere before it does anything;
// Python then goes the general way, which checks again and says what is wrong.

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <numeric>
#include <tuple>
#include <vector>

#include "bind_tensors.h"
#include "bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using gossamer::Group;
using Clock = std::chrono::steady_clock;

constexpr std::int64_t kNotHere = -1;

// One communicator's calls; from one thread at a time.
class Calls {
 public:
  Calls(std::shared_ptr<Group> group, std::vector<std::uint32_t> counts)
      : group_(std::move(group)),
        counts_(std::move(counts)),
        n_(std::accumulate(counts_.begin(), counts_.end(), std::size_t{0})),
        local_(counts_.at(group_->process())),
        first_(
            std::accumulate(counts_.begin(), counts_.begin() + group_->process(), std::size_t{0})),
        bytes_(local_),
        messages_(local_) {}

  // `y` may be None. Several rounds write `out` before the last one adds y: not here if they meet.
  std::int64_t average(const gossamer::AveragePlan& plan, nb::handle x, nb::handle out,
                       nb::handle y, double a, int rounds, std::size_t num_threads,
                       double timeout_s) {
    const auto from = rows_of(x), to = rows_of(out);
    if (!fits(from, local_) || !fits(to, local_) || !alike(*from, *to) || !from->dtype) {
      return kNotHere;
    }
    gossamer::AverageCall call{
        .x = {from->address, local_, from->stride},
        .out = {to->address, local_, to->stride},
        .addend = std::nullopt,
        .a = a,
        .d = from->width,
        .dtype = *from->dtype,
        .rounds = rounds,
        .num_threads = num_threads,
        .timeout_s = timeout_s,
    };
    if (!y.is_none()) {
      const auto added = rows_of(y);
      if (rounds != 1 || !fits(added, local_) || !alike(*from, *added)) return kNotHere;
      call.addend = gossamer::Rows{added->address, local_, added->stride};
    }
    if (rounds < 1 || plan.degree.size() != local_) return kNotHere;
    const std::int64_t status = run([&] { return gossamer::average(*group_, plan, call); });
    const auto bytes = static_cast<std::int64_t>(from->width * from->element_bytes);
    for (std::size_t i = 0; i < local_; ++i) {
      bytes_[i] += rounds * plan.degree[i] * bytes;
      messages_[i] += rounds * plan.degree[i];
    }
    return status;
  }

  std::int64_t all_reduce(nb::handle x, nb::handle out, bool mean, double timeout_s) {
    const auto from = rows_of(x), to = rows_of(out);
    if (!fits(from, local_) || !fits(to, 1) || !alike(*from, *to) || !from->dtype) return kNotHere;
    const std::int64_t status = run([&] {
      return gossamer::sum(*group_, {.x = {from->address, local_, from->stride},
                                     .counts = counts_,
                                     .out = to->address,
                                     .d = from->width,
                                     .dtype = *from->dtype,
                                     .divisor = mean ? static_cast<double>(n_) : 1.0,
                                     .timeout_s = timeout_s});
    });
    count(2 * from->width * from->element_bytes * (n_ - 1) / n_, 2);
    return status;
  }

  std::int64_t all_gather(nb::handle x, nb::handle out, double timeout_s) {
    const auto from = rows_of(x), to = rows_of(out);
    if (!fits(from, local_) || !fits(to, n_) || !alike(*from, *to) || !to->whole()) return kNotHere;
    const std::size_t row_bytes = from->width * from->element_bytes;
    const std::int64_t status = run([&] {
      return gossamer::gather(*group_, {.x = {from->address, local_, from->stride},
                                        .counts = counts_,
                                        .out = to->address,
                                        .row_bytes = row_bytes,
                                        .timeout_s = timeout_s});
    });
    count((n_ - 1) * row_bytes, static_cast<std::int64_t>(n_) - 1);
    return status;
  }

  std::int64_t broadcast(nb::handle x, std::int64_t root, nb::handle out, double timeout_s) {
    const auto from = rows_of(x), to = rows_of(out);
    if (!fits(from, local_) || !fits(to, 1) || !alike(*from, *to)) return kNotHere;
    if (root < 0 || static_cast<std::size_t>(root) >= n_) return kNotHere;
    const auto rank = static_cast<std::size_t>(root);
    std::uint32_t owner = 0;
    for (std::size_t end = counts_[0]; rank >= end; end += counts_[owner]) ++owner;
    const bool here = owner == group_->process();
    const std::size_t row_bytes = from->width * from->element_bytes;
    const std::uintptr_t row = here ? from->address + (rank - first_) * from->stride : 0;
    const std::int64_t status = run([&] {
      return gossamer::broadcast(*group_, {row, owner, to->address, row_bytes, timeout_s});
    });
    if (here) {
      bytes_[rank - first_] += static_cast<std::int64_t>((n_ - 1) * row_bytes);
      messages_[rank - first_] += static_cast<std::int64_t>(n_) - 1;
    }
    return status;
  }

  // Seconds, bytes and messages (per hosted rank) since the last time.
  std::tuple<double, std::vector<std::int64_t>, std::vector<std::int64_t>> take() {
    const double seconds = std::chrono::duration<double>(spent_).count();
    std::tuple taken{seconds, bytes_, messages_};
    spent_ = {};
    bytes_.assign(local_, 0);
    messages_.assign(local_, 0);
    return taken;
  }

 private:
  static bool fits(const std::optional<TensorRows>& rows, std::size_t count) {
    return rows && rows->rows == count;
  }
  static bool alike(const TensorRows& x, const TensorRows& out) {
    return x.width == out.width && x.kind == out.kind;
  }
  template <typename F>
  std::int64_t run(F&& call) {
    const nb::gil_scoped_release release;
    const auto begin = Clock::now();
    const std::int64_t status = pack(call());
    spent_ += Clock::now() - begin;
    return status;
  }
  void count(std::size_t bytes, std::int64_t messages) {
    if (n_ == 1) return;
    for (std::size_t i = 0; i < local_; ++i) {
      bytes_[i] += static_cast<std::int64_t>(bytes);
      messages_[i] += messages;
    }
  }

  std::shared_ptr<Group> group_;
  std::vector<std::uint32_t> counts_;
  std::size_t n_, local_, first_;
  Clock::duration spent_{};
  std::vector<std::int64_t> bytes_, messages_;
};

}  // namespace

void bind_calls(nb::module_& m) {
  nb::class_<Calls>(m, "Calls", "Collectives of one communicator on tensors.")
      .def(nb::init<std::shared_ptr<Group>, std::vector<std::uint32_t>>(), "group"_a, "counts"_a)
      .def("average", &Calls::average, "plan"_a, "x"_a, "out"_a, "y"_a.none(), "a"_a, "rounds"_a,
           "num_threads"_a, "timeout_s"_a)
      .def("all_reduce", &Calls::all_reduce, "x"_a, "out"_a, "mean"_a, "timeout_s"_a)
      .def("all_gather", &Calls::all_gather, "x"_a, "out"_a, "timeout_s"_a)
      .def("broadcast", &Calls::broadcast, "x"_a, "root"_a, "out"_a, "timeout_s"_a)
      .def("take", &Calls::take);
}
