// Linear layers: products with weights and what comes right after them, and the gradients of weights.
//
// N rows, K summed, F outputs; all are multiples of 32. Operands are bfloat16, weights may be float32, sums are float32.

#pragma once

#include <algorithm>

#include "activation.h"
#include "threads.h"
#include "tiles.h"

namespace gptjax {

using Rows = ffi::Buffer<ffi::BF16>;
using Vector = ffi::BufferR1<ffi::F32>;

constexpr int64_t kRowsAtOnce = 256;    // of the left operand, which stay in the second cache
constexpr int64_t kSummedAtOnce = 1024; // rows of a weight's gradient

const bf16* Data(const ffi::AnyBuffer& x) { return static_cast<const bf16*>(x.untyped_data()); }

// Packs all of a weight, [K, F] or, in `columns`, [F, K]: panels of 32 outputs, one after the other.
template <typename T>
void PackWeight(ffi::ThreadPool& pool, const T* w, bool columns, int64_t K, int64_t F, bf16* to) {
  Parallel(pool, F / kSide, [&](int64_t panel) {
    bf16* out = to + panel * kSide * K;
    for (int64_t k = 0; k < K; k += kDepth, out += kSide * kDepth) {
      if (columns)
        PackRightFromColumns(w + panel * kSide * K + k, K, out);
      else
        PackRight(w + k * F + panel * kSide, F, out);
    }
  });
}

// Calls `finish(row, column, block)` for each block of 32 x 32 sums of x [N, K] times a weight.
template <typename Finish>
ffi::Error Product(ffi::ThreadPool& pool, const Rows& x, const ffi::AnyBuffer& w, bool columns, bf16* packed, int64_t F,
                   Finish&& finish) {
  int64_t K = x.dimensions().back(), N = x.element_count() / K;
  if (N % kSide || K % kDepth || F % kSide || w.element_count() != static_cast<size_t>(K * F))
    return ffi::Error::InvalidArgument("a product needs multiples of 32");
  if (w.element_type() == ffi::F32)
    PackWeight(pool, static_cast<const float*>(w.untyped_data()), columns, K, F, packed);
  else
    PackWeight(pool, Data(w), columns, K, F, packed);
  const bf16* rows = reinterpret_cast<const bf16*>(x.typed_data());
  int64_t tasks = (N + kRowsAtOnce - 1) / kRowsAtOnce;
  Parallel(pool, tasks, [&](int64_t task) {
    TileScope tiles;
    alignas(64) float block[kSide * kSide];
    int64_t end = std::min(N, (task + 1) * kRowsAtOnce);
    for (int64_t column = 0; column < F; column += kSide) {
      for (int64_t row = task * kRowsAtOnce; row < end; row += kSide) {
        Multiply(InRows(rows + row * K, K), packed + column * K, K / kDepth, block, kSide, false);
        finish(row, column, block);
      }
    }
  });
  return ffi::Error::Success();
}

struct Bias {
  const float* at;
  Bias(const Vector& bias) : at(bias.element_count() ? bias.typed_data() : nullptr) {}
  __m512 operator()(int64_t column) const { return at ? _mm512_loadu_ps(at + column) : _mm512_setzero_ps(); }
};

ffi::Error Linear(ffi::ThreadPool pool, Rows x, ffi::AnyBuffer w, Vector bias, bool columns,
                  ffi::Result<ffi::AnyBuffer> y, ffi::Result<Rows> packed) {
  int64_t F = y->dimensions().back();
  bool wide = y->element_type() == ffi::F32;
  Bias added(bias);
  return Product(pool, x, w, columns, reinterpret_cast<bf16*>(packed->typed_data()), F,
                 [&](int64_t row, int64_t column, const float* block) {
                   for (int64_t half = 0; half < kSide; half += 16) {
                     __m512 b = added(column + half);
                     for (int64_t i = 0; i < kSide; ++i) {
                       __m512 sum = _mm512_add_ps(_mm512_load_ps(block + i * kSide + half), b);
                       int64_t at = (row + i) * F + column + half;
                       if (wide)
                         _mm512_storeu_ps(static_cast<float*>(y->untyped_data()) + at, sum);
                       else
                         StoreBf16(static_cast<bf16*>(y->untyped_data()) + at, sum);
                     }
                   }
                 });
}

ffi::Error LinearGelu(ffi::ThreadPool pool, Rows x, ffi::AnyBuffer w, Vector bias, ffi::Result<Rows> h,
                      ffi::Result<Rows> y, ffi::Result<Rows> packed) {
  int64_t F = y->dimensions().back();
  Bias added(bias);
  auto* before = reinterpret_cast<bf16*>(h->typed_data());
  auto* after = reinterpret_cast<bf16*>(y->typed_data());
  return Product(pool, x, w, false, reinterpret_cast<bf16*>(packed->typed_data()), F,
                 [&](int64_t row, int64_t column, const float* block) {
                   for (int64_t half = 0; half < kSide; half += 16) {
                     __m512 b = added(column + half);
                     for (int64_t i = 0; i < kSide; ++i) {
                       __m256i sum = ToBf16(_mm512_add_ps(_mm512_load_ps(block + i * kSide + half), b));
                       int64_t at = (row + i) * F + column + half;
                       _mm256_storeu_si256((__m256i*)(before + at), sum);
                       StoreBf16(after + at, Gelu(_mm512_castsi512_ps(Float32Bits(sum))));
                     }
                   }
                 });
}

// The gradient of what GELU took, from that of what the layer after it gave.
ffi::Error LinearGeluGradient(ffi::ThreadPool pool, Rows dy, ffi::AnyBuffer w, Rows h, ffi::Result<Rows> dh,
                              ffi::Result<Rows> packed) {
  int64_t F = dh->dimensions().back();
  auto* before = reinterpret_cast<const bf16*>(h.typed_data());
  auto* out = reinterpret_cast<bf16*>(dh->typed_data());
  return Product(pool, dy, w, false, reinterpret_cast<bf16*>(packed->typed_data()), F,
                 [&](int64_t row, int64_t column, const float* block) {
                   for (int64_t i = 0; i < kSide; ++i)
                     for (int64_t half = 0; half < kSide; half += 16) {
                       int64_t at = (row + i) * F + column + half;
                       __m512 sum = _mm512_load_ps(block + i * kSide + half);
                       StoreBf16(out + at, _mm512_mul_ps(sum, GeluSlope(LoadBf16(before + at))));
                     }
                 });
}

// dw [K, F] = x^T dy, and the sums of dy's columns.
ffi::Error WeightGradient(ffi::ThreadPool pool, Rows x, Rows dy, ffi::Result<ffi::Buffer<ffi::F32>> dw,
                          ffi::Result<Vector> sums, ffi::Result<Rows> packed) {
  int64_t K = x.dimensions().back(), F = dy.dimensions().back(), N = x.element_count() / K;
  if (N % kDepth || K % kSide || F % kSide) return ffi::Error::InvalidArgument("a product needs multiples of 32");
  int64_t at_once = std::min(N, kSummedAtOnce);
  auto* left = reinterpret_cast<bf16*>(packed->typed_data());
  bf16* right = left + K * at_once;
  auto* rows = reinterpret_cast<const bf16*>(x.typed_data());
  auto* gradients = reinterpret_cast<const bf16*>(dy.typed_data());
  float *result = dw->typed_data(), *totals = sums->typed_data();
  std::fill(totals, totals + F, 0.0f);
  for (int64_t begin = 0; begin < N; begin += at_once) {
    int64_t count = std::min(at_once, N - begin), steps = count / kDepth;
    int64_t lefts = K / kSide, rights = F / kSide;
    Parallel(pool, lefts + rights, [&](int64_t panel) {
      if (panel < lefts) {
        bf16* out = left + panel * kSide * count;
        for (int64_t n = 0; n < count; n += kDepth, out += kSide * kDepth)
          PackLeftFromColumns(rows + (begin + n) * K + panel * kSide, K, out);
        return;
      }
      panel -= lefts;
      bf16* out = right + panel * kSide * count;
      __m512 total[2] = {_mm512_loadu_ps(totals + panel * kSide), _mm512_loadu_ps(totals + panel * kSide + 16)};
      for (int64_t n = 0; n < count; n += kDepth, out += kSide * kDepth) {
        const bf16* from = gradients + (begin + n) * F + panel * kSide;
        PackRight(from, F, out);
        for (int64_t i = 0; i < kDepth; ++i, from += F)
          for (int half = 0; half < 2; ++half) total[half] = _mm512_add_ps(total[half], LoadBf16(from + 16 * half));
      }
      for (int half = 0; half < 2; ++half) _mm512_storeu_ps(totals + panel * kSide + 16 * half, total[half]);
    });
    constexpr int64_t kAtOnce = 128;  // rows of the result
    int64_t row_tasks = (K + kAtOnce - 1) / kAtOnce, column_tasks = (F + 255) / 256;
    Parallel(pool, row_tasks * column_tasks, [&](int64_t task) {
      TileScope tiles;
      int64_t top = task / column_tasks * kAtOnce, bottom = std::min(K, top + kAtOnce);
      int64_t first = task % column_tasks * 256, last = std::min(F, first + 256);
      for (int64_t column = first; column < last; column += kSide)
        for (int64_t row = top; row < bottom; row += kSide)
          Multiply(InTiles(left + row * count), right + column * count, steps, result + row * F + column, F, begin > 0);
    });
  }
  return ffi::Error::Success();
}

}  // namespace gptjax
