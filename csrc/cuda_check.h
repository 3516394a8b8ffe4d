// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <source_location>
#include <stdexcept>
#include <string>

namespace gossamer {

// A function, not a macro: the default argument records the caller's line.
inline void check(cudaError_t status, std::source_location at = std::source_location::current()) {
  if (status == cudaSuccess) return;
  std::string_view file = at.file_name();
  file.remove_prefix(file.rfind('/') + 1);
  throw std::runtime_error("CUDA: " + std::string(cudaGetErrorString(status)) + " (" +
                           std::string(file) + ":" + std::to_string(at.line()) + ")");
}

}  // namespace gossamer
