#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "exchange.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using gossamer::AveragePlan;
using gossamer::Group;
using Release = nb::gil_scoped_release;

using TicketTuple = std::tuple<std::int64_t, std::int64_t, std::uint64_t>;

// Python's handlers of signals run between sleeps; one that raises ends the wait.
void look_for_signals() {
  const nb::gil_scoped_acquire hold;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

std::shared_ptr<Group> make_group(nb::bytes job, std::uint32_t process, std::uint32_t processes,
                                  std::size_t bytes, std::uint32_t cores) {
  gossamer::JobId id;
  if (job.size() != id.size()) throw std::invalid_argument("a job's id is 16 bytes");
  std::memcpy(id.data(), job.c_str(), id.size());
  auto group = std::make_shared<Group>(id, process, processes, bytes, cores);
  group->set_interrupt(&look_for_signals);
  return group;
}

nb::object allocate(const std::shared_ptr<Group>& group, std::size_t bytes) {
  std::byte* memory = nullptr;
  {
    const Release release;
    memory = group->allocate(bytes);
  }
  return nb::cast(
      nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(memory, {bytes}, owner_of(group, memory)));
}

std::vector<gossamer::Transfer> to_transfers(const std::vector<BufferTuple>& tuples) {
  std::vector<gossamer::Transfer> transfers;
  for (const auto& [peer, address, bytes] : tuples) {
    transfers.push_back({.peer = peer, .data = pointer<std::byte>(address), .bytes = bytes});
  }
  return transfers;
}

// A wait holds the group's mutex and takes the GIL now and then: whoever has the GIL must not wait
// for the mutex, not even to destroy an exchange.
class Exchange {
 public:
  Exchange(std::shared_ptr<Group> group, const std::vector<BufferTuple>& sends,
           const std::vector<BufferTuple>& receives) {
    const Release release;
    exchange_ = std::make_unique<gossamer::Exchange>(std::move(group), to_transfers(sends),
                                                     to_transfers(receives));
  }
  ~Exchange() {
    const Release release;
    exchange_.reset();
  }
  std::int64_t wait(double timeout_s) {
    const Release release;
    return pack(exchange_->wait(timeout_s));
  }
  std::optional<std::int64_t> test() {
    const Release release;
    const auto status = exchange_->test();
    return status ? std::optional(pack(*status)) : std::nullopt;
  }

 private:
  std::unique_ptr<gossamer::Exchange> exchange_;
};

template <typename T>
std::vector<T> to_vector(const Array<T>& array) {
  return {array.data(), array.data() + array.size()};
}

using SourceTuple =
    std::tuple<std::uint32_t, std::vector<std::uint32_t>, std::vector<std::uint32_t>>;

AveragePlan make_plan(std::vector<std::uint32_t> targets, std::vector<std::uint32_t> staged_rows,
                      std::size_t most_staged, const std::vector<SourceTuple>& sources,
                      const Array<std::int64_t>& indptr, const Array<std::int64_t>& columns,
                      const Array<double>& weights, const Array<std::int64_t>& degree) {
  AveragePlan plan{.targets = std::move(targets),
                   .staged_rows = std::move(staged_rows),
                   .most_staged = most_staged,
                   .sources = {},
                   .indptr = to_vector(indptr),
                   .columns = to_vector(columns),
                   .weights = to_vector(weights),
                   .degree = to_vector(degree)};
  for (const auto& [peer, rows, staged] : sources) plan.sources.push_back({peer, rows, staged});
  return plan;
}

std::int64_t average(Group& group, const AveragePlan& plan, std::uintptr_t x, std::size_t x_stride,
                     std::uintptr_t out, std::size_t out_stride, std::uintptr_t y,
                     std::size_t y_stride, double a, std::size_t d, int dtype, int rounds,
                     std::size_t num_threads, double timeout_s) {
  const Release release;
  return pack(gossamer::average(group, plan,
                                to_average_call(plan, x, x_stride, out, out_stride, y, y_stride, a,
                                                d, dtype, rounds, num_threads, timeout_s)));
}

std::int64_t sum(Group& group, std::uintptr_t x, std::size_t x_stride,
                 const std::vector<std::uint32_t>& counts, std::uintptr_t out, std::size_t d,
                 int dtype, double divisor, double timeout_s) {
  const Release release;
  return pack(gossamer::sum(group, {.x = {x, counts.at(group.process()), x_stride},
                                    .counts = counts,
                                    .out = out,
                                    .d = d,
                                    .dtype = static_cast<gossamer::Dtype>(dtype),
                                    .divisor = divisor,
                                    .timeout_s = timeout_s}));
}

std::int64_t gather(Group& group, std::uintptr_t x, std::size_t x_stride,
                    const std::vector<std::uint32_t>& counts, std::uintptr_t out,
                    std::size_t row_bytes, double timeout_s) {
  const Release release;
  return pack(gossamer::gather(group, {.x = {x, counts.at(group.process()), x_stride},
                                       .counts = counts,
                                       .out = out,
                                       .row_bytes = row_bytes,
                                       .timeout_s = timeout_s}));
}

std::int64_t broadcast(Group& group, std::uintptr_t x, std::uint32_t root, std::uintptr_t out,
                       std::size_t row_bytes, double timeout_s) {
  const Release release;
  return pack(gossamer::broadcast(group, {x, root, out, row_bytes, timeout_s}));
}

}  // namespace

