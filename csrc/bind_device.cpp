#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "device.h"
#include "device_collectives.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using gossamer::AveragePlan;
using gossamer::DeviceGroup;
using gossamer::DeviceStream;
using gossamer::Dtype;
using Release = nb::gil_scoped_release;

// A tensor of bytes; the memory is given back when the last view of it is gone.
nb::object allocate(const std::shared_ptr<DeviceGroup>& group, std::size_t bytes,
                    DeviceStream stream) {
  std::byte* memory = nullptr;
  {
    const Release release;
    memory = group->allocate(bytes, stream);
  }
  const auto [type, id] = group->device().dlpack();
  return nb::cast(nb::ndarray<nb::pytorch, std::uint8_t, nb::ndim<1>>(
      memory, {bytes}, owner_of(group, memory), {}, nb::dtype<std::uint8_t>(), type, id));
}

std::int64_t average(DeviceGroup& group, const AveragePlan& plan, std::uintptr_t x,
                     std::size_t x_stride, std::uintptr_t out, std::size_t out_stride,
                     std::uintptr_t y, std::size_t y_stride, double a, std::size_t d, int dtype,
                     int rounds, double timeout_s, DeviceStream stream) {
  const Release release;
  return pack(group.average(plan,
                            to_average_call(plan, x, x_stride, out, out_stride, y, y_stride, a, d,
                                            dtype, rounds, 1, timeout_s),
                            stream));
}

std::int64_t sum(DeviceGroup& group, std::uintptr_t x, std::size_t x_stride,
                 const std::vector<std::uint32_t>& counts, std::uintptr_t out, std::size_t d,
                 int dtype, double divisor, double timeout_s, DeviceStream stream) {
  const Release release;
  const std::size_t local = counts.at(group.group().process());
  return pack(group.sum({.x = {x, local, x_stride},
                         .counts = counts,
                         .out = out,
                         .d = d,
                         .dtype = static_cast<Dtype>(dtype),
                         .divisor = divisor,
                         .timeout_s = timeout_s},
                        stream));
}

std::int64_t exchange(DeviceGroup& group, const std::vector<BufferTuple>& sends,
                      const std::vector<BufferTuple>& receives, double timeout_s,
                      DeviceStream stream) {
  const auto buffers = [](const std::vector<BufferTuple>& tuples) {
    std::vector<gossamer::DeviceBuffer> all;
    for (const auto& [peer, address, bytes] : tuples)
      all.push_back({peer, pointer<std::byte>(address), bytes});
    return all;
  };
  const Release release;
  return pack(group.exchange(buffers(sends), buffers(receives), timeout_s, stream));
}

// The weighted_sum of bindings.cpp, on the current CUDA device; outputs overlap no source.
void weighted_sum_cuda(const std::vector<RowsTuple>& blocks, const Array<std::int64_t>& indptr,
                       const Array<std::int64_t>& columns, const Array<double>& weights,
                       const RowsTuple& out, const std::optional<RowsTuple>& addend, double a,
                       std::size_t d, int dtype, DeviceStream stream) {
  const Release release;
  std::vector<std::uintptr_t> table;
  for (const auto& [address, count, stride] : blocks) {
    for (std::size_t r = 0; r < count; ++r) table.push_back(address + r * stride);
  }
  const auto& [out_address, out_count, out_stride] = out;
  gossamer::RowSums sums{.terms = {},
                         .first = {0},
                         .outs = {},
                         .copies = 1,
                         .d = d,
                         .dtype = static_cast<Dtype>(dtype)};
  for (std::size_t r = 0; r < out_count; ++r) {
    for (auto t = indptr.data()[r]; t < indptr.data()[r + 1]; ++t) {
      const auto column = static_cast<std::size_t>(columns.data()[t]);
      if (column >= table.size()) {
        throw std::invalid_argument("weighted_sum: a term names a row outside the table");
      }
      sums.terms.push_back({table[column], weights.data()[t]});
    }
    if (addend) sums.terms.push_back({std::get<0>(*addend) + r * std::get<2>(*addend), a});
    sums.first.push_back(static_cast<std::uint32_t>(sums.terms.size()));
    sums.outs.push_back(out_address + r * out_stride);
  }
  gossamer::sum_rows_cuda(sums, stream);
}

