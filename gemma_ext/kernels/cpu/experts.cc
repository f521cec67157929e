// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Gated feed-forward layers of which every row of x runs through a few slices
// of the hidden neurons, its experts. Only their weights are read, each once
// for all rows of x that chose it.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ffi.h"
#include "operand.h"
#include "parallel.h"
#include "weight.h"

namespace gemma_ext {
namespace {

// Bytes of what one part of the rows of x may need between its phases.
constexpr int64_t kMemory = int64_t{256} << 20;

// Numbers of floats that a thread keeps.
constexpr int64_t kKept = int64_t{1} << 20;

// How the neurons are cut.
struct Cut {
  bool stacked = false;  // gates have an axis of slices before the others
  bool apart = false;    // the down projection has
  int64_t shared = 0;    // slices that always run, before the experts'
  int64_t experts = 0;
  int64_t size = 0;  // neurons of a slice

  int64_t slices() const { return shared + experts; }
};

// The weights of a slice that some rows of x run through.
struct Slice {
  Weight gate, up, down;
  int64_t first = 0;  // of its pairs
  int64_t count = 0;
};

// Rows [begin, end) of a weight of a slice.
struct Block {
  int64_t slice;
  int64_t begin;
  int64_t end;
};

// The arguments of a call, checked.
struct Experts {
  const Kernels* kernels = nullptr;
  bool wide = true;
  Cut cut;
  Weight gate, down;
  Floats x, y;
  const int32_t* chosen = nullptr;  // [n, k], -1 for none
  const float* weight = nullptr;    // [n, k]
  int64_t cols = 0;                 // of x
  int64_t rows = 0;                 // of y
  int64_t k = 0;

  int64_t slots() const { return cut.shared + k; }

  // Slice of a slot of row t of x, or -1.
  int64_t At(int64_t t, int64_t slot) const {
    if (slot < cut.shared) return slot;
    const int64_t expert = chosen[t * k + slot - cut.shared];
    return expert < 0 ? -1 : cut.shared + expert;
  }

  Slice Get(int64_t s) const {
    const int64_t f = cut.size;
    const int64_t at = cut.stacked ? 2 * f * s : f * s;
    const int64_t apart = cut.stacked ? f : f * cut.slices();
    Slice out;
    out.gate = gate.SliceRows(at, f);
    out.up = gate.SliceRows(at + apart, f);
    out.down = cut.apart ? down.SliceRows(rows * s, rows)
                         : down.SliceColumns(s, f);
    return out;
  }

  // Rows of x whose intermediate results fit into `kMemory`.
  int64_t Most() const {
    const int64_t pair = 4 * cols + 20 * cut.size + 4 * rows + 4096;
    return std::max<int64_t>(
        1, kMemory / pair / std::max<int64_t>(1, slots()));
  }
};

// The down projection of several slices as one weight, of rows that are put
// together from theirs.
class Gathered {
 public:
  // Of slices `numbers`, the first of which is `first`; `step` bytes of codes
  // and `scale_step` scales lie between neighbouring ones.
  Gathered(const Weight& first, const std::vector<int64_t>& numbers,
           int64_t step, int64_t scale_step)
      : all_(first) {
    const int64_t bytes = first.row_bytes();
    for (int64_t s : numbers) {
      const int64_t at = s - numbers[0];
      for (int64_t b = 0; b < bytes; b += kBlock) {
        blocks_.push_back(at * step + b);
      }
      scales_.push_back(at * scale_step);
    }
    all_.cols = first.cols * static_cast<int64_t>(numbers.size());
    all_.block_at = blocks_.data();
    all_.scales_at = scales_.data();
    all_.slice_groups = first.groups();
  }
  Gathered(const Gathered&) = delete;
  Gathered& operator=(const Gathered&) = delete;

  const Weight& get() const { return all_; }

  // Whether kernels take `count` slices like this one so, for one row of x.
  static bool Fits(const Kernels& kernels, const Weight& first, int64_t count,
                   bool wide) {
    const int64_t block = first.layout == Layout::kBytes
                              ? kBlock
                              : kBlock * first.fields();
    if (!kernels.gathers || first.layout == Layout::kStream ||
        first.cols % block != 0) {
      return false;
    }
    Weight all = first;
    all.cols = first.cols * count;
    return kernels.one_fits(all) &&
           Operand::SpansOf(all, wide).per_group == 1;
  }