void bind_group(nb::module_& m) {
  nb::class_<Group>(m, "Group", "The processes of a job on one host, in shared memory.")
      .def_static("create", &make_group, "job"_a, "process"_a, "processes"_a, "bytes"_a, "cores"_a)
      .def_prop_ro("ticket",
                   [](const Group& g) {
                     return TicketTuple{g.ticket().pid, g.ticket().fd, g.ticket().bytes};
                   })
      .def(
          "attach",
          [](Group& g, const std::vector<TicketTuple>& tuples) {
            std::vector<gossamer::Ticket> tickets;
            for (const auto& [pid, fd, bytes] : tuples) tickets.push_back({pid, fd, bytes});
            const Release release;
            g.attach(tickets);
          },
          "tickets"_a)
      .def("allocate", &allocate, "bytes"_a)
      .def("owns", &Group::owns, "address"_a, "bytes"_a)
      .def("average", &average, "plan"_a, "x"_a, "x_stride"_a, "out"_a, "out_stride"_a, "y"_a,
           "y_stride"_a, "a"_a, "d"_a, "dtype"_a, "rounds"_a, "num_threads"_a, "timeout_s"_a)
      .def("sum", &sum, "x"_a, "x_stride"_a, "counts"_a, "out"_a, "d"_a, "dtype"_a, "divisor"_a,
           "timeout_s"_a)
      .def("gather", &gather, "x"_a, "x_stride"_a, "counts"_a, "out"_a, "row_bytes"_a,
           "timeout_s"_a)
      .def("broadcast", &broadcast, "x"_a, "root"_a, "out"_a, "row_bytes"_a, "timeout_s"_a)
      .def("close", &Group::close, nb::call_guard<Release>());
  nb::class_<AveragePlan>(m, "AveragePlan", "One process's part of a round.")
      .def_static("create", &make_plan, "targets"_a, "staged_rows"_a, "most_staged"_a, "sources"_a,
                  "indptr"_a, "columns"_a, "weights"_a, "degree"_a);
  nb::class_<Exchange>(m, "Exchange", "Transfers on their way.")
      .def(nb::init<std::shared_ptr<Group>, const std::vector<BufferTuple>&,
                    const std::vector<BufferTuple>&>(),
           "group"_a, "sends"_a, "receives"_a)
      .def("wait", &Exchange::wait, "timeout_s"_a)
      .def("test", &Exchange::test);
}
