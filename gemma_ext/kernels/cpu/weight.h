// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// A packed weight and the quantised activations that it meets, as plain views
// of memory. docs/formats.md draws every bit layout.

#ifndef GEMMA_EXT_KERNELS_CPU_WEIGHT_H_
#define GEMMA_EXT_KERNELS_CPU_WEIGHT_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace gemma_ext {

enum class Layout : int64_t {
  kBytes = 0,
  kFields = 1,
  kTrits = 2,
  kStream = 3,
  kQuads = 4,  // of four codes one is 0, in 5 bits of a stream
};

// Bytes of a block of fields.
inline constexpr int64_t kBlock = 32;
// Codes that a decoder may write beyond the end of a row.
inline constexpr int64_t kSlack = 320;
// Codes of one step of a dot product.
inline constexpr int64_t kChunk = 64;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Weight {
  const uint8_t* codes = nullptr;
  const void* scale = nullptr;  // bfloat16, or ue5m3 or e4m3 in one byte
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t group = 0;
  int64_t planes = 1;
  int64_t bits = 0;  // of a field or of a code of a stream
  Layout layout = Layout::kBytes;
  bool ternary = false;
  bool tied = false;
  bool byte_scale = false;
  bool signed_scale = false;  // e4m3
  // From one row or plane to the next: bytes of codes, numbers of scales.
  int64_t row_stride = 0;
  int64_t plane_stride = 0;
  int64_t scale_stride = 0;
  int64_t scale_plane_stride = 0;
  // Of some rows of another weight: which.
  const int64_t* row_at = nullptr;
  // Of rows that are put together from slices of longer ones: where the blocks
  // of bytes lie, where the scales of a slice begin, and how many these are.
  const int64_t* block_at = nullptr;
  const int64_t* scales_at = nullptr;
  int64_t slice_groups = 0;

  // Codes of a byte in layouts of fields.
  int64_t fields() const { return layout == Layout::kTrits ? 5 : 8 / bits; }

  int64_t row_bytes() const {
    switch (layout) {
      case Layout::kBytes:
        return cols;
      case Layout::kStream:
        return CeilDiv(cols, 8) * bits;
      case Layout::kQuads:
        return CeilDiv(cols, 32) * 5;
      default:
        return CeilDiv(cols, kBlock * fields()) * kBlock;
    }
  }

  int64_t groups() const { return cols / group; }
  int64_t scale_planes() const { return tied ? 1 : planes; }

  // Tied planes are added up before they are multiplied: one term.
  int64_t terms() const { return tied ? 1 : planes; }

  // What is subtracted from a stored code.
  int32_t code_offset() const {
    if (layout == Layout::kBytes) return 128;
    return ternary ? 1 : 1 << (bits - 1);
  }

  // What is subtracted from a term: a code, or tied ones added up.
  int32_t offset() const {
    if (!tied) return code_offset();
    int32_t sum = 0, power = 1;
    for (int64_t p = 0; p < planes; ++p, power *= 3) sum += power;
    return sum;
  }

  int64_t Row(int64_t r) const { return row_at == nullptr ? r : row_at[r]; }

  const uint8_t* row(int64_t plane, int64_t r) const {
    return codes + plane * plane_stride + Row(r) * row_stride;
  }

  // Index of the first scale of a row.
  int64_t scale_at(int64_t plane, int64_t r) const {
    return plane * scale_plane_stride + Row(r) * scale_stride;
  }

  // Rows, and planes around them, one after another.
  void LayOut() {
    row_stride = row_bytes();
    plane_stride = rows * row_stride;
    scale_stride = groups();
    scale_plane_stride = rows * scale_stride;
  }

  // Rows [begin, begin + count).
  Weight SliceRows(int64_t begin, int64_t count) const {
    Weight part = *this;
    part.rows = count;
    part.codes += begin * row_stride;
    part.SkipScales(begin * scale_stride);
    return part;
  }

  // The rows of some numbers.
  Weight PickRows(const int64_t* numbers, int64_t count) const {
    Weight part = *this;
    part.rows = count;
    part.row_at = numbers;
    return part;
  }

  // Whether columns can be cut into slices of so many.
  bool Cuts(int64_t count) const {
    const int64_t block = layout == Layout::kBytes    ? 1
                          : layout == Layout::kStream ? 8
                          : layout == Layout::kQuads  ? 32
                                                      : kBlock * fields();
    if (count == cols) return true;
    return count > 0 && cols % count == 0 && count % block == 0 &&
           (count % group == 0 || group % count == 0);
  }

  // Slice `index` of so many columns each, of every row.
  Weight SliceColumns(int64_t index, int64_t count) const {
    Weight part = *this;
    part.cols = count;
    part.codes += index * part.row_bytes();
    part.SkipScales(index * count / group);
    if (count < group) part.group = count;
    return part;
  }

  void SkipScales(int64_t count) {
    scale = static_cast<const uint8_t*>(scale) + count * (byte_scale ? 1 : 2);
  }
};

