// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Columns of a matrix in another order, on all threads.

#include <algorithm>
#include <cstdint>
#include <memory>

#include "ffi.h"
#include "parallel.h"

namespace gemma_ext {
namespace {

// Elements that are worth a thread.
constexpr int64_t kPart = 16384;

template <typename T>
void Move(const T* x, const int32_t* places, T* y, int64_t begin, int64_t end,
          int32_t last) {
  for (int64_t i = begin; i < end; ++i) {
    // Out of bounds is the nearest place that there is.
    y[i] = x[std::clamp(places[i], 0, last)];
  }
}

ffi::Error Pick(ffi::ThreadPool pool, ffi::AnyBuffer x,
                ffi::Buffer<ffi::DataType::S32> places,
                ffi::Result<ffi::AnyBuffer> y) {
  GX_CHECK(x.dimensions().size() == 2, "x is not [N, I]");
  GX_CHECK(places.dimensions().size() == 1, "places are not [O]");
  GX_CHECK(y->dimensions().size() == 2, "y is not [N, O]");
  const int64_t n = x.dimensions()[0], cols = x.dimensions()[1];
  const int64_t count = places.dimensions()[0];
  GX_CHECK(y->dimensions()[0] == n && y->dimensions()[1] == count,
           "y is not a row for each of x and a column for each place");
  GX_CHECK(0 < cols && cols < (int64_t{1} << 31), Number("cols", cols));
  GX_CHECK(y->element_type() == x.element_type(), "y is of another type");
  const ffi::DataType type = x.element_type();
  const bool half = type == ffi::DataType::BF16;
  GX_CHECK(half || type == ffi::DataType::F32,
           "x is neither float32 nor bfloat16");
  if (n == 0 || count == 0) return ffi::Error::Success();
  const void* from = x.untyped_data();
  void* to = y->untyped_data();
  const int32_t* place = places.typed_data();
  const int64_t parts = CeilDiv(count, kPart);
  auto job = std::make_shared<Job>();
  job->Add(n * parts, [=](int64_t i) {
    const int64_t row = i / parts, begin = i % parts * kPart;
    const int64_t end = std::min(count, begin + kPart);
    const int32_t last = static_cast<int32_t>(cols - 1);
    if (half) {
      Move(static_cast<const uint16_t*>(from) + row * cols, place,
           static_cast<uint16_t*>(to) + row * count, begin, end, last);
    } else {
      Move(static_cast<const float*>(from) + row * cols, place,
           static_cast<float*>(to) + row * count, begin, end, last);
    }
  });
  job->Run(std::max<int64_t>(1, pool.num_threads()), n <= kFew,
           [&pool](auto fn) { pool.Schedule(std::move(fn)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma_ext

#pragma GCC visibility push(default)

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_ext_pick, gemma_ext::Pick,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()
                                  .Ret<ffi::AnyBuffer>());

#pragma GCC visibility pop
