// The parts of the module that bind_group.cpp and bind_device.cpp define.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "group.h"

void bind_group(nanobind::module_& m);
void bind_device(nanobind::module_& m);

// 0: done; else the outcome, and the peer times 8.
inline std::int64_t pack(const gossamer::Status& status) {
  return static_cast<std::int64_t>(status.outcome) + 8 * static_cast<std::int64_t>(status.peer);
}