// How activations are cut into blocks of one scale.
//
// `fine`: groups of 4, 8, 16 or 32 codes, several in a chunk of 64. Otherwise
// a span lies within one group.
struct Spans {
  bool fine = false;
  int64_t span = 0;    // codes
  int64_t count = 0;   // spans of a row
  int64_t padded = 0;  // codes of a span, padded to whole chunks
  int64_t per_group = 1;  // spans of a group, if not fine
  int64_t blocks = 0;  // scales of a padded row: groups if fine, else spans

  Spans() = default;
  Spans(int64_t cols, int64_t group, int64_t most) {
    fine = group < kChunk && kChunk % group == 0 && group % 4 == 0;
    if (fine) {
      span = kChunk;
      count = CeilDiv(cols, kChunk);
    } else {
      span = group;
      if (group % kChunk == 0) {
        for (span = most < group ? most : group; group % span != 0;) {
          span -= kChunk;
        }
      }
      count = cols / span;
      per_group = group / span;
    }
    padded = CeilDiv(span, kChunk) * kChunk;
    blocks = fine ? count * (kChunk / group) : count;
  }
};

// The four codes of a quad of five bits, plus 1, the first in the lowest byte:
// two bits say which is 0, three are the signs of the others.
inline uint32_t OpenQuad(uint32_t quad) {
  uint32_t codes = 0, signs = quad >> 2;
  for (uint32_t i = 0; i < 4; ++i) {
    uint32_t code = 1;
    if (i != (quad & 3)) {
      code = signs % 2 * 2;
      signs /= 2;
    }
    codes |= code << (8 * i);
  }
  return codes;
}

// Memory of one thread, aligned to cache lines, that only grows.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // What an earlier call returned is gone.
  void* Get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Rows of x as integers: x = scale * q, |q| <= 16256 (or 127), one scale a span.
struct Activations {
  int64_t n = 0;
  int64_t cols = 0;
  bool wide = true;  // 15 bits and sign, in two bytes; else 8 bits
  Spans spans;
  int64_t pitch() const { return spans.count * spans.padded; }

  // q, or its low part where it is split: q = 128 * high + low.
  int16_t* q = nullptr;         // [n, pitch]; the portable kernels
  int8_t* high = nullptr;       // [n, pitch]
  int8_t* low = nullptr;        // [n, pitch]
  int32_t* lanes = nullptr;     // [n, count, 16]: -offset * sums of 4 codes
  int32_t* sums = nullptr;      // [n, blocks]: -offset * sums of a block
  float* scale = nullptr;       // [n, count]
};

// Chunks of codes whose products are scaled by at most 32 numbers.
struct alignas(64) Window {
  static constexpr int64_t kBlocks = 32;
  float scale[kBlocks];       // of x
  float sums[kBlocks];        // -offset * sums of a block, once in all windows
  int32_t groups[kBlocks];    // of the weight, from `group` on
  int64_t begin = 0, end = 0;  // chunks: registers over fields
  int64_t first = 0, blocks = 0;
  int64_t own = 0;  // blocks before it are those of an earlier window
  int64_t group = 0;
};

// One row of x in the order in which registers of 64 codes leave a weight.
struct OneRow {
  bool wide = true;
  Spans spans;
  int64_t fields = 1;     // registers of two blocks, of 64 codes, or of quads
  bool quads = false;     // of 256 codes, register k has quads k, k + 4, ...
  int64_t registers = 0;
  int8_t* high = nullptr;      // [registers, 64]
  int8_t* low = nullptr;       // [registers, 64]
  // The block of the first code of either half of a register, after which the
  // sums are scaled; -1 where they go on.
  int32_t* first = nullptr;    // [registers]
  int32_t* second = nullptr;   // [registers]
  int32_t* spread = nullptr;   // [16]: which of the scales of a half
  float* scale = nullptr;      // [blocks], of x
  float* sums = nullptr;       // [blocks]: -offset * sums of a block
  // With groups of 32 and more.
  int32_t* index = nullptr;    // [registers, 16]: blocks of a window
  Window* window = nullptr;    // [windows]
  int64_t windows = 0;

