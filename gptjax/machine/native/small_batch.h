// Matmuls of a few rows with packed weights. Their speed is limited by the memory bandwidth of reading the weights.
//
// N rows, K contracted, F outputs. Weights are bfloat16 or int8, packed in panels of 32 outputs as in tiles.h. A panel
// consists of steps of 2 kB. A step has 16 words of 32 bits for each output, and a word has the two or four numbers
// that one instruction contracts. With bfloat16 weights, rows are rounded to bfloat16. With int8 weights, two rows of
// int8 represent each row: one in quantization steps, one in fractions of a step. So only the weights are rounded to 8
// bits.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "linear.h"

namespace gptjax {

constexpr int64_t kHalf = kSide / 2, kStepBytes = 2048;
constexpr int64_t kStepsAhead = 4;  // how far ahead memory is prefetched
constexpr float kInt8Max = 127.0f, kLowSteps = 254.0f;  // as in ops/projection.py
constexpr int64_t kRowsPackedAtOnce = 64;

template <typename T>
constexpr int64_t kPackedRows = std::is_same_v<T, int8_t> ? 2 : 1;  // packed rows per row of activations
template <typename T>
constexpr int64_t kContracted = 64 / sizeof(T);  // numbers that one step contracts
template <typename T>
constexpr int64_t kRows = kSide / kPackedRows<T>;  // rows of activations in a block
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

#if defined(GPTJAX_TILES)

template <typename T>
inline void MultiplyUpper(const T* left, const T* right) {
  // A tile is loaded from every other cache line, a pattern that the hardware does not prefetch. Without these
  // prefetches the loop is three times slower.
  for (int64_t line = 0; line < kStepBytes; line += 64)
    _mm_prefetch((const char*)right + kStepsAhead * kStepBytes + line, _MM_HINT_T0);
  LoadTile<4>(left, 64);
  LoadTile<6>(right, 128);
  LoadTile<7>((const char*)right + 64, 128);
  if constexpr (kPackedRows<T> == 2) {
    MultiplyTilesOfInt8<0, 4, 6>();
    MultiplyTilesOfInt8<1, 4, 7>();
  } else {
    MultiplyTilesOfBf16<0, 4, 6>();
    MultiplyTilesOfBf16<1, 4, 7>();
  }
}

template <typename T>
inline void MultiplyLower(const T* left) {
  LoadTile<5>(left, 64);
  if constexpr (kPackedRows<T> == 2) {
    MultiplyTilesOfInt8<2, 5, 6>();
    MultiplyTilesOfInt8<3, 5, 7>();
  } else {
    MultiplyTilesOfBf16<2, 5, 6>();
    MultiplyTilesOfBf16<3, 5, 7>();
  }
}

// sums [rows, 32] = left right; a step of the left operand has 32 rows of 64 bytes.
template <typename T>
inline void MultiplyPanel(const T* left, int64_t rows, const T* right, int64_t steps, Sum<T>* sums) {
  constexpr int64_t kStep = kStepBytes / sizeof(T), kHalfStep = kStep / 2;
  ZeroTile<0>();
  ZeroTile<1>();
  if (rows > kHalf) {
    ZeroTile<2>();
    ZeroTile<3>();
    for (int64_t i = 0; i < steps; ++i, left += kStep, right += kStep) {
      MultiplyUpper(left, right);
      MultiplyLower(left + kHalfStep);
    }
    StoreTile<2>(sums + kHalf * kSide, kSide * 4);
    StoreTile<3>(sums + kHalf * kSide + kHalf, kSide * 4);
  } else {
    for (int64_t i = 0; i < steps; ++i, left += kStep, right += kStep) MultiplyUpper(left, right);
  }
  StoreTile<0>(sums, kSide * 4);
  StoreTile<1>(sums + kHalf, kSide * 4);
}

#else

template <typename T, int Rows>
inline void MultiplyRows(const T* left, const T* right, int64_t steps, Sum<T>* sums) {
  constexpr bool kBytes = kPackedRows<T> == 2;
  const __m512i offset = _mm512_set1_epi8(-128);  // because one operand of the instruction is unsigned
  __m512i total[Rows][2], offsets[2] = {};
  for (int i = 0; i < Rows; ++i) total[i][0] = total[i][1] = _mm512_setzero_si512();
  auto add = [](__m512i sum, __m512i a, __m512i b) {
    if constexpr (kBytes) return _mm512_dpbusd_epi32(sum, a, b);
    else return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)a, (__m512bh)b));
  };
  auto *a = (const char*)left, *b = (const char*)right;
  for (int64_t step = 0; step < steps; ++step, a += kStepBytes) {
    for (int word = 0; word < 16; ++word, b += 128) {
      __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
      if constexpr (kBytes) offsets[0] = add(offsets[0], offset, b0), offsets[1] = add(offsets[1], offset, b1);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        int32_t numbers;
        std::memcpy(&numbers, a + 64 * i + 4 * word, 4);
        __m512i all = _mm512_set1_epi32(numbers);
        if constexpr (kBytes) all = _mm512_xor_si512(all, offset);
        total[i][0] = add(total[i][0], all, b0);
        total[i][1] = add(total[i][1], all, b1);
      }
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int half = 0; half < 2; ++half)
      _mm512_storeu_si512(sums + i * kSide + 16 * half,
                          kBytes ? _mm512_sub_epi32(total[i][half], offsets[half]) : total[i][half]);
}

