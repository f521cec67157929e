// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Kernels for AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and newer).
//
// Codes of some rows are decoded to bytes in L1, in order; then vpdpbusd
// multiplies them with x in two bytes, 64 products an instruction. With few
// rows of x, lanes are neighbouring codes of one row of the weight (`Rows`);
// with many, they are rows of the weight (`Tile`), so that a group is scaled
// once for 16 of them.

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <limits>

#include <immintrin.h>

#include "attention.h"
#include "weight.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target(    \
        "avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"))), \
    apply_to = function)
#else
// After the headers: what they define may be shared with other files.
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#endif

namespace gemma_ext {
namespace avx512 {

#include "portable.inc"
#include "vector.inc"
#include "attention.inc"

#include "avx512_decode.inc"
#include "sum_rows.inc"
#include "avx512_sum_rows.inc"

// q = 128 * high + low, and what the codes' offset takes away.
inline void QuantizeSplit(const float* x, int32_t offset, int64_t group,
                          Activations& out, int64_t n) {
  const Spans& s = out.spans;
  thread_local Scratch memory;
  int16_t* q = static_cast<int16_t*>(memory.Get(s.padded * sizeof(int16_t)));
  const int64_t pitch = out.pitch();
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t begin = i * s.span;
    const int64_t size = std::min(s.span, out.cols - begin);
    out.scale[n * s.count + i] = QuantizeSpan(x + begin, size, Levels(out), q);
    std::memset(q + size, 0, (s.padded - size) * sizeof(*q));
    int8_t* high = out.high + n * pitch + i * s.padded;
    int8_t* low = out.low + n * pitch + i * s.padded;
    __m512i lanes = _mm512_setzero_si512();
    for (int64_t c = 0; c < s.padded; c += 32) {
      const __m512i v = _mm512_loadu_si512(q + c);
      __m512i l = v;
      if (out.wide) {
        const __m512i h =
            _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(64)), 7);
        l = _mm512_sub_epi16(v, _mm512_slli_epi16(h, 7));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + c),
                            _mm512_cvtepi16_epi8(h));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + c),
                          _mm512_cvtepi16_epi8(l));
    }
    // Lane j of a chunk holds codes 4 j to 4 j + 3.
    int32_t* sums = out.sums + n * s.blocks;
    for (int64_t c = 0; c < s.padded; c += kChunk) {
      alignas(64) int32_t four[16];
      for (int j = 0; j < 16; ++j) {
        const int16_t* at = q + c + 4 * j;
        four[j] = -offset * (at[0] + at[1] + at[2] + at[3]);
      }
      lanes = _mm512_add_epi32(lanes, _mm512_load_si512(four));
      if (s.fine) {
        const int64_t each = group / 4;
        for (int64_t b = 0; b < 16 / each; ++b) {
          int32_t sum = 0;
          for (int64_t j = 0; j < each; ++j) sum += four[b * each + j];
          sums[i * (16 / each) + b] = sum;
        }
      }
    }
    _mm512_storeu_si512(out.lanes + (n * s.count + i) * 16, lanes);
    if (!s.fine) sums[i] = _mm512_reduce_add_epi32(lanes);
  }
}

// One row of x, as a kernel reads it.
struct Row {
  const int8_t* high;
  const int8_t* low;
  const int32_t* lanes;
  const int32_t* sums;
  const float* scale;

  Row(const Activations& x, int64_t n)
      : high(x.high + n * x.pitch()),
        low(x.low + n * x.pitch()),
        lanes(x.lanes + n * x.spans.count * 16),
        sums(x.sums + n * x.spans.blocks),
        scale(x.scale + n * x.spans.count) {}
};

template <bool kWide>
inline __m512 Whole(__m512i high, __m512i low) {
  if (kWide) low = _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
  return _mm512_cvtepi32_ps(low);
}

#include "avx512_one_row.inc"

