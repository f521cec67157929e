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
#include <new>
#include <string>
#include <string_view>

#include "ffi.h"
#include "matmul.h"
#include "operand.h"
#include "parallel.h"
#include "weight.h"

namespace gemma_ext {

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

void AddQuantize(Operand& q, int64_t cols, Floats x, Job& job,
                 int64_t pitch) {
  const int64_t n = q.n();
  if (pitch == 0) pitch = cols;
  // A few rows are not worth another thread.
  const int64_t each = std::max<int64_t>(1, 8192 / cols);
  job.Add(CeilDiv(n, each), [&q, x, n, each, pitch](int64_t i) {
    for (int64_t r = i * each; r < std::min(n, (i + 1) * each); ++r) {
      q.Quantize(x, r, r * pitch);
    }
  });
}

void AddMatmul(const Operand& q, const Weight& w, Floats y, int64_t threads,
               Job& job) {
  const int64_t rows = RowsOfPart(w, q.unit(), threads);
  job.Add(CeilDiv(w.rows, rows), [&q, &w, y, rows](int64_t i) {
    q.Multiply(i * rows, std::min(w.rows, (i + 1) * rows), y, w.rows);
  });
}

namespace {

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes,
                  ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> y,
                  int64_t layout, int64_t bits, int64_t planes, int64_t tied,
                  int64_t ternary, int64_t group, int64_t wide,
                  std::string_view named) {
  GX_CHECK(x.dimensions().size() == 2, "x is not [N, I]");
  GX_CHECK(y->dimensions().size() == 2, "y is not [N, O]");
  const int64_t n = x.dimensions()[0], cols = x.dimensions()[1];
  Weight w;
  GX_RETURN_IF(MakeWeight(codes, scale, y->dimensions()[1], cols,
                          {layout, bits, planes, tied, ternary, group}, &w));
  GX_CHECK(y->dimensions()[0] == n,
           Number("rows of x", n) + ", but y is another shape");
  Floats in, out;
  GX_RETURN_IF(MakeFloats(x, &in));
  GX_RETURN_IF(MakeFloats(*y, &out));
  if (n == 0 || w.rows == 0) return ffi::Error::Success();
  const Kernels* kernels;
  GX_RETURN_IF(Choose(named, &kernels));
  // Helpers that come late look at the job only, never at these.
  Operand q(*kernels, n, w, wide != 0);
  if (!q.ok()) return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                                 "no memory for activations");
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto job = std::make_shared<Job>();
  AddQuantize(q, cols, in, *job);
  AddMatmul(q, w, out, threads, *job);
  job->Run(threads, n <= kFew, [&pool](auto fn) { pool.Schedule(std::move(fn)); });
  return ffi::Error::Success();
}

// gelu(x G^T) * (x U^T), times D^T: `gate` holds the rows of G and then of U.
ffi::Error Gated(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate,
                 ffi::AnyBuffer gate_scale, ffi::AnyBuffer down,
                 ffi::AnyBuffer down_scale, ffi::Result<ffi::AnyBuffer> y,
                 ffi::Span<const int64_t> gate_format,
                 ffi::Span<const int64_t> down_format, int64_t hidden,
                 int64_t wide, std::string_view named) {
  GX_CHECK(x.dimensions().size() == 2, "x is not [N, I]");
  GX_CHECK(y->dimensions().size() == 2, "y is not [N, O]");
  const int64_t n = x.dimensions()[0], cols = x.dimensions()[1];
  GX_CHECK(0 < hidden && hidden < kMost, Number("hidden", hidden));
  Description d[2];
  GX_RETURN_IF(Describe(gate_format, &d[0]));
  GX_RETURN_IF(Describe(down_format, &d[1]));
  Weight up, out;
  GX_RETURN_IF(MakeWeight(gate, gate_scale, 2 * hidden, cols, d[0], &up));
  GX_RETURN_IF(
      MakeWeight(down, down_scale, y->dimensions()[1], hidden, d[1], &out));
  GX_CHECK(y->dimensions()[0] == n,
           Number("rows of x", n) + ", but y is another shape");
  Floats in, to;
  GX_RETURN_IF(MakeFloats(x, &in));
  GX_RETURN_IF(MakeFloats(*y, &to));
  if (n == 0 || out.rows == 0) return ffi::Error::Success();
  const Kernels* kernels;
  GX_RETURN_IF(Choose(named, &kernels));
  Operand q(*kernels, n, up, wide != 0), r(*kernels, n, out, wide != 0);
  std::unique_ptr<float[]> memory(new (std::nothrow) float[2 * n * hidden]);
  if (!q.ok() || !r.ok() || memory == nullptr) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "no memory for activations");
  }
  // [n, 2, hidden]; what is multiplied by D takes the place of x G^T.
  const Floats between{memory.get(), false};
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto job = std::make_shared<Job>();
  AddQuantize(q, cols, in, *job);
  AddMatmul(q, up, between, threads, *job);
  // As much of a row as is worth a thread.
  const int64_t size = 2048, each = CeilDiv(hidden, size);
  job->Add(n * each, [kernels, &between, hidden, each, size](int64_t i) {
    float* row = static_cast<float*>(between.data) + i / each * 2 * hidden;
    const int64_t begin = i % each * size;
    kernels->gated_gelu(row + begin, row + hidden + begin,
                        std::min(size, hidden - begin));
  });
  AddQuantize(r, hidden, between, *job, 2 * hidden);
  AddMatmul(r, out, to, threads, *job);
  job->Run(threads, n <= kFew, [&pool](auto fn) { pool.Schedule(std::move(fn)); });
  return ffi::Error::Success();
}

// Reads a buffer as fast as the memory allows, for benchmarks to compare with.
ffi::Error Read(ffi::ThreadPool pool, ffi::AnyBuffer x,
                ffi::Result<ffi::Buffer<ffi::DataType::U32>> y) {
  constexpr int64_t kPart = 1 << 20, kLanes = 16;
  const int64_t bytes = static_cast<int64_t>(x.size_bytes());
  const int64_t parts = CeilDiv(bytes, kPart);
  GX_CHECK(y->element_count() == 2, "y is not two words");
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
  job->Run(std::max<int64_t>(1, pool.num_threads()), false,
           [&pool](auto fn) { pool.Schedule(std::move(fn)); });
  const uint64_t sum = total;
  std::memcpy(y->typed_data(), &sum, sizeof(sum));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma_ext

#pragma GCC visibility push(default)

namespace ffi = xla::ffi;

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_ext_gated, gemma_ext::Gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("gate_format")
                                  .Attr<ffi::Span<const int64_t>>("down_format")
                                  .Attr<int64_t>("hidden")
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