 private:
  Weight all_;
  std::vector<int64_t> blocks_, scales_;
};

// Blocks of about `bytes` of codes, but several for each thread.
void AddBlocks(const std::vector<Slice>& slices, Weight Slice::*which,
               int64_t unit, int64_t bytes, int64_t threads, bool by_slice,
               std::vector<Block>& out) {
  const Weight& w = slices[0].*which;
  const int64_t count = static_cast<int64_t>(slices.size());
  const int64_t even = CeilDiv(w.rows * count, 4 * threads);
  const int64_t rows =
      std::min(std::max(unit, bytes / (w.planes * w.row_bytes()) / unit * unit),
               CeilDiv(even, unit) * unit);
  const int64_t each = CeilDiv(w.rows, rows);
  for (int64_t i = 0; i < each * count; ++i) {
    const int64_t begin = (by_slice ? i % each : i / count) * rows;
    out.push_back({by_slice ? i / each : i % count, begin,
                   std::min(w.rows, begin + rows)});
  }
}

// Rows [start, start + n) of x.
ffi::Error Part(const Experts& e, int64_t start, int64_t n, int64_t threads,
                const std::function<void(std::function<void()>)>& schedule) {
  const int64_t f = e.cut.size, rows = e.rows, slots = e.slots();
  // Pairs of a row of x and a slice, sorted by slice.
  std::vector<int64_t> ends(e.cut.slices() + 1);
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t i = 0; i < slots; ++i) ++ends[e.At(start + t, i) + 1];
  }
  ends[0] = 0;
  std::vector<Slice> slices;
  std::vector<int64_t> numbers;  // of them
  for (int64_t s = 0; s < e.cut.slices(); ++s) {
    const int64_t count = ends[s + 1];
    ends[s + 1] = ends[s] + count;
    if (count == 0) continue;
    slices.push_back(e.Get(s));
    numbers.push_back(s);
    slices.back().first = ends[s];
    slices.back().count = count;
  }
  const int64_t pairs = ends.back();
  std::vector<int64_t> token(pairs), slice(pairs), place(n * slots, -1);
  std::vector<float> factor(pairs);
  for (int64_t i = 0; i < n * slots; ++i) {
    const int64_t t = start + i / slots, s = e.At(t, i % slots);
    if (s < 0) continue;
    const int64_t p = place[i] = ends[s]++;
    token[p] = t;
    factor[p] = i % slots < e.cut.shared
                    ? 1.0f
                    : e.weight[t * e.k + i % slots - e.cut.shared];
  }
  for (size_t i = 0; i < slices.size(); ++i) {
    std::fill_n(slice.begin() + slices[i].first, slices[i].count, i);
  }

