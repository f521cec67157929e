// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// For every machine that a compiler knows, Arm among them.

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "weight.h"

namespace gemma_ext {
namespace portable {
#include "portable.inc"
#include "vector.inc"
#include "attention.inc"
#include "sum_rows.inc"
}  // namespace portable

const Kernels& Portable() {
  static const Kernels kernels = {
      .name = "portable",
      .split = false,
      .gathers = false,
      .few = 0,
      .quantize = portable::Quantize,
      .one_fits = nullptr,
      .quantize_one = nullptr,
      .one = nullptr,
      .sum_rows = portable::SumPlainRows,
      .norm = portable::Norm,
      .rope = portable::Rope,
      .gated_gelu = portable::GatedGelu,
      .attend = portable::Attend,
      .combine = portable::CombineParts,
      .rows = portable::Rows,
      .tile = nullptr,
  };
  return kernels;
}

}  // namespace gemma_ext
