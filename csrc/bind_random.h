// The part of the module that bind_random.cpp defines.
#pragma once

#include <nanobind/nanobind.h>

void bind_random(nanobind::module_& m);
