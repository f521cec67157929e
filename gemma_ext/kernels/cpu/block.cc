// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// A whole transformer block for a few tokens: what lies between two products
// with weights takes microseconds, less than another thread takes to wake up.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <string_view>
#include <utility>

#include "attention.h"
#include "ffi.h"
#include "matmul.h"
#include "operand.h"
#include "parallel.h"
#include "weight.h"

namespace gemma_ext {
namespace {

constexpr int64_t kLargest = int64_t{1} << 32;

enum Argument {
  kX, kSin, kCos, kPositions, kMask, kCacheK, kCacheV, kCachePositions, kEnd,
  kNorms, kPreAttention = kNorms, kQuery, kKey, kPostAttention, kPreFfw,
  kPostFfw, kWeights,
};
enum Product { kQ, kKv, kOut, kGate, kDown, kProducts };
constexpr int64_t kArguments = kWeights + 2 * kProducts;

template <typename Buffer>
bool HasShape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto found = buffer.dimensions();
  return std::equal(found.begin(), found.end(), shape.begin(), shape.end());
}

// Everything that the parts of the job look at; it outlives them.
struct Block {
  const Kernels* kernels;
  int64_t batch, tokens, heads, kv_heads, width, slots, features, hidden;
  int64_t window = 0;  // 0 for none
  int64_t slot = 0;    // of the first new token
  float query_scale = 1;
  float more = 0;  // what is added to the scales of norms
  Floats x, y;
  std::array<Floats, kWeights - kNorms> norms;
  const float* sin;
  const float* cos;
  const int32_t* positions;
  int32_t* cache_positions;
  const uint8_t* allowed;
  Attention attention;
  std::array<Weight, kProducts> weights;
  std::array<std::unique_ptr<Operand>, kProducts> operands;
  // Of every token.
  float *q, *kv, *mixed, *residual, *between, *out;
  uint8_t* mask;

  int64_t count() const { return batch * tokens; }
  bool has(Argument norm) const {
    return norms[norm - kNorms].data != nullptr;
  }

  void Norm(Argument norm, const float* from, int64_t size, float* to) const {
    kernels->norm(norms[norm - kNorms], more, from, size, to);
  }

  void Read(int64_t n, float* to) const {
    for (int64_t i = 0; i < features; ++i) to[i] = x.Load(n * features + i);
  }

  // Rounds the normalised x for one of its products.
  void Begin(Product product, int64_t n) {
    thread_local Scratch memory;
    float* row = static_cast<float*>(memory.Get(2 * features * sizeof(float)));
    Read(n, row);
    Norm(kPreAttention, row, features, row + features);
    operands[product]->Quantize({row + features, false}, n, 0);
  }

  // A part of a product; y is [count, rows].
  void Multiply(Product product, int64_t begin, int64_t end, float* to) const {
    operands[product]->Multiply(begin, end, {to, false},
                                weights[product].rows);
  }

  // A head of a query or of a key and its value.
  void Turn(int64_t n, int64_t head) const {
    const float* s = sin + n * (width / 2);
    const float* c = cos + n * (width / 2);
    if (head < heads) {
      float* at = q + (n * heads + head) * width;
      if (has(kQuery)) Norm(kQuery, at, width, at);
      return kernels->rope(at, s, c, width, query_scale);
    }
    head -= heads;
    float* k = kv + (n * 2 * kv_heads + head) * width;
    const float* v = k + kv_heads * width;
    if (has(kKey)) Norm(kKey, k, width, k);
    kernels->rope(k, s, c, width, 1);
    const int64_t b = n / tokens, t = n % tokens;
    const int64_t to =
        ((b * slots + slot + t) * kv_heads + head) * width;
    for (int64_t i = 0; i < width; ++i) attention.k.Store(to + i, k[i]);
    for (int64_t i = 0; i < width; ++i) attention.v.Store(to + i, v[i]);
  }

  // What the tokens of a sequence attend to.
  void Look(int64_t b) const {
    int32_t* held = cache_positions + b * slots;
    const int32_t* own = positions + b * tokens;
    std::copy_n(own, tokens, held + slot);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = (b * tokens + t) * slots;
      if (window == 0) {
        std::memcpy(mask + at, allowed + at, slots);
        continue;
      }
      const int32_t here = own[t], size = static_cast<int32_t>(window);
      for (int64_t s = 0; s < slots; ++s) {
        const bool near = held[s] > here - size && held[s] < here + size;
        mask[at + s] = allowed[at + s] & static_cast<uint8_t>(near);
      }
    }
  }

