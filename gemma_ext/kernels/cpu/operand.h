// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Rows of x, rounded for one weight: their memory, and products with its rows.

#ifndef GEMMA_EXT_KERNELS_CPU_OPERAND_H_
#define GEMMA_EXT_KERNELS_CPU_OPERAND_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "weight.h"

namespace gemma_ext {

class Operand {
 public:
  // `n` rows of x for `w`, which must outlive it.
  Operand(const Kernels& kernels, int64_t n, const Weight& w, bool wide)
      : kernels_(kernels), w_(w) {
    one_ = n == 1 && kernels.one_fits != nullptr && kernels.one_fits(w);
    const Spans spans = SpansOf(w, wide);
    // Once to know how much memory there has to be, once to give it away.
    for (int pass = 0; pass < 2; ++pass) {
      at_ = memory_.get();
      used_ = 0;
      one_ ? LayOutOne(spans, wide) : LayOut(spans, n, wide);
      if (pass == 0) {
        memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, used_)));
        if (memory_ == nullptr) return;
      }
    }
    if (one_) Arrange();
  }

  // Eight bits want scales of their own more often.
  static Spans SpansOf(const Weight& w, bool wide) {
    return Spans(w.cols, w.group, wide ? 512 : 128);
  }

  bool ok() const { return memory_ != nullptr; }
  int64_t n() const { return one_ ? 1 : a_.n; }

  // Rows of the weight that come together.
  int64_t unit() const { return tiles() ? 32 : 4; }

  // Rounds row n of x, which begins at x[at].
  void Quantize(Floats x, int64_t n, int64_t at) {
    const int64_t cols = w_.cols;
    const float* row = static_cast<const float*>(x.data) + at;
    thread_local Scratch memory;
    if (x.bf16) {
      float* wide = static_cast<float*>(memory.Get(cols * sizeof(float)));
      const uint16_t* in = static_cast<const uint16_t*>(x.data) + at;
      for (int64_t i = 0; i < cols; ++i) wide[i] = FromBf16(in[i]);
      row = wide;
    }
    if (one_) return kernels_.quantize_one(w_, row, row_);
    kernels_.quantize(row, w_.offset(), w_.group, a_, n);
  }

  // y[n, r] for rows r of the weight in [begin, end); begin is a multiple of
  // `unit`.
  void Multiply(int64_t begin, int64_t end, Floats y, int64_t pitch) const {
    Multiply(w_, begin, end, y, pitch);
  }

  // The same for other rows of the same format and columns.
  void Multiply(const Weight& w, int64_t begin, int64_t end, Floats y,
                int64_t pitch) const {
    if (!one_) {
      return (tiles() ? kernels_.tile : kernels_.rows)(w, a_, begin, end, y,
                                                       pitch);
    }
    if (!y.bf16) {
      float* out = static_cast<float*>(y.data) + begin;
      return kernels_.one(w, row_, begin, end, out);
    }
    thread_local Scratch memory;
    float* out =
        static_cast<float*>(memory.Get((end - begin) * sizeof(float)));
    kernels_.one(w, row_, begin, end, out);
    uint16_t* to = static_cast<uint16_t*>(y.data) + begin;
    for (int64_t i = 0; i < end - begin; ++i) to[i] = ToBf16(out[i]);
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };

  bool tiles() const {
    return !one_ && kernels_.tile != nullptr && a_.n > kernels_.few;
  }

  template <typename T>
  void Take(T*& to, int64_t count) {
    const int64_t bytes =
        CeilDiv(count * static_cast<int64_t>(sizeof(T)), 64) * 64 + 64;
    if (at_ != nullptr) to = reinterpret_cast<T*>(at_ + used_);
    used_ += bytes;
  }

  void LayOut(const Spans& spans, int64_t n, bool wide) {
    a_.n = n;
    a_.cols = w_.cols;
    a_.wide = wide;
    a_.spans = spans;
    const int64_t count = n * a_.pitch();
    Take(a_.scale, n * spans.count);
    if (!kernels_.split) return Take(a_.q, count);
    Take(a_.high, count);
    Take(a_.low, count);
    Take(a_.lanes, n * spans.count * 16);
    Take(a_.sums, n * spans.blocks);
  }

  void LayOutOne(const Spans& spans, bool wide) {
    const bool blocks =
        w_.layout == Layout::kFields || w_.layout == Layout::kTrits;
    row_.wide = wide;
    row_.spans = spans;
    row_.quads = w_.layout == Layout::kQuads;
    row_.fields = row_.quads ? 4 : blocks ? w_.fields() : 1;
    row_.registers = CeilDiv(w_.cols, 64 * row_.fields) * row_.fields;
    Take(row_.high, row_.registers * 64);
    Take(row_.low, row_.registers * 64);
    Take(row_.first, row_.registers);
    Take(row_.second, row_.registers);
    Take(row_.spread, 16);
    // Whole registers.
    const int64_t size = CeilDiv(spans.blocks, 16) * 16;
    Take(row_.scale, size);
    Take(row_.sums, size);
    // Of 32 blocks a window takes 20 or more, but for the last.
    row_.windows =
        width() < kBlock && !row_.quads ? 0 : spans.blocks / 16 + 1;
    Take(row_.index, row_.windows ? row_.registers * 16 : 0);
    Take(row_.window, row_.windows);
    if (at_ == nullptr) return;
    std::fill_n(row_.scale, size, 0.0f);
    std::fill_n(row_.sums, size, 0.0f);
  }

  // Codes of a block.
  int64_t width() const {
    return row_.spans.fine ? w_.group : row_.spans.span;
  }

  void Arrange() {
    for (int64_t i = 0; i < row_.registers; ++i) {
      row_.first[i] = BlockOf(i, 0);
      row_.second[i] = BlockOf(i, row_.quads ? 15 : 8);
    }
    // Lanes hold four codes each; four lanes choose from as many scales.
    for (int32_t i = 0; i < 16; ++i) {
      row_.spread[i] =
          static_cast<int32_t>(i % 8 * 4 / std::min(width(), kBlock));
    }
    if (row_.windows == 0) return;
    ArrangeWindows();
    for (int64_t i = 0; i < row_.registers; ++i) {
      if (GoesOn(i)) row_.first[i] = -1;
    }
  }

  // The block of four codes. Beyond the row the last will do: there x is zero.
  int32_t BlockOf(int64_t reg, int64_t lane) const {
    const int64_t chunk = reg / row_.fields, field = reg % row_.fields;
    const int64_t code =
        row_.quads
            ? chunk * 256 + lane * 16 + field * 4
            : ((chunk * 2 + lane / 8) * row_.fields + field) * kBlock;
    const int64_t last = w_.cols - (row_.quads ? 4 : kBlock);
    return static_cast<int32_t>(static_cast<uint32_t>(std::min(code, last)) /
                                static_cast<uint32_t>(width()));
  }

  // Whether the sums of a register go on in the next one.
  bool GoesOn(int64_t i) const {
    return i + 1 < row_.registers && row_.first[i] == row_.first[i + 1] &&
           row_.second[i] == row_.second[i + 1];
  }

  void ArrangeWindows() {
    const int64_t chunks = row_.registers / row_.fields;
    const int64_t per_group = row_.spans.per_group;
    int64_t own = 0, n = 0;
    for (int64_t begin = 0; begin < chunks; ++n) {
      Window& to = *new (row_.window + n) Window;
      to.begin = begin;
      to.first = row_.first[begin * row_.fields];
      for (int64_t c = begin; c < chunks; ++c) {
        const int64_t last = (c + 1) * row_.fields - 1;
        if (row_.second[last] - to.first >= Window::kBlocks) break;
        if (!GoesOn(last)) to.end = c + 1;
      }
      begin = to.end;
      to.own = own;
      own = row_.second[to.end * row_.fields - 1] + 1;
      to.blocks = own - to.first;
      to.group = to.first / per_group;
      int32_t group = 0, within = static_cast<int32_t>(to.first % per_group);
      for (int64_t b = 0; b < Window::kBlocks; ++b) {
        to.groups[b] = group;
        if (++within == per_group) {
          within = 0;
          ++group;
        }
      }
      for (int64_t i = to.begin * row_.fields; i < to.end * row_.fields; ++i) {
        const int32_t first = static_cast<int32_t>(to.first);
        std::fill_n(row_.index + i * 16, 8, row_.first[i] - first);
        std::fill_n(row_.index + i * 16 + 8, 8, row_.second[i] - first);
        for (int64_t lane = 1; row_.quads && lane < 15; ++lane) {
          row_.index[i * 16 + lane] = BlockOf(i, lane) - first;
        }
      }
    }
    row_.windows = n;
  }

  const Kernels& kernels_;
  const Weight& w_;
  bool one_ = false;
  Activations a_;
  OneRow row_;
  uint8_t* at_ = nullptr;
  int64_t used_ = 0;
  std::unique_ptr<uint8_t, Free> memory_;
};

// Parts of about 64 KiB of codes, but several for each thread.
inline int64_t RowsOfPart(const Weight& w, int64_t unit,
                          int64_t threads) {
  const int64_t rows =
      std::max(unit, 65536 / (w.planes * w.row_bytes()) / unit * unit);
  const int64_t even = CeilDiv(w.rows, 4 * threads);
  return std::min(rows, CeilDiv(even, unit) * unit);
}

}  // namespace gemma_ext

#endif  // GEMMA_EXT_KERNELS_CPU_OPERAND_H_