template <typename T>
inline void MultiplyPanel(const T* left, int64_t rows, const T* right, int64_t steps, Sum<T>* sums) {
  for (int64_t i = 0, now; i < rows; i += now) {
    const T* at = left + i * kContracted<T>;
    Sum<T>* to = sums + i * kSide;
    if (rows - i >= 8) now = 8, MultiplyRows<T, 8>(at, right, steps, to);
    else if (rows - i >= 4) now = 4, MultiplyRows<T, 4>(at, right, steps, to);
    else if (rows - i >= 2) now = 2, MultiplyRows<T, 2>(at, right, steps, to);
    else now = 1, MultiplyRows<T, 1>(at, right, steps, to);
  }
}

#endif

inline void PutRow(bf16* to, const float* x) {
  Store(to, Load(x));
  Store(to + kHalf, Load(x + kHalf));
}

// Rounds a row to bfloat16 and packs it into a block, whose steps hold 32 rows.
inline void PackRow(const float* x, int64_t K, bf16* to, int64_t, float*) {
  for (int64_t k = 0; k < K; k += kContracted<bf16>, to += kSide * kContracted<bf16>)
    PutRow(to, x + k);
}

// Packs a row as two rows of int8; the second one is stored `rows` rows after the first. `step` becomes the
// quantization step of the first one.
inline void PackRow(const float* x, int64_t K, int8_t* to, int64_t rows, float* step) {
  // The bits of positive floats, read as integers, have the order of the floats, and NaN is the largest.
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 16)
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(x + k), _mm512_set1_epi32(0x7fffffff)));
  int32_t bits = _mm512_reduce_max_epi32(largest);
  float range;
  std::memcpy(&range, &bits, 4);
  *step = std::max(range / kInt8Max, std::numeric_limits<float>::min());
  const __m512 inverse = _mm512_set1_ps(1.0f / *step), low_steps = _mm512_set1_ps(kLowSteps);
  for (int64_t k = 0; k < K; k += kContracted<int8_t>, to += kSide * kContracted<int8_t>) {
    for (int64_t i = 0; i < kContracted<int8_t>; i += 16) {
      __m512 steps = _mm512_mul_ps(_mm512_loadu_ps(x + k + i), inverse);
      __m512 high = _mm512_roundscale_ps(steps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      __m512 low = _mm512_mul_ps(_mm512_sub_ps(steps, high), low_steps);
      _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(high)));
      _mm_storeu_si128((__m128i*)(to + rows * kContracted<int8_t> + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(low)));
    }
  }
}

