// What the sources of the Python module share. Addresses travel as integers:
// gossamer.runtime.native checks shapes, dtypes and lifetimes.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>

#include "collectives.h"

void bind_group(nanobind::module_& m);
void bind_calls(nanobind::module_& m);
void bind_device(nanobind::module_& m);
void bind_random(nanobind::module_& m);
void bind_sparse(nanobind::module_& m);
void bind_optimizers(nanobind::module_& m);
void bind_chains(nanobind::module_& m);

template <typename T>
using Array =
    nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
// (address, rows, bytes from one row to the next)
using RowsTuple = std::tuple<std::uintptr_t, std::size_t, std::size_t>;
inline gossamer::Rows to_rows(const RowsTuple& rows) {
  return {std::get<0>(rows), std::get<1>(rows), std::get<2>(rows)};
}
// (peer, address, bytes)
using BufferTuple = std::tuple<std::uint32_t, std::uintptr_t, std::size_t>;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// 0: done; else the outcome, and the peer times 8.
inline std::int64_t pack(const gossamer::Status& status) {
  return static_cast<std::int64_t>(status.outcome) + 8 * static_cast<std::int64_t>(status.peer);
}

// The owner of an array: keeps the group, which gets the memory back when the last view is gone.
template <typename Group>
nanobind::capsule owner_of(std::shared_ptr<Group> group, std::byte* memory) {
  struct Owner {
    std::shared_ptr<Group> group;
    std::byte* memory;
  };
  return {new Owner{std::move(group), memory}, [](void* p) noexcept {
            const std::unique_ptr<Owner> o(static_cast<Owner*>(p));
            o->group->release(o->memory);
          }};
}

// `y` is 0 where nothing is added.
inline gossamer::AverageCall to_average_call(const gossamer::AveragePlan& plan, std::uintptr_t x,
                                             std::size_t x_stride, std::uintptr_t out,
                                             std::size_t out_stride, std::uintptr_t y,
                                             std::size_t y_stride, double a, std::size_t d,
                                             int dtype, int rounds, std::size_t num_threads,
                                             double timeout_s) {
  const std::size_t local = plan.indptr.size() - 1;  // check() sees where there is none
  gossamer::AverageCall call{
      .x = {x, local, x_stride},
      .out = {out, local, out_stride},
      .addend = std::nullopt,
      .a = a,
      .d = d,
      .dtype = static_cast<gossamer::Dtype>(dtype),
      .rounds = rounds,
      .num_threads = num_threads,
      .timeout_s = timeout_s,
  };
  if (y != 0) call.addend = gossamer::Rows{y, local, y_stride};
  return call;
}
