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

#define GX_RETURN_IF(expression)                     \
  do {                                               \
    if (ffi::Error found = (expression); found.failure()) return found; \
  } while (false)

inline ffi::Error MakeFloats(ffi::AnyBuffer buffer, Floats* out) {
  const ffi::DataType type = buffer.element_type();
  out->bf16 = type == ffi::DataType::BF16;
  out->data = buffer.untyped_data();
  return Check(out->bf16 || type == ffi::DataType::F32,
               "activations are neither float32 nor bfloat16");
}

inline ffi::Error Choose(std::string_view named, const Kernels** to) {
  *to = named.empty() ? &Best() : Named(std::string(named));
  return Check(*to != nullptr,
               "this machine has no kernels " + std::string(named));
}

}  // namespace gemma_ext

#endif  // GEMMA_EXT_KERNELS_CPU_FFI_H_
