// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// The operations, as XLA calls them. All sizes are checked before any pointer
// is moved by them.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "operand.h"
#include "parallel.h"
#include "weight.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace gemma_ext {

// What this machine runs of the kernels called `name`: them, or nothing.
const Kernels* Named(const std::string& name) {
  if (name == "portable") return &Portable();
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx2" && avx2) return &Avx2();
  if (name == "avx512" && avx2 && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni")) {
    return &Avx512();
  }
#endif
  return nullptr;
}

const Kernels& Best() {
  static const Kernels& kernels = []() -> const Kernels& {
    const char* named = std::getenv("GEMMA_EXT_CPU_KERNELS");
    for (const char* name : {named, "avx512", "avx2"}) {
      if (name == nullptr) continue;
      if (const Kernels* found = Named(name)) return *found;
    }
    return Portable();
  }();
  return kernels;
}

namespace {

constexpr int64_t kMost = int64_t{1} << 40;

// Sizes and layout of a weight, as the caller describes them.
struct Description {
  int64_t layout;
  int64_t bits;
  int64_t planes;
  int64_t tied;
  int64_t ternary;
  int64_t group;
};

std::string Number(const char* name, int64_t value) {
  return std::string(name) + "=" + std::to_string(value);
}

ffi::Error Check(bool ok, const std::string& message) {
  return ok ? ffi::Error::Success() : ffi::Error::InvalidArgument(message);
}

#define GX_RETURN_IF(expression)                     \
  do {                                               \
    if (ffi::Error found = (expression); found.failure()) return found; \
  } while (false)

// `codes` may go on after those of the weight.
ffi::Error MakeWeight(ffi::AnyBuffer codes, ffi::AnyBuffer scale, int64_t rows,
                      int64_t cols, const Description& d, Weight* w) {
  GX_RETURN_IF(Check(0 < cols && cols < kMost, Number("cols", cols)));
  GX_RETURN_IF(Check(0 <= rows && rows < kMost / cols, Number("rows", rows)));
  GX_RETURN_IF(Check(0 < d.group && d.group <= cols && cols % d.group == 0,
                     Number("group", d.group) + " does not divide " +
                         Number("cols", cols)));
  GX_RETURN_IF(Check(0 <= d.layout && d.layout <= 3,
                     Number("layout", d.layout)));
  GX_RETURN_IF(Check(1 <= d.planes && d.planes <= 8,
                     Number("planes", d.planes)));
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
  }
  GX_RETURN_IF(Check(bits, Number("bits", d.bits)));
  GX_RETURN_IF(Check(w->ternary ? w->layout != Layout::kBytes &&
                                      w->layout != Layout::kStream
                                : d.planes == 1,
                     "planes and layout do not go together"));
  // Sums of tied codes fit in a byte.
  GX_RETURN_IF(Check(!w->tied || d.planes <= 5, "more than 5 tied planes"));
  const ffi::DataType type = scale.element_type();
  w->byte_scale = type == ffi::DataType::U8;
  GX_RETURN_IF(Check(w->byte_scale || type == ffi::DataType::BF16,
                     "scales are neither bfloat16 nor uint8"));
  const ffi::DataType code_type = codes.element_type();
  GX_RETURN_IF(Check(code_type == (w->layout == Layout::kBytes
                                       ? ffi::DataType::S8
                                       : ffi::DataType::U8),
                     "codes are of the wrong type"));
  w->rows = rows;
  const int64_t needed = w->planes * rows * w->row_bytes();
  const int64_t bytes = static_cast<int64_t>(codes.size_bytes());
  GX_RETURN_IF(Check(bytes >= needed && bytes < kMost,
                     Number("bytes of codes", bytes) + "; expected " +
                         std::to_string(needed)));
  const int64_t scales = w->scale_planes() * w->rows * w->groups();
  GX_RETURN_IF(
      Check(static_cast<int64_t>(scale.element_count()) == scales,
            Number("scales", static_cast<int64_t>(scale.element_count())) +
                "; expected " + std::to_string(scales)));
  w->codes = static_cast<const uint8_t*>(codes.untyped_data());
  w->scale = scale.untyped_data();
  return ffi::Error::Success();
}

ffi::Error MakeFloats(ffi::AnyBuffer buffer, Floats* out) {
  const ffi::DataType type = buffer.element_type();
  out->bf16 = type == ffi::DataType::BF16;
  out->data = buffer.untyped_data();
  return Check(out->bf16 || type == ffi::DataType::F32,
               "activations are neither float32 nor bfloat16");
}

// Parts of about 64 KiB of codes, but several for each thread.
int64_t RowsOfPart(const Weight& w, int64_t unit, int64_t threads) {
  const int64_t rows =
      std::max(unit, 65536 / (w.planes * w.row_bytes()) / unit * unit);
  const int64_t even = CeilDiv(w.rows, 4 * threads);
  return std::min(rows, CeilDiv(even, unit) * unit);
}