  // Where 32 codes go; `i` is the first of them.
  int64_t Place(int64_t i) const {
    const int64_t block = i / (kBlock * fields), field = i / kBlock % fields;
    if (fields == 1) return i;
    return ((block / 2) * fields + field) * 64 + block % 2 * kBlock;
  }
};

inline float FromBf16(uint16_t v) {
  uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline uint16_t ToBf16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A scale of one byte: ue5m3, or e4m3 with a sign.
inline float FromByte(uint8_t u, bool has_sign) {
  const uint32_t size = has_sign ? u & 0x7f : u;
  if (size == 0) return 0.0f;
  uint32_t bits = (size + ((127 - (has_sign ? 15 : 20)) << 3)) << 20;
  if (has_sign) bits |= static_cast<uint32_t>(u & 0x80) << 24;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// Numbers that an operation reads or writes: float32 or bfloat16.
struct Floats {
  void* data = nullptr;
  bool bf16 = false;

  // Those from the i-th on.
  Floats From(int64_t i) const {
    return {static_cast<uint8_t*>(data) + i * (bf16 ? 2 : 4), bf16};
  }

  float Load(int64_t i) const {
    return bf16 ? FromBf16(static_cast<const uint16_t*>(data)[i])
                : static_cast<const float*>(data)[i];
  }

  void Store(int64_t i, float v) const {
    if (bf16) {
      static_cast<uint16_t*>(data)[i] = ToBf16(v);
    } else {
      static_cast<float*>(data)[i] = v;
    }
  }
};

struct Attention;

// One implementation of the kernels. Every function may run in many threads at
// once on parts that do not overlap.
struct Kernels {
  const char* name;
  // Whether it reads high, low, lanes and sums of `Activations`; otherwise q.
  bool split;
  // Whether `one` takes rows that are put together from slices.
  bool gathers;
  // Rows of x beyond which `tile`, if there is one, is the faster.
  int64_t few;

  // Quantises row n of x.
  void (*quantize)(const float* x, int32_t offset, int64_t group,
                   Activations& out, int64_t n);
  // For one row of x, if there is something better for this weight.
  bool (*one_fits)(const Weight& w);
  void (*quantize_one)(const Weight& w, const float* x, OneRow& out);
  // y[r - begin] for rows of the weight r in [begin, end).
  void (*one)(const Weight& w, const OneRow& x, int64_t begin, int64_t end,
              float* y);

  // y += sum over i of factors[i] * row rows[i] of the weight.
  void (*sum_rows)(const Weight& w, const int64_t* rows, const float* factors,
                   int64_t count, float* y);

  // x / sqrt(mean(x^2) + 1e-6) * (more + scale); `to` may be x.
  void (*norm)(Floats scale, float more, const float* x, int64_t size,
               float* to);
  // Turns the halves of x by the angles of sin and cos, times a factor.
  void (*rope)(float* x, const float* sin, const float* cos, int64_t size,
               float factor);
  // gate becomes gelu(gate) * up.
  void (*gated_gelu)(float* gate, const float* up, int64_t size);
  // A part of the cache for one sequence and key head; then a row of its sum.
  void (*attend)(const Attention& a, int64_t pair, int64_t part);
  void (*combine)(const Attention& a, int64_t pair, int64_t row);

  // y[n, r] for rows of the weight r in [begin, end), all rows of x.
  void (*rows)(const Weight& w, const Activations& x, int64_t begin,
               int64_t end, Floats y, int64_t pitch);
  // The same for many rows of x; begin is a multiple of 32.
  void (*tile)(const Weight& w, const Activations& x, int64_t begin,
               int64_t end, Floats y, int64_t pitch);
};

const Kernels& Portable();
#if defined(__x86_64__)
const Kernels& Avx2();
const Kernels& Avx512();
#endif

}  // namespace gemma_ext

#endif  // GEMMA_EXT_KERNELS_CPU_WEIGHT_H_
