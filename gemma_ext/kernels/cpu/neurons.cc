// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Gated feed-forward layers of which every row of x runs through the neurons
// that its gates choose. All rows of the gate are read, and of the other two
// matrices the rows of the chosen neurons alone: the down projection is stored
// by neuron.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ffi.h"
#include "matmul.h"
#include "operand.h"
#include "parallel.h"
#include "weight.h"

namespace gemma_ext {
namespace {

// Sums of down projections that are added up in the end; a number of its own,
// so that results do not depend on the number of threads.
constexpr int64_t kSums = 8;
// Biases of experts that are not there are below it.
constexpr float kDead = -5e8f;

// The arguments of a call, checked.
struct Neurons {
  const Kernels* kernels = nullptr;
  bool wide = true;
  int64_t shared = 0;   // neurons that always run, before those of the experts
  int64_t experts = 0;
  int64_t size = 0;     // neurons of an expert
  Weight gate, up, down;
  Floats x, y;
  const float* norms = nullptr;  // [hidden]
  const float* bias = nullptr;   // [experts]
  int64_t k = 0;
  float threshold = 0;  // of logits

  int64_t hidden() const { return shared + experts * size; }
};

// What is known of one row of x.
struct Row {
  std::unique_ptr<Operand> x;
  float* gates;    // [hidden]
  float* norms;    // [hidden], of what neurons add; then gates of the chosen
  float* up;       // [hidden]: of the chosen, then what D multiplies
  float* keys;     // [experts]
  float* sums;     // [kSums, rows of y]
  int64_t* chosen;  // [hidden]
  int64_t count = 0;
};

inline uint32_t Bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}

// The k-th largest of numbers that are not negative.
uint32_t Kth(const float* keys, int64_t count, int64_t k) {
  // Their bits are in the same order. First the leading ones.
  constexpr int kShift = 20;
  thread_local std::vector<int32_t> bins;
  thread_local std::vector<uint32_t> left;
  bins.assign(size_t{1} << (32 - kShift), 0);
  for (int64_t i = 0; i < count; ++i) ++bins[Bits(keys[i]) >> kShift];
  size_t bin = bins.size();
  int64_t above = 0;
  while (bin-- > 0 && above + bins[bin] < k) above += bins[bin];
  left.clear();
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = Bits(keys[i]);
    if (bits >> kShift == bin) left.push_back(bits);
  }
  const auto nth = left.begin() + (k - above - 1);
  std::nth_element(left.begin(), nth, left.end(), std::greater<>());
  return *nth;
}

// Writes the numbers of the neurons of the experts that a row gets.
void Select(const Neurons& e, Row& row) {
  // Exponentials of logits, which are in the same order.
  int64_t there = 0;
  for (int64_t i = 0; i < e.experts; ++i) {
    const float* v = row.norms + e.shared + i * e.size;
    float sum = 0;
    for (int64_t j = 0; j < e.size; ++j) sum += v[j] * v[j];
    float key = sum + 1e-20f;
    if (e.bias[i] != 0) key *= std::exp(e.bias[i]);
    if (e.bias[i] <= kDead) {
      key = 0;
    } else {
      ++there;
    }
    row.keys[i] = key;
  }
  uint32_t least = 0;
  if (there > e.k) least = Kth(row.keys, e.experts, e.k);
  const float floor = std::exp(e.threshold);
  row.count = e.shared;
  for (int64_t i = 0; i < e.shared; ++i) row.chosen[i] = i;
  for (int64_t i = 0; i < e.experts; ++i) {
    // What is not a number shall be seen in the output.
    if (Bits(row.keys[i]) < least || row.keys[i] <= floor ||
        e.bias[i] <= kDead) {
      continue;
    }
    for (int64_t j = 0; j < e.size; ++j) {
      row.chosen[row.count++] = e.shared + i * e.size + j;
    }
  }
}

