// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Attention of a few tokens to keys and values in a cache.

#ifndef GEMMA_EXT_KERNELS_CPU_ATTENTION_H_
#define GEMMA_EXT_KERNELS_CPU_ATTENTION_H_

#include <cstdint>

#include "weight.h"

namespace gemma_ext {

// Slots of a cache that one part of the work reads.
inline constexpr int64_t kSlots = 256;  // at most

struct Attention {
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t width = 0;  // of a head, a multiple of 16
  int64_t slots = 0;
  int64_t each = kSlots;  // slots of a part
  float soft_cap = 0;  // 0 for none
  Floats q;    // [batch, tokens, heads, width]
  Floats k;    // [batch, slots, kv_heads, width]
  Floats v;
  Floats out;  // as q
  const uint8_t* mask = nullptr;  // [batch, tokens, slots]
  // Results of parts: largest logit, sum of exponentials, weighted values.
  float* partial = nullptr;  // [batch, kv_heads, parts, rows, width + 16]

  // Query heads of a key head, all tokens: rows that read the same keys.
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return tokens * group(); }
  int64_t parts() const { return CeilDiv(slots, each); }
  int64_t pitch() const { return width + 16; }
  float* result(int64_t pair, int64_t part, int64_t row) const {
    return partial + ((pair * parts() + part) * rows() + row) * pitch();
  }
  // Row `row` of a pair of sequence and key head, among [batch, tokens, heads].
  int64_t place(int64_t pair, int64_t row) const {
    const int64_t b = pair / kv_heads, head = pair % kv_heads;
    return (b * tokens + row / group()) * heads + head * group() +
           row % group();
  }
};

}  // namespace gemma_ext

#endif  // GEMMA_EXT_KERNELS_CPU_ATTENTION_H_
