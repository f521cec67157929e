// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// What operations that XLA calls have in common: checks of what they are given,
// which kernels run.

#ifndef GEMMA_EXT_KERNELS_CPU_FFI_H_
#define GEMMA_EXT_KERNELS_CPU_FFI_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "weight.h"
#include "xla/ffi/api/ffi.h"

namespace gemma_ext {

namespace ffi = xla::ffi;

// What this machine runs of the kernels called `name`: them, or nothing.
const Kernels* Named(const std::string& name);

// The best that it runs, or what GEMMA_EXT_CPU_KERNELS names.
const Kernels& Best();

inline std::string Number(const char* name, int64_t value) {
  return std::string(name) + "=" + std::to_string(value);
}

inline ffi::Error Check(bool ok, const std::string& message) {
  return ok ? ffi::Error::Success() : ffi::Error::InvalidArgument(message);
}

// The message is made only where it is wanted: a block of a step of decoding
// checks a hundred things.
#define GX_CHECK(ok, message)                                    \
  do {                                                           \
    if (!(ok)) return ffi::Error::InvalidArgument(message);      \
  } while (false)

#define GX_RETURN_IF(expression)                     \
  do {                                               \
    if (ffi::Error found = (expression); found.failure()) return found; \
  } while (false)

inline ffi::Error MakeFloats(ffi::AnyBuffer buffer, Floats* out) {
  const ffi::DataType type = buffer.element_type();
  out->bf16 = type == ffi::DataType::BF16;
  out->data = buffer.untyped_data();
  GX_CHECK(out->bf16 || type == ffi::DataType::F32,
           "activations are neither float32 nor bfloat16");
  return ffi::Error::Success();
}

inline ffi::Error Choose(std::string_view named, const Kernels** to) {
  *to = named.empty() ? &Best() : Named(std::string(named));
  GX_CHECK(*to != nullptr,
           "this machine has no kernels " + std::string(named));
  return ffi::Error::Success();
}

// No size is larger.
inline constexpr int64_t kMost = int64_t{1} << 40;
// Rows of x up to which a call is one of many of a step of decoding.
inline constexpr int64_t kFew = 8;

// Sizes and layout of a weight, as the caller describes them.
struct Description {
  int64_t layout;
  int64_t bits;
  int64_t planes;
  int64_t tied;
  int64_t ternary;
  int64_t group;
};

inline ffi::Error Describe(ffi::Span<const int64_t> d, Description* to) {
  if (d.size() == 6) *to = {d[0], d[1], d[2], d[3], d[4], d[5]};
  GX_CHECK(d.size() == 6, "a format is not six numbers");
  return ffi::Error::Success();
}

// `codes` may go on after those of the weight.
inline ffi::Error MakeWeight(ffi::AnyBuffer codes, ffi::AnyBuffer scale,
                             int64_t rows, int64_t cols, const Description& d,
                             Weight* w) {
  GX_CHECK(0 < cols && cols < kMost, Number("cols", cols));
  GX_CHECK(0 <= rows && rows < kMost / cols, Number("rows", rows));
  GX_CHECK(0 < d.group && d.group <= cols && cols % d.group == 0,
           Number("group", d.group) + " does not divide " +
                         Number("cols", cols));
  GX_CHECK(0 <= d.layout && d.layout <= 4,
           Number("layout", d.layout));
  GX_CHECK(1 <= d.planes && d.planes <= 8,
           Number("planes", d.planes));
  w->layout = static_cast<Layout>(d.layout);
  w->cols = cols;
  w->group = d.group;
  w->planes = d.planes;
  w->ternary = d.ternary != 0;
  w->tied = d.tied != 0 && d.planes > 1;
  w->bits = d.bits;
  bool bits = true;
  switch (w->layout) {
    case Layout::kBytes:
      bits = d.bits == 8;
      break;
    case Layout::kFields:
      bits = d.bits == 2 || d.bits == 4;
      break;
    case Layout::kStream:
      bits = 3 <= d.bits && d.bits <= 7;
      break;
    case Layout::kTrits:
      bits = w->ternary;
      break;
    case Layout::kQuads:
      bits = w->ternary && cols % 4 == 0;
      break;
  }
  GX_CHECK(bits, Number("bits", d.bits));
  GX_CHECK(w->ternary ? w->layout != Layout::kBytes &&
                                      w->layout != Layout::kStream
                                : d.planes == 1,
           "planes and layout do not go together");
  // Sums of tied codes fit in a byte.
  GX_CHECK(!w->tied || d.planes <= 5, "more than 5 tied planes");
  const ffi::DataType type = scale.element_type();
  w->signed_scale = type == ffi::DataType::S8;
  w->byte_scale = w->signed_scale || type == ffi::DataType::U8;
  GX_CHECK(w->byte_scale || type == ffi::DataType::BF16,
           "scales are neither bfloat16 nor of one byte");
  const ffi::DataType code_type = codes.element_type();
  GX_CHECK(code_type == (w->layout == Layout::kBytes
                                       ? ffi::DataType::S8
                                       : ffi::DataType::U8),
           "codes are of the wrong type");
  w->rows = rows;
  w->LayOut();
  const int64_t needed = w->planes * rows * w->row_bytes();
  const int64_t bytes = static_cast<int64_t>(codes.size_bytes());
  GX_CHECK(bytes >= needed && bytes < kMost,
           Number("bytes of codes", bytes) + "; expected " +
                         std::to_string(needed));
  const int64_t scales = w->scale_planes() * w->rows * w->groups();
  GX_CHECK(static_cast<int64_t>(scale.element_count()) == scales,
            Number("scales", static_cast<int64_t>(scale.element_count())) +
                "; expected " + std::to_string(scales));
  w->codes = static_cast<const uint8_t*>(codes.untyped_data());
  w->scale = scale.untyped_data();
  return ffi::Error::Success();
}

}  // namespace gemma_ext

#endif  // GEMMA_EXT_KERNELS_CPU_FFI_H_
