// A torch tensor's memory, read from Python's object without torch's headers.
//
// torch offers a table of C functions for this (DLPack's exchange API, `__dlpack_c_exchange_api__`
// of torch.Tensor): some 20 ns a tensor, where asking Python for address, shape and strides takes
// longer than a small collective.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "dtype.h"

// Rows of a CPU tensor; elements of a row lie side by side.
struct TensorRows {
  std::uintptr_t address;
  std::size_t rows, width;  // elements
  std::size_t stride;       // bytes from a row to the next
  std::size_t element_bytes;
  std::uint16_t kind;                          // of element: equal for equal dtypes
  std::optional<gossamer::Dtype> dtype;        // where the kernels know it
  [[nodiscard]] bool whole() const noexcept {  // no room between the rows
    return rows == 1 || stride == width * element_bytes;
  }
};

// Nothing where `object` is no two-dimensional strided tensor on the CPU with contiguous rows.
std::optional<TensorRows> rows_of(nanobind::handle object);