void row_dot_cuda(const RowsTuple& x, const RowsTuple& y, std::size_t d, int dtype,
                  std::uintptr_t out, DeviceStream stream) {
  const Release release;
  const auto rows = [](const RowsTuple& t) {
    return gossamer::Rows{std::get<0>(t), std::get<1>(t), std::get<2>(t)};
  };
  gossamer::row_dot_cuda(rows(x), rows(y), d, static_cast<Dtype>(dtype), pointer<double>(out),
                         stream);
}

void add_rows_cuda(const RowsTuple& g, std::uintptr_t factors, std::uintptr_t out, std::size_t d,
                   int dtype, DeviceStream stream) {
  const Release release;
  gossamer::add_rows_cuda({std::get<0>(g), std::get<1>(g), std::get<2>(g)},
                          pointer<const double>(factors), out, d, static_cast<Dtype>(dtype),
                          stream);
}

// What tests queue on a stream beside the collectives, and how they see its end.
void copy(DeviceGroup& group, std::uintptr_t to, std::uintptr_t from, std::size_t bytes,
          DeviceStream stream) {
  group.device().copy(pointer<std::byte>(to), pointer<std::byte>(from), bytes, stream);
}

void synchronize(DeviceGroup& group, DeviceStream stream) {
  const Release release;
  gossamer::DeviceHandle handle;
  void* event = group.device().make_event(handle);
  group.device().record(event, stream);
  group.device().synchronize(event);
  group.device().free_event(event);
}

}  // namespace

void bind_device(nb::module_& m) {
  m.def("weighted_sum_cuda", &weighted_sum_cuda, "blocks"_a, "indptr"_a, "columns"_a, "weights"_a,
        "out"_a, "addend"_a.none(), "a"_a, "d"_a, "dtype"_a, "stream"_a);
  m.def("add_rows_cuda", &add_rows_cuda, "g"_a, "factors"_a, "out"_a, "d"_a, "dtype"_a, "stream"_a);
  m.def("row_dot_cuda", &row_dot_cuda, "x"_a, "y"_a, "d"_a, "dtype"_a, "out"_a, "stream"_a);
  nb::class_<DeviceGroup>(m, "DeviceGroup", "Collectives on rows in device memory, on streams.")
      .def_static(
          "on_cuda",
          [](std::shared_ptr<gossamer::Group> group, int index) {
            return std::make_shared<DeviceGroup>(std::move(group),
                                                 gossamer::make_cuda_device(index));
          },
          "group"_a, "index"_a)
      .def_static(
          "on_host",
          [](std::shared_ptr<gossamer::Group> group, std::uint32_t seed,
             std::uint32_t most_delay_us) {
            return std::make_shared<DeviceGroup>(std::move(group),
                                                 gossamer::make_host_device(seed, most_delay_us));
          },
          "group"_a, "seed"_a, "most_delay_us"_a)
      .def("allocate", &allocate, "bytes"_a, "stream"_a)
      .def("owns", &DeviceGroup::owns, "address"_a, "bytes"_a)
      .def("average", &average, "plan"_a, "x"_a, "x_stride"_a, "out"_a, "out_stride"_a, "y"_a,
           "y_stride"_a, "a"_a, "d"_a, "dtype"_a, "rounds"_a, "timeout_s"_a, "stream"_a)
      .def("sum", &sum, "x"_a, "x_stride"_a, "counts"_a, "out"_a, "d"_a, "dtype"_a, "divisor"_a,
           "timeout_s"_a, "stream"_a)
      .def("exchange", &exchange, "sends"_a, "receives"_a, "timeout_s"_a, "stream"_a)
      .def("copy", &copy, "to"_a, "source"_a, "bytes"_a, "stream"_a)
      .def("synchronize", &synchronize, "stream"_a)
      .def("close", &DeviceGroup::close, nb::call_guard<Release>());
}
