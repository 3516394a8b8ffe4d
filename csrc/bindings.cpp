#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <cstdint>
#include <stdexcept>

#include "philox.h"
#include "weighted_sum.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using gossamer::Dtype;
using gossamer::Stream;

// Addresses travel as integers: gossamer.runtime.native checks shapes, dtypes and lifetimes.
template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void weighted_sum(std::uintptr_t rows, std::size_t num_rows, std::uintptr_t indptr,
                  std::uintptr_t columns, std::uintptr_t weights, std::uintptr_t out,
                  std::size_t num_out, std::uintptr_t addend, double a, std::size_t d, int dtype,
                  bool wide, bool staged) {
  const gossamer::WeightedSum job{
      .rows = pointer<const std::uintptr_t>(rows),
      .indptr = pointer<const std::int64_t>(indptr),
      .columns = pointer<const std::int64_t>(columns),
      .weights = pointer<const double>(weights),
      .out = pointer<const std::uintptr_t>(out),
      .num_out = num_out,
      .addend = pointer<const std::uintptr_t>(addend),
      .a = a,
      .d = d,
      .num_rows = num_rows,
      .wide = wide,
      .staged = staged,
  };
  nb::gil_scoped_release release;
  gossamer::weighted_sum(job, static_cast<Dtype>(dtype));
}

enum class Distribution : int { kUniform = 0, kNormal = 1, kRademacher = 2 };

template <typename T>
void fill(Distribution kind, T* out, std::size_t n, std::uint64_t begin, const Stream& stream) {
  switch (kind) {
    case Distribution::kUniform:
      return gossamer::fill_uniform(out, n, begin, stream);
    case Distribution::kNormal:
      return gossamer::fill_normal(out, n, begin, stream);
    case Distribution::kRademacher:
      return gossamer::fill_rademacher(out, n, begin, stream);
  }
}

}  // namespace

NB_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels; call them through gossamer.runtime.native, which checks the arguments.";
  m.def("instruction_set", &gossamer::instruction_set, "The instruction set the kernels use here.");
  m.def("weighted_sum", &weighted_sum, "rows"_a, "num_rows"_a, "indptr"_a, "columns"_a, "weights"_a,
        "out"_a, "num_out"_a, "addend"_a, "a"_a, "d"_a, "dtype"_a, "wide"_a, "staged"_a);
  m.def(
      "row_dot",
      [](std::uintptr_t x, std::uintptr_t y, std::size_t num_rows, std::size_t d, int dtype,
         std::uintptr_t out) {
        nb::gil_scoped_release release;
        gossamer::row_dot(pointer<const std::uintptr_t>(x), pointer<const std::uintptr_t>(y),
                          num_rows, d, static_cast<Dtype>(dtype), pointer<double>(out));
      },
      "x"_a, "y"_a, "num_rows"_a, "d"_a, "dtype"_a, "out"_a);
  m.def("philox4x32", &gossamer::philox4x32, "counter"_a, "key"_a,
        "One Philox4x32-10 block: four 32-bit words.");
  m.def(
      "fill_words",
      [](std::uintptr_t out, std::size_t n, std::uint64_t begin, std::uint64_t key,
         std::uint32_t c1, std::uint32_t c2, std::uint32_t c3) {
        nb::gil_scoped_release release;
        gossamer::fill_words(pointer<std::uint32_t>(out), n, begin, {key, c1, c2, c3});
      },
      "out"_a, "n"_a, "begin"_a, "key"_a, "c1"_a, "c2"_a, "c3"_a);
  m.def(
      "fill",
      [](int kind, std::uintptr_t out, std::size_t n, std::uint64_t begin, bool is_double,
         std::uint64_t key, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3) {
        nb::gil_scoped_release release;
        const Stream stream{key, c1, c2, c3};
        const auto distribution = static_cast<Distribution>(kind);
        is_double ? fill(distribution, pointer<double>(out), n, begin, stream)
                  : fill(distribution, pointer<float>(out), n, begin, stream);
      },
      "kind"_a, "out"_a, "n"_a, "begin"_a, "is_double"_a, "key"_a, "c1"_a, "c2"_a, "c3"_a);
}