// Adds the rounding of x to a job.
void AddQuantize(Operand& q, int64_t cols, Floats x, Job& job) {
  const int64_t n = q.n();
  // A few rows are not worth another thread.
  const int64_t each = std::max<int64_t>(1, 8192 / cols);
  job.Add(CeilDiv(n, each), [&q, x, n, each](int64_t i) {
    for (int64_t r = i * each; r < std::min(n, (i + 1) * each); ++r) {
      q.Quantize(x, r);
    }
  });
}

// Adds y = x W^T to a job, x rounded by then.
void AddMatmul(const Operand& q, const Weight& w, Floats y, int64_t threads,
               Job& job) {
  const int64_t rows = RowsOfPart(w, q.unit(), threads);
  job.Add(CeilDiv(w.rows, rows), [&q, &w, y, rows](int64_t i) {
    q.Multiply(i * rows, std::min(w.rows, (i + 1) * rows), y, w.rows);
  });
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes,
                  ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> y,
                  int64_t layout, int64_t bits, int64_t planes, int64_t tied,
                  int64_t ternary, int64_t group, int64_t wide,
                  std::string_view named) {
  GX_RETURN_IF(Check(x.dimensions().size() == 2, "x is not [N, I]"));
  GX_RETURN_IF(Check(y->dimensions().size() == 2, "y is not [N, O]"));
  const int64_t n = x.dimensions()[0], cols = x.dimensions()[1];
  Weight w;
  GX_RETURN_IF(MakeWeight(codes, scale, y->dimensions()[1], cols,
                          {layout, bits, planes, tied, ternary, group}, &w));
  GX_RETURN_IF(Check(y->dimensions()[0] == n,
                     Number("rows of x", n) + ", but y is another shape"));
  Floats in, out;
  GX_RETURN_IF(MakeFloats(x, &in));
  GX_RETURN_IF(MakeFloats(*y, &out));
  if (n == 0 || w.rows == 0) return ffi::Error::Success();
  const Kernels* chosen = named.empty() ? &Best() : Named(std::string(named));
  GX_RETURN_IF(Check(chosen != nullptr,
                     "this machine has no kernels " + std::string(named)));
  const Kernels& kernels = *chosen;
  // Helpers that come late look at the job only, never at these.
  Operand q(kernels, n, w, wide != 0);
  if (!q.ok()) return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                                 "no memory for activations");
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto job = std::make_shared<Job>();
  AddQuantize(q, cols, in, *job);
  AddMatmul(q, w, out, threads, *job);
  job->Run(threads, [&pool](auto fn) { pool.Schedule(std::move(fn)); });
  return ffi::Error::Success();
}

// Reads a buffer as fast as the memory allows, for benchmarks to compare with.
ffi::Error Read(ffi::ThreadPool pool, ffi::AnyBuffer x,
                ffi::Result<ffi::Buffer<ffi::DataType::U32>> y) {
  constexpr int64_t kPart = 1 << 20, kLanes = 16;
  const int64_t bytes = static_cast<int64_t>(x.size_bytes());
  const int64_t parts = CeilDiv(bytes, kPart);
  GX_RETURN_IF(Check(y->element_count() == 2, "y is not two words"));
  const char* data = static_cast<const char*>(x.untyped_data());
  std::atomic<uint64_t> total{0};
  auto job = std::make_shared<Job>();
  job->Add(parts, [&total, data, bytes](int64_t i) {
    const int64_t end = std::min(bytes, (i + 1) * kPart);
    uint64_t sums[kLanes] = {};
    for (int64_t at = i * kPart; at + 8 * kLanes <= end; at += 8 * kLanes) {
      uint64_t words[kLanes];
      std::memcpy(words, data + at, sizeof(words));
      for (int64_t k = 0; k < kLanes; ++k) sums[k] ^= words[k];
    }
    for (uint64_t sum : sums) total ^= sum;
  });
  job->Run(std::max<int64_t>(1, pool.num_threads()),
           [&pool](auto fn) { pool.Schedule(std::move(fn)); });
  const uint64_t sum = total;
  std::memcpy(y->typed_data(), &sum, sizeof(sum));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma_ext

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_ext_matmul, gemma_ext::Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layout")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("planes")
                                  .Attr<int64_t>("tied")
                                  .Attr<int64_t>("ternary")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("wide")
                                  .Attr<std::string_view>("kernels"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_ext_read, gemma_ext::Read,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::DataType::U32>>());

// Name of the kernels in use.
extern "C" const char* gemma_ext_kernels() { return gemma_ext::Best().name; }

// Whether this machine has kernels of a name.
extern "C" int gemma_ext_has_kernels(const char* name) {
  return gemma_ext::Named(name) != nullptr;
}

#pragma GCC visibility pop
