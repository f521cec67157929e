// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Kernels for AVX2 and FMA (Haswell, Zen and newer).

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <limits>

#include <immintrin.h>

#include "attention.h"
#include "weight.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), \
                             apply_to = function)
#else
// After the headers: what they define may be shared with other files.
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace gemma_ext {
namespace avx2 {
#include "portable.inc"
#include "vector.inc"
#include "attention.inc"
#include "sum_rows.inc"
#include "avx2_rows.inc"
}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels& Avx2() {
  static const Kernels kernels = {
      .name = "avx2",
      .split = false,
      .gathers = false,
      .few = 0,
      .quantize = avx2::Quantize,
      .one_fits = nullptr,
      .quantize_one = nullptr,
      .one = nullptr,
      .sum_rows = avx2::SumRowsWide,
      .norm = avx2::Norm,
      .rope = avx2::Rope,
      .gated_gelu = avx2::GatedGelu,
      .attend = avx2::Attend,
      .combine = avx2::CombineParts,
      .rows = avx2::RowsWide,
      .tile = nullptr,
  };
  return kernels;
}

}  // namespace gemma_ext

#endif  // defined(__x86_64__)
