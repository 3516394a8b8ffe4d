// Products with sparse matrices, called through gossamer.runtime.native.sparse.
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <tuple>

#include "bindings.h"
#include "sparse_products.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using gossamer::Dtype;

// (outputs, inputs, address of starts, address of indices)
using SupportTuple = std::tuple<std::size_t, std::size_t, std::uintptr_t, std::uintptr_t>;

gossamer::Support to_support(const SupportTuple& of) {
  return {std::get<0>(of), std::get<1>(of), pointer<const std::int32_t>(std::get<2>(of)),
          pointer<const std::int32_t>(std::get<3>(of))};
}

}  // namespace

void bind_sparse(nb::module_& m) {
  m.def(
      "add_sparse_product",
      [](const SupportTuple& support, std::uintptr_t values, const RowsTuple& x, const RowsTuple& y,
         int dtype, std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::add_sparse_product(to_support(support), values, to_rows(x), to_rows(y),
                                     static_cast<Dtype>(dtype), num_threads);
      },
      "support"_a, "values"_a, "x"_a, "y"_a, "dtype"_a, "num_threads"_a);
  m.def(
      "add_sparse_product_back",
      [](const SupportTuple& support, std::uintptr_t values, const RowsTuple& g, const RowsTuple& y,
         int dtype, std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::add_sparse_product_back(to_support(support), values, to_rows(g), to_rows(y),
                                          static_cast<Dtype>(dtype), num_threads);
      },
      "support"_a, "values"_a, "g"_a, "y"_a, "dtype"_a, "num_threads"_a);
  m.def(
      "sampled_product",
      [](const SupportTuple& support, const RowsTuple& g, const RowsTuple& x, std::uintptr_t out,
         int dtype, std::size_t num_threads) {
        nb::gil_scoped_release release;
        gossamer::sampled_product(to_support(support), to_rows(g), to_rows(x), out,
                                  static_cast<Dtype>(dtype), num_threads);
      },
      "support"_a, "g"_a, "x"_a, "out"_a, "dtype"_a, "num_threads"_a);
}
