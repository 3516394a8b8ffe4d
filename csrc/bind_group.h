// The part of the module that bind_group.cpp defines.
#pragma once

#include <nanobind/nanobind.h>

void bind_group(nanobind::module_& m);