  // One row of x is rounded once for all.
  const bool single = n == 1 && pairs == static_cast<int64_t>(slices.size());
  // It meets the slices of the down projection in one product, if it can.
  std::unique_ptr<Gathered> gathered;
  // Slices that lie within a group share its scale.
  if (single && pairs > 1 && f % e.down.group == 0 &&
      Gathered::Fits(*e.kernels, slices[0].down, pairs, e.wide)) {
    const Weight& w = slices[0].down;
    const int64_t step = e.cut.apart ? rows : 1;
    gathered = std::make_unique<Gathered>(w, numbers, step * w.row_bytes(),
                                          step * w.groups());
  }
  // Helpers that come late look at the job only, never at what is here.
  std::vector<std::unique_ptr<Operand>> in, hidden;
  bool ok = true;
  for (const Slice& s : slices) {
    if (!single || in.empty()) {
      in.push_back(
          std::make_unique<Operand>(*e.kernels, s.count, s.gate, e.wide));
      ok &= in.back()->ok();
    }
    if (gathered != nullptr && !hidden.empty()) continue;
    const Weight& w = gathered != nullptr ? gathered->get() : s.down;
    hidden.push_back(
        std::make_unique<Operand>(*e.kernels, s.count, w, e.wide));
    ok &= hidden.back()->ok();
  }
  // [pairs, 3, f]: x G^T, x U^T, and for all pairs what D multiplies; then
  // [pairs, rows].
  const int64_t floats =
      pairs * (3 * f + (gathered != nullptr ? 0 : rows));
  // A little is kept for the next call: new pages take longer than a token.
  thread_local Scratch kept;
  std::unique_ptr<float[]> memory;
  float* between;
  if (floats <= kKept) {
    between = static_cast<float*>(kept.Get(floats * sizeof(float)));
  } else {
    memory.reset(new (std::nothrow) float[floats]);
    between = memory.get();
  }
  if (!ok || (between == nullptr && floats > 0)) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "no memory for activations");
  }
  float* active = between + 2 * pairs * f;
  float* sums = active + pairs * f;
  auto of_x = [&](int64_t s) -> Operand& { return *in[single ? 0 : s]; };
  int64_t unit = 1;
  for (size_t i = 0; i < slices.size(); ++i) {
    unit = std::max({unit, of_x(i).unit(),
                     hidden[gathered != nullptr ? 0 : i]->unit()});
  }

  auto job = std::make_shared<Job>();
  std::vector<Block> up, down;
  if (pairs > 0) {
    // A few rows are not worth another thread.
    const int64_t each = std::max<int64_t>(1, 8192 / e.cols);
    const int64_t rounded = single ? 1 : pairs;
    job->Add(CeilDiv(rounded, each), [&, each, rounded](int64_t i) {
      for (int64_t p = i * each; p < std::min(rounded, (i + 1) * each); ++p) {
        of_x(slice[p]).Quantize(e.x, p - slices[slice[p]].first,
                                token[p] * e.cols);
      }
    });
    AddBlocks(slices, &Slice::gate, unit, 32768, threads, true, up);
    job->Add(up.size(), [&, f](int64_t i) {
      const Block& b = up[i];
      const Slice& s = slices[b.slice];
      float* to = between + s.first * 2 * f;
      const Operand& x = of_x(b.slice);
      x.Multiply(s.gate, b.begin, b.end, {to, false}, 2 * f);
      x.Multiply(s.up, b.begin, b.end, {to + f, false}, 2 * f);
      for (int64_t p = 0; p < s.count; ++p, to += 2 * f) {
        e.kernels->gated_gelu(to + b.begin, to + f + b.begin, b.end - b.begin);
        const float by = factor[s.first + p];
        float* h = active + (s.first + p) * f;
        for (int64_t r = b.begin; r < b.end; ++r) h[r] = to[r] * by;
      }
    });
  }
  if (gathered != nullptr) {
    job->Add(1, [&](int64_t) { hidden[0]->Quantize({active, false}, 0, 0); });
    const Floats y = e.y.From(start * rows);
    const Weight& w = gathered->get();
    const int64_t each = RowsOfPart(w, unit, threads);
    job->Add(CeilDiv(rows, each), [&, y, rows, each](int64_t i) {
      hidden[0]->Multiply(i * each, std::min(rows, (i + 1) * each), y, rows);
    });
    job->Run(threads, true, schedule);
    return ffi::Error::Success();
  }
  if (pairs > 0) {
    const int64_t some = std::max<int64_t>(1, 2048 / f);
    job->Add(CeilDiv(pairs, some), [&, f, some](int64_t i) {
      for (int64_t p = i * some; p < std::min(pairs, (i + 1) * some); ++p) {
        hidden[slice[p]]->Quantize({active, false},
                                   p - slices[slice[p]].first, p * f);
      }
    });
    // With one row of x, neighbouring slices of the same rows together: they
    // share lines of the caches.
    AddBlocks(slices, &Slice::down, unit, 65536, threads, !single,
              down);
    job->Add(down.size(), [&, rows](int64_t i) {
      const Block& b = down[i];
      const Slice& s = slices[b.slice];
      hidden[b.slice]->Multiply(s.down, b.begin, b.end,
                                {sums + s.first * rows, false}, rows);
    });
  }
  job->Add(n, [&, rows, slots](int64_t t) {
    thread_local Scratch scratch;
    float* total = static_cast<float*>(scratch.Get(rows * sizeof(float)));
    std::fill_n(total, rows, 0.0f);
    for (int64_t i = 0; i < slots; ++i) {
      const int64_t p = place[t * slots + i];
      if (p < 0) continue;
      const float* from = sums + p * rows;
      for (int64_t r = 0; r < rows; ++r) total[r] += from[r];
    }
    const int64_t at = (start + t) * rows;
    for (int64_t r = 0; r < rows; ++r) e.y.Store(at + r, total[r]);
  });
  job->Run(threads, n <= kFew, schedule);
  return ffi::Error::Success();
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate,
               ffi::AnyBuffer gate_scale, ffi::AnyBuffer down,
               ffi::AnyBuffer down_scale, ffi::Buffer<ffi::DataType::S32> chosen,
               ffi::Buffer<ffi::DataType::F32> weight,
               ffi::Result<ffi::AnyBuffer> y,
               ffi::Span<const int64_t> gate_format,
               ffi::Span<const int64_t> down_format,
               ffi::Span<const int64_t> cut, int64_t wide,
               std::string_view named) {
  GX_RETURN_IF(Check(x.dimensions().size() == 2, "x is not [N, I]"));
  GX_RETURN_IF(Check(y->dimensions().size() == 2, "y is not [N, O]"));
  GX_RETURN_IF(Check(cut.size() == 5, "the cut is not five numbers"));
  const int64_t n = x.dimensions()[0];
  Experts e;
  e.wide = wide != 0;
  e.cols = x.dimensions()[1];
  e.rows = y->dimensions()[1];
  e.cut = {cut[0] != 0, cut[1] != 0, cut[2], cut[3], cut[4]};
  GX_RETURN_IF(Check(0 < cut[4] && cut[4] < kMost, Number("size", cut[4])));
  GX_RETURN_IF(
      Check(0 < cut[3] && cut[3] < kMost / 4, Number("experts", cut[3])));
  GX_RETURN_IF(
      Check(0 <= cut[2] && cut[2] < kMost / 4, Number("shared", cut[2])));
  GX_RETURN_IF(Check(e.cut.slices() < kMost / 2 / e.cut.size,
                     Number("slices", e.cut.slices())));
  const int64_t hidden = e.cut.slices() * e.cut.size;
  Description of_gate, of_down;
  GX_RETURN_IF(Describe(gate_format, &of_gate));
  GX_RETURN_IF(Describe(down_format, &of_down));
  GX_RETURN_IF(
      MakeWeight(gate, gate_scale, 2 * hidden, e.cols, of_gate, &e.gate));
  if (e.cut.apart) {
    GX_RETURN_IF(
        Check(e.rows < kMost / e.cut.slices(), Number("rows", e.rows)));
    GX_RETURN_IF(MakeWeight(down, down_scale, e.cut.slices() * e.rows,
                            e.cut.size, of_down, &e.down));
  } else {
    GX_RETURN_IF(
        MakeWeight(down, down_scale, e.rows, hidden, of_down, &e.down));
    GX_RETURN_IF(Check(e.down.Cuts(e.cut.size),
                       Number("size", e.cut.size) +
                           " does not cut rows of the down projection"));
  }
  const auto shape = chosen.dimensions();
  GX_RETURN_IF(Check(shape.size() == 2 && shape[0] == n &&
                         weight.dimensions().size() == 2 &&
                         weight.dimensions()[0] == n &&
                         weight.dimensions()[1] == shape[1],
                     "chosen and weight are not [N, K]"));
  GX_RETURN_IF(Check(y->dimensions()[0] == n,
                     Number("rows of x", n) + ", but y is another shape"));
  e.k = shape[1];
  e.chosen = chosen.typed_data();
  e.weight = weight.typed_data();
  for (int64_t i = 0; i < n * e.k; ++i) {
    GX_RETURN_IF(Check(-1 <= e.chosen[i] && e.chosen[i] < e.cut.experts,
                       Number("chosen", e.chosen[i]) + " of " +
                           Number("experts", e.cut.experts)));
  }
  GX_RETURN_IF(MakeFloats(x, &e.x));
  GX_RETURN_IF(MakeFloats(*y, &e.y));
  if (n == 0 || e.rows == 0) return ffi::Error::Success();
  GX_RETURN_IF(Choose(named, &e.kernels));
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t most = e.Most();
  for (int64_t start = 0; start < n; start += most) {
    GX_RETURN_IF(Part(e, start, std::min(most, n - start), threads,
                      [&pool](auto fn) { pool.Schedule(std::move(fn)); }));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemma_ext

#pragma GCC visibility push(default)

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemma_ext_experts, gemma_ext::Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("gate_format")
                                  .Attr<ffi::Span<const int64_t>>("down_format")
                                  .Attr<ffi::Span<const int64_t>>("cut")
                                  .Attr<int64_t>("wide")
                                  .Attr<std::string_view>("kernels"));

#pragma GCC visibility pop