// Adds the dot products of kRows rows of codes with one of x to `sums`.
template <int kRows, bool kWide>
inline void DotRows(const uint8_t* codes, int64_t pitch, const float* scales,
                    int64_t scale_pitch, const Spans& s, int64_t group,
                    const Row& x, float* sums) {
  __m512 total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = _mm512_setzero_ps();
  if (s.fine) {
    const int64_t each = kChunk / group;  // groups of a chunk
    alignas(64) int32_t place[16];
    for (int j = 0; j < 16; ++j) place[j] = static_cast<int32_t>(4 * j / group);
    const __m512i spread = _mm512_load_si512(place);
    for (int64_t i = 0; i < s.count; ++i) {
      const __m512i low_x = _mm512_loadu_si512(x.low + i * kChunk);
      const __m512i high_x =
          kWide ? _mm512_loadu_si512(x.high + i * kChunk) : low_x;
      const __m512i start = _mm512_loadu_si512(x.lanes + i * 16);
      const __m512 xs = _mm512_set1_ps(x.scale[i]);
      for (int r = 0; r < kRows; ++r) {
        const __m512i c = _mm512_loadu_si512(codes + r * pitch + i * kChunk);
        const __m512i low = _mm512_dpbusd_epi32(start, c, low_x);
        const __m512i high =
            kWide ? _mm512_dpbusd_epi32(_mm512_setzero_si512(), c, high_x)
                  : low;
        const __m512 ws = _mm512_permutexvar_ps(
            spread, _mm512_loadu_ps(scales + r * scale_pitch + i * each));
        total[r] = _mm512_fmadd_ps(Whole<kWide>(high, low),
                                   _mm512_mul_ps(ws, xs), total[r]);
      }
    }
  } else {
    int64_t g = 0, within = 0;
    for (int64_t i = 0; i < s.count; ++i) {
      __m512i low[kRows], high[kRows];
      const __m512i start = _mm512_loadu_si512(x.lanes + i * 16);
      for (int r = 0; r < kRows; ++r) {
        low[r] = start;
        high[r] = _mm512_setzero_si512();
      }
      for (int64_t c = 0; c < s.padded; c += kChunk) {
        const __m512i low_x = _mm512_loadu_si512(x.low + i * s.padded + c);
        const __m512i high_x =
            kWide ? _mm512_loadu_si512(x.high + i * s.padded + c) : low_x;
        for (int r = 0; r < kRows; ++r) {
          const __m512i v =
              _mm512_loadu_si512(codes + r * pitch + i * s.span + c);
          low[r] = _mm512_dpbusd_epi32(low[r], v, low_x);
          if (kWide) high[r] = _mm512_dpbusd_epi32(high[r], v, high_x);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const __m512 k =
            _mm512_set1_ps(scales[r * scale_pitch + g] * x.scale[i]);
        total[r] = _mm512_fmadd_ps(Whole<kWide>(high[r], low[r]), k, total[r]);
      }
      if (++within == s.per_group) {
        within = 0;
        ++g;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r] += _mm512_reduce_add_ps(total[r]);
}

template <int kRows, bool kWide>
inline void SomeRows(const Weight& w, const Activations& x, int64_t begin,
                     int64_t end, Floats y, int64_t pitch) {
  thread_local Scratch memory;
  const int64_t size = CeilDiv(w.cols + kSlack, 64) * 64;
  const int64_t scale_size = CeilDiv(w.groups() + 32, 16) * 16;
  uint8_t* codes = static_cast<uint8_t*>(memory.Get(
      kRows * (size + (scale_size + x.n) * sizeof(float))));
  float* scales = reinterpret_cast<float*>(codes + kRows * size);
  float* sums = scales + kRows * scale_size;
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t here = std::min<int64_t>(kRows, end - r);
    std::fill_n(sums, kRows * x.n, 0.0f);
    for (int64_t t = 0; t < w.terms(); ++t) {
      for (int64_t i = 0; i < kRows; ++i) {
        // Rows beyond the end repeat the last.
        const int64_t row = r + std::min(i, here - 1);
        DecodeTermFast(w, t, row, codes + i * size);
        DecodeScalesFast(w, t, row, scales + i * scale_size);
      }
      for (int64_t n = 0; n < x.n; ++n) {
        DotRows<kRows, kWide>(codes, size, scales, scale_size, x.spans, w.group,
                              Row(x, n), sums + n * kRows);
      }
    }
    for (int64_t n = 0; n < x.n; ++n) {
      for (int64_t i = 0; i < here; ++i) {
        y.Store(n * pitch + r + i, sums[n * kRows + i]);
      }
    }
  }
}

inline void RowsFast(const Weight& w, const Activations& x, int64_t begin,
                     int64_t end, Floats y, int64_t pitch) {
  // Codes and x are to stay in L1 together.
  if (w.cols <= 4096) {
    x.wide ? SomeRows<4, true>(w, x, begin, end, y, pitch)
           : SomeRows<4, false>(w, x, begin, end, y, pitch);
  } else {
    x.wide ? SomeRows<2, true>(w, x, begin, end, y, pitch)
           : SomeRows<2, false>(w, x, begin, end, y, pitch);
  }
}

// Rows of a weight that a tile multiplies at once.
constexpr int64_t kTile = 32;

// Transposes 16 rows of 16 words.
inline void Transpose(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // t[4 a + b], 128-bit lane l: rows 4 a to 4 a + 3 of column 4 l + b.
  for (int b = 0; b < 4; ++b) {
    const __m512i p = _mm512_shuffle_i32x4(t[b], t[4 + b], 0x88);
    const __m512i q = _mm512_shuffle_i32x4(t[8 + b], t[12 + b], 0x88);
    const __m512i r = _mm512_shuffle_i32x4(t[b], t[4 + b], 0xdd);
    const __m512i s = _mm512_shuffle_i32x4(t[8 + b], t[12 + b], 0xdd);
    v[b] = _mm512_shuffle_i32x4(p, q, 0x88);
    v[8 + b] = _mm512_shuffle_i32x4(p, q, 0xdd);
    v[4 + b] = _mm512_shuffle_i32x4(r, s, 0x88);
    v[12 + b] = _mm512_shuffle_i32x4(r, s, 0xdd);
  }
}

// Words of four codes of 16 rows each: [pitch / 4][32].
inline void Interleave(const uint8_t* codes, int64_t pitch, const Spans& s,
                       int32_t* out) {
  for (int64_t i = 0; i < s.count; ++i) {
    for (int64_t c = 0; c < s.padded; c += kChunk) {
      for (int half = 0; half < 2; ++half) {
        __m512i v[16];
        for (int r = 0; r < 16; ++r) {
          v[r] = _mm512_loadu_si512(codes + (16 * half + r) * pitch +
                                    i * s.span + c);
        }
        Transpose(v);
        int32_t* at = out + (i * s.padded + c) / 4 * kTile + 16 * half;
        for (int j = 0; j < 16; ++j) _mm512_store_si512(at + j * kTile, v[j]);
      }
    }
  }
}

// Adds kN rows of x times 32 rows of the weight to sums[n][32].
template <int kN, bool kWide>
inline void DotTile(const int32_t* words, const float* scales, const Spans& s,
                    int64_t group, const Activations& x, int64_t first,
                    float* sums) {
  const int64_t pitch = x.pitch();
  const int8_t* low_x = x.low + first * pitch;
  const int8_t* high_x = x.high + first * pitch;
  // Four codes at a time; what pads a span is zero in x.
  const int64_t steps = s.fine ? group / 4 : CeilDiv(s.span, 4);
  const int64_t each = s.fine ? kChunk / group : 1;
  for (int64_t b = 0; b < s.blocks; ++b) {
    const int64_t i = b / each;
    const int64_t at = i * s.padded + (b % each) * group;
    __m512i low[kN][2], high[kN][2];
    for (int n = 0; n < kN; ++n) {
      low[n][0] = low[n][1] =
          _mm512_set1_epi32(x.sums[(first + n) * s.blocks + b]);
      high[n][0] = high[n][1] = _mm512_setzero_si512();
    }
    const int32_t* word = words + at / 4 * kTile;
    for (int64_t k = 0; k < steps; ++k, word += kTile) {
      const __m512i w0 = _mm512_load_si512(word);
      const __m512i w1 = _mm512_load_si512(word + 16);
      for (int n = 0; n < kN; ++n) {
        int32_t four;
        std::memcpy(&four, low_x + n * pitch + at + 4 * k, sizeof(four));
        const __m512i l = _mm512_set1_epi32(four);
        low[n][0] = _mm512_dpbusd_epi32(low[n][0], w0, l);
        low[n][1] = _mm512_dpbusd_epi32(low[n][1], w1, l);
        if (kWide) {
          std::memcpy(&four, high_x + n * pitch + at + 4 * k, sizeof(four));
          const __m512i h = _mm512_set1_epi32(four);
          high[n][0] = _mm512_dpbusd_epi32(high[n][0], w0, h);
          high[n][1] = _mm512_dpbusd_epi32(high[n][1], w1, h);
        }
      }
    }
    const float* ws = scales + b * kTile;
    for (int n = 0; n < kN; ++n) {
      const __m512 xs = _mm512_set1_ps(x.scale[(first + n) * s.count + i]);
      for (int half = 0; half < 2; ++half) {
        float* sum = sums + n * kTile + 16 * half;
        const __m512 k = _mm512_mul_ps(_mm512_load_ps(ws + 16 * half), xs);
        _mm512_store_ps(sum,
                        _mm512_fmadd_ps(Whole<kWide>(high[n][half], low[n][half]),
                                        k, _mm512_load_ps(sum)));
      }
    }
  }
}

template <bool kWide>
inline void DotTiles(const int32_t* words, const float* scales, int64_t group,
                     const Activations& x, float* sums) {
  constexpr int kN = kWide ? 6 : 12;
  const Spans& s = x.spans;
  int64_t n = 0;
  for (; n + kN <= x.n; n += kN) {
    DotTile<kN, kWide>(words, scales, s, group, x, n, sums + n * kTile);
  }
  for (; n + 3 <= x.n; n += 3) {
    DotTile<3, kWide>(words, scales, s, group, x, n, sums + n * kTile);
  }
  for (; n < x.n; ++n) {
    DotTile<1, kWide>(words, scales, s, group, x, n, sums + n * kTile);
  }
}

inline void Tile(const Weight& w, const Activations& x, int64_t begin,
                 int64_t end, Floats y, int64_t pitch) {
  thread_local Scratch memory;
  const Spans& s = x.spans;
  const int64_t size = CeilDiv(w.cols + kSlack, 64) * 64;
  const int64_t scale_size = CeilDiv(w.groups() + 32, 16) * 16;
  const int64_t word_bytes = x.pitch() * kTile;
  uint8_t* base = static_cast<uint8_t*>(memory.Get(
      word_bytes + kTile * size +
      (kTile * (s.blocks + x.n) + scale_size) * sizeof(float)));
  int32_t* words = reinterpret_cast<int32_t*>(base);
  uint8_t* codes = base + word_bytes;
  float* scales = reinterpret_cast<float*>(codes + kTile * size);
  float* sums = scales + kTile * s.blocks;
  float* row_scales = sums + kTile * x.n;
  for (int64_t r = begin; r < end; r += kTile) {
    const int64_t here = std::min(kTile, end - r);
    std::fill_n(sums, kTile * x.n, 0.0f);
    for (int64_t t = 0; t < w.terms(); ++t) {
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t row = r + std::min(i, here - 1);
        DecodeTermFast(w, t, row, codes + i * size);
        DecodeScalesFast(w, t, row, row_scales);
        for (int64_t b = 0; b < s.blocks; ++b) {
          const int64_t g = s.fine ? b : b / s.per_group;
          scales[b * kTile + i] = g < w.groups() ? row_scales[g] : 0;
        }
      }
      Interleave(codes, size, s, words);
      x.wide ? DotTiles<true>(words, scales, w.group, x, sums)
             : DotTiles<false>(words, scales, w.group, x, sums);
    }
    for (int64_t n = 0; n < x.n; ++n) {
      for (int64_t i = 0; i < here; ++i) {
        y.Store(n * pitch + r + i, sums[n * kTile + i]);
      }
    }
  }
}

}  // namespace avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels& Avx512() {
  static const Kernels kernels = {
      .name = "avx512",
      .split = true,
      .gathers = true,
      .few = 8,
      .quantize = avx512::QuantizeSplit,
      .one_fits = avx512::OneRowFits,
      .quantize_one = avx512::QuantizeOne,
      .one = avx512::One,
      .sum_rows = avx512::SumRowsFast,
      .norm = avx512::Norm,
      .rope = avx512::Rope,
      .gated_gelu = avx512::GatedGelu,
      .attend = avx512::Attend,
      .combine = avx512::CombineParts,
      .rows = avx512::RowsFast,
      .tile = avx512::Tile,
  };
  return kernels;
}

}  // namespace gemma_ext

#endif  // defined(__x86_64__)
