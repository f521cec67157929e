// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Attention of a few tokens, whose keys and values go into the cache first.

#include "attention.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <string_view>
#include <utility>

#include "ffi.h"
#include "parallel.h"
#include "weight.h"

namespace gemma_ext {
namespace {

constexpr int64_t kMost = int64_t{1} << 40;

template <typename Buffer>
bool HasShape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto found = buffer.dimensions();
  return std::equal(found.begin(), found.end(), shape.begin(), shape.end());
}

// `start` is a slot; the caches are written where they are.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                  ffi::AnyBuffer v, ffi::AnyBuffer cache_k,
                  ffi::AnyBuffer cache_v,
                  ffi::Buffer<ffi::DataType::S32> start,
                  ffi::Buffer<ffi::DataType::PRED> mask,
                  ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> new_k,
                  ffi::Result<ffi::AnyBuffer> new_v, float soft_cap,
                  std::string_view named) {
  const auto shape = q.dimensions();
  const auto cache_shape = cache_k.dimensions();
  GX_CHECK(shape.size() == 4, "q is not [B, T, N, H]");
  GX_CHECK(cache_shape.size() == 4, "a cache is not [B, S, K, H]");
  Attention a;
  a.batch = shape[0];
  a.tokens = shape[1];
  a.heads = shape[2];
  a.width = shape[3];
  a.slots = cache_shape[1];
  a.kv_heads = cache_shape[2];
  a.soft_cap = soft_cap;
  GX_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0,
           Number("heads", a.heads) + " of q, " +
               Number("heads", a.kv_heads) + " of k");
  GX_CHECK(a.width >= 32 && a.width % 16 == 0,
           Number("width of a head", a.width));
  for (ffi::AnyBuffer buffer : {k, v}) {
    GX_CHECK(
        HasShape(buffer, {a.batch, a.tokens, a.kv_heads, a.width}),
        "k or v is not [B, T, K, H]");
  }
  for (ffi::AnyBuffer buffer : {cache_k, cache_v, *new_k, *new_v}) {
    GX_CHECK(
        HasShape(buffer, {a.batch, a.slots, a.kv_heads, a.width}),
        "a cache is not [B, S, K, H]");
    GX_CHECK(buffer.element_type() == k.element_type(),
                       "keys and caches are of different types");
  }
  GX_CHECK(v.element_type() == k.element_type(),
           "keys and values are of different types");
  GX_CHECK(HasShape(*out, {a.batch, a.tokens, a.heads, a.width}),
           "the output is not [B, T, N, H]");
  GX_CHECK(HasShape(mask, {a.batch, a.tokens, a.slots}),
           "the mask is not [B, T, S]");
  GX_CHECK(start.element_count() == 1, "start is not one slot");
  GX_CHECK(a.tokens <= a.slots, "more tokens than slots");
  if (a.batch == 0 || a.tokens == 0) return ffi::Error::Success();
  Floats fresh_k, fresh_v;
  GX_RETURN_IF(MakeFloats(q, &a.q));
  GX_RETURN_IF(MakeFloats(*out, &a.out));
  GX_RETURN_IF(MakeFloats(k, &fresh_k));
  GX_RETURN_IF(MakeFloats(v, &fresh_v));
  GX_RETURN_IF(MakeFloats(*new_k, &a.k));
  GX_RETURN_IF(MakeFloats(*new_v, &a.v));
  const int64_t pairs = a.batch * a.kv_heads;
  const int64_t results = pairs * a.parts() * a.rows();
  GX_CHECK(results < kMost / a.pitch(), "too many rows");
  const Kernels* kernels;
  GX_RETURN_IF(Choose(named, &kernels));
  std::unique_ptr<float[]> memory(
      new (std::nothrow) float[results * a.pitch()]);
  if (memory == nullptr) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "no memory for attention");
  }
  a.partial = memory.get();
  a.mask = reinterpret_cast<const uint8_t*>(mask.typed_data());

  // XLA promises to give the caches back in their own memory; if it did not,
  // there is nothing in it yet.
  for (auto [from, to] : {std::pair{cache_k, *new_k}, {cache_v, *new_v}}) {
    if (from.untyped_data() != to.untyped_data()) {
      std::memcpy(to.untyped_data(), from.untyped_data(), from.size_bytes());
    }
  }
  // Nearest to where they are wanted.
  const int64_t slot = std::clamp<int64_t>(start.typed_data()[0], 0,
                                           a.slots - a.tokens);
  const int64_t bytes =
      a.tokens * a.kv_heads * a.width * (fresh_k.bf16 ? 2 : 4);
  const int64_t pitch = bytes / a.tokens * a.slots;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t at = b * pitch + bytes / a.tokens * slot;
    std::memcpy(static_cast<char*>(a.k.data) + at,
                static_cast<const char*>(fresh_k.data) + b * bytes, bytes);
    std::memcpy(static_cast<char*>(a.v.data) + at,
                static_cast<const char*>(fresh_v.data) + b * bytes, bytes);
  }

  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto job = std::make_shared<Job>();
  job->Add(pairs * a.parts(), [kernels, &a](int64_t i) {
    kernels->attend(a, i / a.parts(), i % a.parts());
  });
  // Work of a few microseconds.
  job->Add(pairs, [kernels, &a](int64_t i) {
    for (int64_t r = 0; r < a.rows(); ++r) kernels->combine(a, i, r);
  });
  job->Run(threads, true, [&pool](auto fn) { pool.Schedule(std::move(fn)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma_ext

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gemma_ext_attend, gemma_ext::Attend,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
        .Arg<xla::ffi::Buffer<xla::ffi::DataType::PRED>>()
        .Ret<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::AnyBuffer>()
        .Attr<float>("soft_cap")
        .Attr<std::string_view>("kernels"));

#pragma GCC visibility pop