  // Sums up what a token attends to, and rounds it.
  void Mix(int64_t n) {
    const int64_t b = n / tokens, t = n % tokens, group = attention.group();
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (int64_t r = t * group; r < (t + 1) * group; ++r) {
        kernels->combine(attention, b * kv_heads + head, r);
      }
    }
    const int64_t size = heads * width;
    operands[kOut]->Quantize({mixed, false}, n, n * size);
  }

  // From attention to the feed-forward layer.
  void Between(int64_t n) {
    thread_local Scratch memory;
    float* row = static_cast<float*>(memory.Get(2 * features * sizeof(float)));
    float* sum = residual + n * features;
    float* from = out + n * features;
    Read(n, row);
    if (has(kPostAttention)) Norm(kPostAttention, from, features, from);
    for (int64_t i = 0; i < features; ++i) sum[i] = from[i] + row[i];
    Norm(kPreFfw, sum, features, row);
    operands[kGate]->Quantize({row, false}, n, 0);
  }

  // Hidden activations in [begin, end), of all tokens.
  void Hidden(int64_t begin, int64_t end) const {
    Multiply(kGate, begin, end, between);
    Multiply(kGate, hidden + begin, hidden + end, between);
    for (int64_t n = 0; n < count(); ++n) {
      float* row = between + n * 2 * hidden;
      kernels->gated_gelu(row + begin, row + hidden + begin, end - begin);
    }
  }

  void End(int64_t n) const {
    float* from = out + n * features;
    if (has(kPostFfw)) Norm(kPostFfw, from, features, from);
    for (int64_t i = 0; i < features; ++i) {
      y.Store(n * features + i, from[i] + residual[n * features + i]);
    }
  }

  void AddTo(Job& job, int64_t threads) {
    const int64_t n = count();
    job.Add(2 * n, [this](int64_t i) {
      Begin(i % 2 ? kKv : kQ, i / 2);
    });
    const int64_t q_rows = weights[kQ].rows, kv_rows = weights[kKv].rows;
    const int64_t each = std::min(RowsOfPart(weights[kQ], 4, threads),
                                  RowsOfPart(weights[kKv], 4, threads));
    const int64_t first = CeilDiv(q_rows, each);
    job.Add(first + CeilDiv(kv_rows, each),
            [this, first, each, q_rows, kv_rows](int64_t i) {
              const bool is_q = i < first;
              const int64_t begin = (is_q ? i : i - first) * each;
              const int64_t end =
                  std::min(is_q ? q_rows : kv_rows, begin + each);
              Multiply(is_q ? kQ : kKv, begin, end, is_q ? q : kv);
            });
    const int64_t all = heads + kv_heads;
    job.Add(batch + n * all, [this, all](int64_t i) {
      i < batch ? Look(i) : Turn((i - batch) / all, (i - batch) % all);
    });
    const int64_t parts = attention.parts();
    job.Add(batch * kv_heads * parts, [this, parts](int64_t i) {
      kernels->attend(attention, i / parts, i % parts);
    });
    job.Add(n, [this](int64_t i) { Mix(i); });
    AddProduct(kOut, threads, job);
    job.Add(n, [this](int64_t i) { Between(i); });
    // Gate and up together.
    const int64_t some = std::max<int64_t>(
        8, RowsOfPart(weights[kGate], 8, threads) / 2);
    job.Add(CeilDiv(hidden, some), [this, some](int64_t i) {
      Hidden(i * some, std::min(hidden, (i + 1) * some));
    });
    job.Add(n, [this](int64_t i) {
      operands[kDown]->Quantize({between, false}, i, i * 2 * hidden);
    });
    AddProduct(kDown, threads, job);
    job.Add(n, [this](int64_t i) { End(i); });
  }

  void AddProduct(Product product, int64_t threads, Job& job) {
    const int64_t rows = weights[product].rows;
    const int64_t each = RowsOfPart(weights[product], 4, threads);
    job.Add(CeilDiv(rows, each), [this, product, rows, each](int64_t i) {
      Multiply(product, i * each, std::min(rows, (i + 1) * each), out);
    });
  }
};