// What neurons [begin, end) of the chosen ones are multiplied by.
void Activate(const Neurons& e, Row& row, int64_t begin, int64_t end) {
  const int64_t* chosen = row.chosen;
  row.x->Multiply(e.up.PickRows(chosen, row.count), begin, end,
                  {row.up, false}, 0);
  float* gates = row.norms + begin;
  for (int64_t i = begin; i < end; ++i) {
    gates[i - begin] = row.gates[chosen[i]];
  }
  e.kernels->gated_gelu(gates, row.up + begin, end - begin);
  std::copy_n(gates, end - begin, row.up + begin);
}

ffi::Error Part(const Neurons& e, int64_t start, int64_t n, int64_t threads,
                const std::function<void(std::function<void()>)>& schedule) {
  const int64_t hidden = e.hidden(), outs = e.down.cols;
  const int64_t floats = 3 * hidden + e.experts + kSums * outs;
  std::unique_ptr<float[]> memory(new (std::nothrow) float[n * floats]);
  std::unique_ptr<int64_t[]> numbers(new (std::nothrow) int64_t[n * hidden]);
  bool ok = memory != nullptr && numbers != nullptr;
  std::vector<Row> rows(n);
  for (int64_t t = 0; ok && t < n; ++t) {
    Row& row = rows[t];
    row.x = std::make_unique<Operand>(*e.kernels, 1, e.gate, e.wide);
    ok = row.x->ok();
    row.gates = memory.get() + t * floats;
    row.norms = row.gates + hidden;
    row.up = row.norms + hidden;
    row.keys = row.up + hidden;
    row.sums = row.keys + e.experts;
    row.chosen = numbers.get() + t * hidden;
  }
  if (!ok) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "no memory for activations");
  }
  // Helpers that come late look at the job only, never at what is here.
  auto job = std::make_shared<Job>();
  job->Add(n, [&](int64_t t) {
    rows[t].x->Quantize(e.x, 0, (start + t) * e.gate.cols);
  });
  const int64_t each = RowsOfPart(e.gate, rows[0].x->unit(), threads);
  const int64_t blocks = CeilDiv(hidden, each);
  job->Add(n * blocks, [&, each, blocks, hidden](int64_t i) {
    Row& row = rows[i / blocks];
    const int64_t begin = i % blocks * each;
    const int64_t end = std::min(hidden, begin + each);
    row.x->Multiply(e.gate, begin, end, {row.gates, false}, hidden);
    std::copy(row.gates + begin, row.gates + end, row.norms + begin);
    e.kernels->gated_gelu(row.norms + begin, e.norms + begin, end - begin);
  });
  job->Add(n, [&](int64_t t) { Select(e, rows[t]); });
  const int64_t parts = 8 * threads;
  job->Add(n * parts, [&, parts](int64_t i) {
    Row& row = rows[i / parts];
    const int64_t part = i % parts;
    Activate(e, row, part * row.count / parts, (part + 1) * row.count / parts);
  });
  job->Add(n * kSums, [&, outs](int64_t i) {
    Row& row = rows[i / kSums];
    const int64_t begin = i % kSums * row.count / kSums;
    const int64_t end = (i % kSums + 1) * row.count / kSums;
    float* to = row.sums + i % kSums * outs;
    std::fill_n(to, outs, 0.0f);
    e.kernels->sum_rows(e.down, row.chosen + begin, row.up + begin,
                        end - begin, to);
  });
  job->Add(n, [&, outs](int64_t t) {
    float* total = rows[t].sums;
    for (int64_t s = 1; s < kSums; ++s) {
      const float* from = total + s * outs;
      for (int64_t i = 0; i < outs; ++i) total[i] += from[i];
    }
    const Floats y = e.y.From((start + t) * outs);
    for (int64_t i = 0; i < outs; ++i) y.Store(i, total[i]);
  });
  job->Run(threads, n <= kFew, schedule);
  return ffi::Error::Success();
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate,
               ffi::AnyBuffer gate_scale, ffi::AnyBuffer down,
               ffi::AnyBuffer down_scale, ffi::Buffer<ffi::DataType::F32> norms,
               ffi::Buffer<ffi::DataType::F32> bias,
               ffi::Buffer<ffi::DataType::S32> k,
               ffi::Buffer<ffi::DataType::F32> threshold,
               ffi::Result<ffi::AnyBuffer> y,
               ffi::Span<const int64_t> gate_format,
               ffi::Span<const int64_t> down_format,
               ffi::Span<const int64_t> cut, int64_t wide,
               std::string_view named) {
  GX_CHECK(x.dimensions().size() == 2, "x is not [N, I]");
  GX_CHECK(y->dimensions().size() == 2, "y is not [N, O]");
  GX_CHECK(cut.size() == 3, "the cut is not three numbers");
  const int64_t n = x.dimensions()[0];
  Neurons e;
  e.wide = wide != 0;
  GX_CHECK(0 < cut[2] && cut[2] < kMost, Number("size", cut[2]));
  GX_CHECK(0 < cut[1] && cut[1] < kMost / 4, Number("experts", cut[1]));
  GX_CHECK(0 <= cut[0] && cut[0] < kMost / 4, Number("shared", cut[0]));
  GX_CHECK(cut[0] + cut[1] < kMost / 2 / cut[2],
           Number("slices", cut[0] + cut[1]));
  e.shared = cut[0] * cut[2];
  e.experts = cut[1];
  e.size = cut[2];
  const int64_t hidden = e.hidden();
  Description of_gate, of_down;
  GX_RETURN_IF(Describe(gate_format, &of_gate));
  GX_RETURN_IF(Describe(down_format, &of_down));
  Weight both;
  GX_RETURN_IF(MakeWeight(gate, gate_scale, 2 * hidden, x.dimensions()[1],
                          of_gate, &both));
  GX_RETURN_IF(MakeWeight(down, down_scale, hidden, y->dimensions()[1],
                          of_down, &e.down));
  e.gate = both.SliceRows(0, hidden);
  e.up = both.SliceRows(hidden, hidden);
  GX_CHECK(y->dimensions()[0] == n,
           Number("rows of x", n) + ", but y is another shape");
  GX_CHECK(static_cast<int64_t>(norms.element_count()) == hidden,
           "norms are not [H]");
  GX_CHECK(static_cast<int64_t>(bias.element_count()) == e.experts,
           "the bias is not [E]");
  GX_CHECK(k.element_count() == 1 && threshold.element_count() == 1,
           "k and the threshold are not one number each");
  e.norms = norms.typed_data();
  e.bias = bias.typed_data();
  e.k = std::clamp<int64_t>(k.typed_data()[0], 1, e.experts);
  e.threshold = threshold.typed_data()[0];
  GX_RETURN_IF(MakeFloats(x, &e.x));
  GX_RETURN_IF(MakeFloats(*y, &e.y));
  if (n == 0 || e.down.cols == 0) return ffi::Error::Success();
  GX_RETURN_IF(Choose(named, &e.kernels));
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  // Some rows at a time: intermediate results of many would fill the memory.
  constexpr int64_t kRows = 64;
  for (int64_t start = 0; start < n; start += kRows) {
    GX_RETURN_IF(Part(e, start, std::min(kRows, n - start), threads,
                      [&pool](auto fn) { pool.Schedule(std::move(fn)); }));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma_ext

#pragma GCC visibility push(default)

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_ext_neurons, gemma_ext::Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("gate_format")
                                  .Attr<ffi::Span<const int64_t>>("down_format")
                                  .Attr<ffi::Span<const int64_t>>("cut")
                                  .Attr<int64_t>("wide")
                                  .Attr<std::string_view>("kernels"));

#pragma GCC visibility pop