template <typename T>
ffi::Error SmallBatchMatmulOf(ffi::ThreadPool& pool, const float* x, int64_t N, int64_t K, const T* w,
                              const float* scale, T* left, float* row_steps, float* y, int64_t F) {
  const int64_t steps = K / kContracted<T>, panels = (F + kSide - 1) / kSide, panel_size = K * kSide;
  auto block_of = [&](int64_t row) { return left + row / kRows<T> * panel_size; };
  auto rows_of = [&](int64_t row) { return std::min(N - row / kRows<T> * kRows<T>, kRows<T>); };
  Parallel(pool, (N + kRowsPackedAtOnce - 1) / kRowsPackedAtOnce, [&](int64_t task) {
    for (int64_t row = task * kRowsPackedAtOnce; row < std::min(N, (task + 1) * kRowsPackedAtOnce); ++row)
      PackRow(x + row * K, K, block_of(row) + row % kRows<T> * kContracted<T>, rows_of(row), row_steps + row);
  });
  const int64_t at_once = std::max<int64_t>(1, panels / (8 * Threads(pool)));
  const int64_t row_tasks = (N + kRowsAtOnce - 1) / kRowsAtOnce, panel_tasks = (panels + at_once - 1) / at_once;
  Parallel(pool, row_tasks * panel_tasks, [&](int64_t task) {
    TileScope tiles;
    alignas(64) Sum<T> sums[kSide * kSide];
    int64_t first_row = task / panel_tasks * kRowsAtOnce, end_row = std::min(N, first_row + kRowsAtOnce);
    int64_t first = task % panel_tasks * at_once, end = std::min(panels, first + at_once);
    for (int64_t panel = first; panel < end; ++panel) {
      for (int64_t row = first_row; row < end_row; row += kRows<T>) {
        int64_t rows = rows_of(row);
        MultiplyPanel<T>(block_of(row), rows * kPackedRows<T>, w + panel * panel_size, steps, sums);
        for (int64_t half = 0; half < kSide; half += 16) {
          int64_t column = panel * kSide + half;
          __mmask16 inside = F - column >= 16 ? 0xffff : (1 << std::max<int64_t>(0, F - column)) - 1;
          for (int64_t i = 0; i < rows; ++i) {
            const Sum<T>* at = sums + i * kSide + half;
            __m512 sum;
            if constexpr (kPackedRows<T> == 2) {
              __m512 high = _mm512_cvtepi32_ps(_mm512_loadu_si512(at));
              __m512 low = _mm512_cvtepi32_ps(_mm512_loadu_si512(at + rows * kSide));
              sum = _mm512_fmadd_ps(low, _mm512_set1_ps(1 / kLowSteps), high);
              sum = _mm512_mul_ps(sum, _mm512_set1_ps(row_steps[row + i]));
              sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(inside, scale + column));
            } else {
              sum = _mm512_loadu_ps(at);
            }
            _mm512_mask_storeu_ps(y + (row + i) * F + column, inside, sum);
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

// y [N, F] = x [N, K] w, times `scale` if weights are int8. `left` is the workspace for x, in blocks of 32 rows.
inline ffi::Error SmallBatchMatmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::AnyBuffer w, Vector scale,
                          ffi::Result<ffi::BufferR2<ffi::F32>> y, ffi::Result<ffi::AnyBuffer> left,
                          ffi::Result<Vector> row_steps) {
  int64_t N = x.dimensions()[0], K = x.dimensions()[1], F = y->dimensions()[1];
  bool bytes = w.element_type() == ffi::S8;
  if (!K || K % (bytes ? 64 : 32) || w.element_count() != static_cast<size_t>((F + kSide - 1) / kSide * kSide * K))
    return ffi::Error::InvalidArgument("weights were not packed for these rows");
  const int64_t rows = bytes ? kRows<int8_t> : kRows<bf16>, left_size = (N + rows - 1) / rows * kSide * K;
  if (!bytes && !IsBf16(w)) return DoNotFit();
  if (!Have(N * F, *y) || !Have(left_size, *left) || left->element_type() != w.element_type()) return DoNotFit();
  if (!Have(N, *row_steps) || (bytes && !Have(F, scale))) return DoNotFit();
  auto run = [&](auto* weights) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(weights)>>;
    return SmallBatchMatmulOf<T>(pool, x.typed_data(), N, K, weights, scale.typed_data(),
                                 static_cast<T*>(left->untyped_data()), row_steps->typed_data(), y->typed_data(), F);
  };
  return bytes ? run(Data<int8_t>(w)) : run(Data<bf16>(w));
}

// Packs weights [F, K] of bfloat16 or int8. F is a multiple of 32, and the size of a row is a multiple of 64 bytes.
inline ffi::Error PackWeights(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> packed) {
  if (w.dimensions().size() != 2 || !w.element_count()) return DoNotFit();
  int64_t F = w.dimensions()[0], width = w.size_bytes() / F / sizeof(bf16);
  if (F % kSide || width % kDepth) return NotInBlocks();
  if (packed->size_bytes() != w.size_bytes()) return DoNotFit();
  PackWeight<1>(pool, Data<bf16>(w), true, width, F, Data<bf16>(packed));
  return ffi::Error::Success();
}

}  // namespace gptjax
