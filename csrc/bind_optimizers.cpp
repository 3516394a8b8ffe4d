#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "bindings.h"
#include "coded_adam.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// The addresses of codes, scales, and the codebook's values, bounds and cells.
using MomentTuple =
    std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

gossamer::CodedMoment to_moment(const MomentTuple& of) {
  const auto& [codes, scales, values, bounds, cells] = of;
  return {pointer<std::uint8_t>(codes),
          pointer<float>(scales),
          {pointer<const float>(values), pointer<const float>(bounds),
           pointer<const std::uint8_t>(cells)}};
}

}  // namespace

void bind_optimizers(nb::module_& m) {
  m.attr("CODED_BLOCK") = gossamer::kCodedBlock;
  m.def(
      "coded_adam",
      [](std::uintptr_t grad, std::uintptr_t direction, std::size_t count, int dtype,
         const MomentTuple& first, const MomentTuple& second, const std::array<float, 7>& factors,
         std::size_t num_threads) {
        const auto [keep1, add1, keep2, add2, grow1, grow2, eps] = factors;
        nb::gil_scoped_release release;
        gossamer::coded_adam(
            {
                .grad = grad,
                .direction = direction,
                .count = count,
                .dtype = static_cast<gossamer::Dtype>(dtype),
                .m = to_moment(first),
                .v = to_moment(second),
                .factors = {keep1, add1, keep2, add2, grow1, grow2, eps},
            },
            num_threads);
      },
      "grad"_a, "direction"_a, "count"_a, "dtype"_a, "first"_a, "second"_a, "factors"_a,
      "num_threads"_a);
}
