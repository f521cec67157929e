// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// What operations with packed weights are made of; see ops.cc.

#ifndef GEMMA_EXT_KERNELS_CPU_MATMUL_H_
#define GEMMA_EXT_KERNELS_CPU_MATMUL_H_

#include <cstdint>

#include "ffi.h"
#include "operand.h"
#include "parallel.h"
#include "weight.h"

namespace gemma_ext {

// Adds the rounding of x to a job; its rows are `pitch` apart, or `cols`.
void AddQuantize(Operand& q, int64_t cols, Floats x, Job& job,
                 int64_t pitch = 0);

// Adds y = x W^T to a job, x rounded by then.
void AddMatmul(const Operand& q, const Weight& w, Floats y, int64_t threads,
               Job& job);

}  // namespace gemma_ext

#endif  // GEMMA_EXT_KERNELS_CPU_MATMUL_H_