ffi::Error Run(ffi::ThreadPool pool, ffi::RemainingArgs args,
               ffi::RemainingRets rets, ffi::Span<const int64_t> formats,
               int64_t heads, int64_t hidden, int64_t window,
               float query_scale, float soft_cap, float more,
               std::string_view named) {
  GX_CHECK(args.size() == kArguments && rets.size() == 5,
           "a block has 25 arguments and 5 results");
  std::array<ffi::AnyBuffer, kArguments> in = [&]<size_t... i>(
      std::index_sequence<i...>) {
    return std::array<ffi::AnyBuffer, kArguments>{
        *args.get<ffi::AnyBuffer>(i)...};
  }(std::make_index_sequence<kArguments>());
  std::array<ffi::AnyBuffer, 5> result = [&]<size_t... i>(
      std::index_sequence<i...>) {
    return std::array<ffi::AnyBuffer, 5>{**rets.get<ffi::AnyBuffer>(i)...};
  }(std::make_index_sequence<5>());
  Block block;
  const auto shape = in[kX].dimensions(), cache = in[kCacheK].dimensions();
  GX_CHECK(shape.size() == 3, "x is not [B, T, D]");
  GX_CHECK(cache.size() == 4, "a cache is not [B, S, K, H]");
  block.batch = shape[0];
  block.tokens = shape[1];
  block.features = shape[2];
  block.slots = cache[1];
  block.kv_heads = cache[2];
  block.width = cache[3];
  block.heads = heads;
  block.hidden = hidden;
  block.window = window;
  block.query_scale = query_scale;
  block.more = more;
  const int64_t n = block.count(), width = block.width;
  const int64_t features = block.features, slots = block.slots;
  GX_CHECK(0 < n && n <= kFew, Number("tokens", n));
  GX_CHECK(block.tokens <= slots, "more tokens than slots");
  GX_CHECK(width >= 32 && width % 32 == 0,
           Number("width of a head", width));
  GX_CHECK(block.kv_heads > 0 && 0 < heads && heads < 1 << 16 &&
                         heads % block.kv_heads == 0,
           Number("heads", heads) + " of q, " +
               Number("heads", block.kv_heads) + " of k");
  GX_CHECK(0 < hidden && hidden < kLargest && hidden % 8 == 0,
           Number("hidden", hidden));
  GX_CHECK(0 <= window && window < kLargest / 4,
           Number("window", window));
  GX_CHECK(features < kLargest && width < 1 << 16 && slots < kLargest,
           "sizes beyond all bounds");
  const int64_t b = block.batch, t = block.tokens;
  for (Argument each : {kSin, kCos}) {
    GX_CHECK(HasShape(in[each], {b, t, width / 2}) &&
                  in[each].element_type() == ffi::DataType::F32,
              "sines are not float32[B, T, H / 2]");
  }
  GX_CHECK(HasShape(in[kPositions], {b, t}) &&
                         in[kPositions].element_type() == ffi::DataType::S32,
           "positions are not int32[B, T]");
  GX_CHECK(HasShape(in[kMask], {b, t, slots}) &&
                         in[kMask].element_type() == ffi::DataType::PRED,
           "the mask is not bool[B, T, S]");
  GX_CHECK(HasShape(in[kEnd], {b}) && HasShape(result[4], {b}) &&
                         in[kEnd].element_type() == ffi::DataType::S32 &&
                         result[4].element_type() == ffi::DataType::S32,
           "end_index is not int32[B]");
  for (ffi::AnyBuffer each : {in[kCachePositions], result[3]}) {
    GX_CHECK(HasShape(each, {b, slots}) &&
                           each.element_type() == ffi::DataType::S32,
                       "positions of a cache are not int32[B, S]");
  }
  const ffi::DataType type = in[kCacheK].element_type();
  for (ffi::AnyBuffer each : {in[kCacheK], in[kCacheV], result[1], result[2]}) {
    GX_CHECK(HasShape(each, {b, slots, block.kv_heads, width}) &&
                           each.element_type() == type,
                       "a cache is not [B, S, K, H]");
  }
  GX_CHECK(HasShape(result[0], {b, t, features}),
           "the result is not [B, T, D]");
  GX_RETURN_IF(MakeFloats(in[kX], &block.x));
  GX_RETURN_IF(MakeFloats(result[0], &block.y));
  for (int64_t i = kNorms; i < kWeights; ++i) {
    Floats& norm = block.norms[i - kNorms];
    GX_RETURN_IF(MakeFloats(in[i], &norm));
    const int64_t size = i == kQuery || i == kKey ? width : features;
    if (in[i].element_count() == 0 && i != kPreAttention && i != kPreFfw) {
      norm.data = nullptr;
      continue;
    }
    GX_CHECK(HasShape(in[i], {size}), "a norm of the wrong size");
  }
  GX_CHECK(formats.size() == 7 * kProducts,
           "a format is not seven numbers");
  const int64_t inner = heads * width;
  const int64_t sizes[kProducts][2] = {
      {inner, features},
      {2 * block.kv_heads * width, features},
      {features, inner},
      {2 * hidden, features},
      {features, hidden},
  };
  GX_RETURN_IF(Choose(named, &block.kernels));
  for (int64_t i = 0; i < kProducts; ++i) {
    const int64_t* f = formats.begin() + 7 * i;
    GX_RETURN_IF(MakeWeight(in[kWeights + 2 * i], in[kWeights + 2 * i + 1],
                            sizes[i][0], sizes[i][1],
                            {f[0], f[1], f[2], f[3], f[4], f[5]},
                            &block.weights[i]));
    block.operands[i] = std::make_unique<Operand>(
        *block.kernels, n, block.weights[i], f[6] != 0);
    if (!block.operands[i]->ok()) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                        "no memory for activations");
    }
  }

  Attention& a = block.attention;
  a.batch = b;
  a.tokens = t;
  a.heads = heads;
  a.kv_heads = block.kv_heads;
  a.width = width;
  a.slots = slots;
  a.soft_cap = soft_cap;
  a.each = slots > 2048 ? kSlots : kSlots / 4;
  GX_RETURN_IF(MakeFloats(result[1], &a.k));
  GX_RETURN_IF(MakeFloats(result[2], &a.v));
  const int64_t partial =
      b * block.kv_heads * a.parts() * a.rows() * a.pitch();
  const int64_t floats = partial + n * (2 * inner + 2 * block.kv_heads * width +
                                        2 * features + 2 * hidden);
  std::unique_ptr<float[]> memory(new (std::nothrow) float[floats]);
  std::unique_ptr<uint8_t[]> mask(new (std::nothrow) uint8_t[n * slots]);
  if (memory == nullptr || mask == nullptr) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "no memory for a block");
  }
  float* at = memory.get();
  auto take = [&at](int64_t count) { return std::exchange(at, at + count); };
  a.partial = take(partial);
  block.q = take(n * inner);
  block.mixed = take(n * inner);
  block.kv = take(n * 2 * block.kv_heads * width);
  block.residual = take(n * features);
  block.out = take(n * features);
  block.between = take(n * 2 * hidden);
  block.mask = mask.get();
  a.q = {block.q, false};
  a.out = {block.mixed, false};
  a.mask = block.mask;
  block.sin = static_cast<const float*>(in[kSin].untyped_data());
  block.cos = static_cast<const float*>(in[kCos].untyped_data());
  block.positions =
      static_cast<const int32_t*>(in[kPositions].untyped_data());
  block.cache_positions = static_cast<int32_t*>(result[3].untyped_data());
  block.allowed = static_cast<const uint8_t*>(in[kMask].untyped_data());

  // XLA promises to give the caches back in their own memory; if it did not,
  // there is nothing in it yet.
  for (auto [from, to] :
       {std::pair{in[kCacheK], result[1]}, {in[kCacheV], result[2]},
        {in[kCachePositions], result[3]}}) {
    if (from.untyped_data() != to.untyped_data()) {
      std::memcpy(to.untyped_data(), from.untyped_data(), from.size_bytes());
    }
  }
  const int32_t* end = static_cast<const int32_t*>(in[kEnd].untyped_data());
  // As the official code has it: modulo the slots, then where all fit.
  const int64_t start = ((end[0] % slots) + slots) % slots;
  block.slot = std::min(start, slots - t);
  int32_t* next = static_cast<int32_t*>(result[4].untyped_data());
  for (int64_t i = 0; i < b; ++i) next[i] = end[i] + static_cast<int32_t>(t);

  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto job = std::make_shared<Job>();
  block.AddTo(*job, threads);
  job->Run(threads, true, [&pool](auto fn) { pool.Schedule(std::move(fn)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma_ext

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    gemma_ext_block, gemma_ext::Run,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::ThreadPool>()
        .RemainingArgs()
        .RemainingRets()
        .Attr<xla::ffi::Span<const int64_t>>("formats")
        .Attr<int64_t>("heads")
        .Attr<int64_t>("hidden")
        .Attr<int64_t>("window")
        .Attr<float>("query_scale")
        .Attr<float>("soft_cap")
        .Attr<float>("more")
        .Attr<std::string_view>("kernels"));

#pragma GCC visibility pop
