// An MLP: two linear layers with a GELU between them. It processes a few rows at a time, so that their hidden layer
// stays in the CPU's caches. The backward pass recomputes the hidden layer.
//
// N rows, D width of the residual stream, F width of the hidden layer; all are multiples of 32. Both weights have the
// shape [D, F].
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "activation.h"
#include "linear.h"

namespace gptjax {

// Rounds x to the dtype of the activations.
template <typename T>
inline __m512 Rounded(__m512 x) {
  if constexpr (std::is_same_v<T, float>) return x;
  return ToFloat32(ToBf16(x));
}

template <typename T>
ffi::Error MlpAs(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w_in, Bias b_in,
                 const ffi::AnyBuffer& w_out, Bias b_out, Residual residual, float* y, int64_t N, int64_t D, int64_t F,
                 Workspace all) {
  constexpr int P = kPlanes<T>;
  constexpr int64_t kRows = P == 1 ? 256 : 128;  // largest number of rows in a task
  bf16 *in = all.Take(D * F * P), *out = all.Take(D * F * P);
  if (!all.enough()) return TooSmallWorkspace();
  PackWeight<P>(pool, w_in, false, D, F, in);
  PackWeight<P>(pool, w_out, true, F, D, out);
  const int64_t rows = RowsOfTask(pool, N, kRows, kSide);
  Parallel(pool, Ceil(N, rows), [&](int64_t task) {
    TileScope tiles;
    alignas(64) float block[kBlock];
    int64_t begin = task * rows, count = std::min(N - begin, rows);
    bf16* workspace = P == 1 ? nullptr : Scratch<struct MlpRows, bf16>(kRows * D * P);
    bf16* hidden = Scratch<struct MlpHidden, bf16>(kRows * F * P);
    Left left[kRows / kSide];
    for (int64_t row = 0; row < count; row += kSide)
      left[row / kSide] = RowsAsLeft(Data<T>(x) + (begin + row) * D, D, D, workspace + row * D * P);
    for (int64_t f = 0; f < F; f += kSide) {
      for (int64_t row = 0; row < count; row += kSide) {
        Multiply<P>(left[row / kSide], in + f * D * P, D / kDepth, block, kSide, false);
        bf16* to = hidden + (row * F + f * kSide) * P;
        for (int64_t half = 0; half < kSide; half += 16) {
          __m512 bias = b_in(f + half);
          for (int64_t i = 0; i < kSide; ++i)
            StoreLeft<P>(to, i, half, Gelu(Rounded<T>(_mm512_add_ps(Load(block + i * kSide + half), bias))));
        }
      }
    }
    for (int64_t d = 0; d < D; d += kSide) {
      for (int64_t row = 0; row < count; row += kSide) {
        Multiply<P>(InBlocks<P>(hidden + row * F * P), out + d * F * P, F / kDepth, block, kSide, false);
        for (int64_t half = 0; half < kSide; half += 16) {
          __m512 bias = b_out(d + half);
          for (int64_t i = 0; i < kSide; ++i) {
            int64_t to = (begin + row + i) * D + d + half;
            Store(y + to, residual(to, _mm512_add_ps(Load(block + i * kSide + half), bias)));
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

inline ffi::Error Mlp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w_in, Vector b_in, ffi::AnyBuffer w_out,
                      Vector b_out, Stream residual, ffi::Result<Stream> y, ffi::Result<Packed> packed) {
  if (!HaveRows(x, w_in)) return DoNotFit();
  int64_t D = x.dimensions().back(), N = x.element_count() / D, F = w_in.dimensions().back();
  if (N % kSide || D % kSide || F % kSide) return NotInBlocks();
  if (!Have(D * F, w_in, w_out) || !Have(N * D, *y) || !HasOrLacks(F, b_in) || !HasOrLacks(D, b_out) ||
      !HasOrLacks(N * D, residual) || !Readable(x, w_in, w_out))
    return DoNotFit();
  auto run = IsFloat32(x) ? MlpAs<float> : MlpAs<bf16>;
  return run(pool, x, w_in, Bias(b_in), w_out, Bias(b_out), Residual(residual), y->typed_data(), N, D, F,
             Workspace(packed));
}

// The workspace holds three layouts of weights. The rest of it holds, for as many rows as fit, x and dy as left
// operands, and the hidden layer and its gradient as right operands.
template <typename T>
ffi::Error MlpGradientAs(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w_in, Bias b_in,
                         const ffi::AnyBuffer& w_out, const ffi::AnyBuffer& dy, T* dx, float* dw_in, float* db_in,
                         float* dw_out, int64_t N, int64_t D, int64_t F, Workspace all) {
  constexpr int P = kPlanes<T>;
  constexpr int64_t kRows = 128;  // largest number of rows in a task
  bf16 *in = all.Take(D * F * P), *out = all.Take(D * F * P), *back = all.Take(D * F * P);
  const int64_t at_once = all.left() / (2 * (D + F) * P) / kRows * kRows;
  if (at_once <= 0) return TooSmallWorkspace();
  bf16 *x_left = all.Take(at_once * D * P), *dy_left = all.Take(at_once * D * P);
  bf16 *a_right = all.Take(at_once * F * P), *dh_right = all.Take(at_once * F * P);
  PackWeight<P>(pool, w_in, false, D, F, in);
  PackWeight<P>(pool, w_out, false, D, F, out);
  PackWeight<P>(pool, w_in, true, F, D, back);
  std::fill(db_in, db_in + F, 0.0f);
  std::vector<float> sums(at_once / kSide * F);  // each of 32 rows, so that the size of tasks does not change the bits
  for (int64_t first = 0; first < N; first += at_once) {
    const int64_t total = std::min(at_once, N - first), rows = RowsOfTask(pool, total, kRows, kSide);
    Parallel(pool, Ceil(total, rows), [&](int64_t task) {
      TileScope tiles;
      alignas(64) float block[kBlock], dblock[kBlock];
      int64_t begin = task * rows, count = std::min(total - begin, rows);
      bf16* workspace = P == 1 ? nullptr : Scratch<struct GradientRows, bf16>(2 * kRows * D * P);
      bf16* dh_left = Scratch<struct GradientHidden, bf16>(kRows * F * P);
      Left x_rows[kRows / kSide], dy_rows[kRows / kSide];
      const T *x_at = Data<T>(x) + (first + begin) * D, *dy_at = Data<T>(dy) + (first + begin) * D;
      for (int64_t row = 0; row < count; row += kSide) {
        x_rows[row / kSide] = RowsAsLeft(x_at + row * D, D, D, workspace + row * D * P);
        dy_rows[row / kSide] = RowsAsLeft(dy_at + row * D, D, D, workspace + (kRows + row) * D * P);
      }
      for (int64_t f = 0; f < F; f += kSide) {
        __m512 bias[2] = {b_in(f), b_in(f + 16)};
        for (int64_t row = 0; row < count; row += kSide) {
          __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
          Multiply<P>(x_rows[row / kSide], in + f * D * P, D / kDepth, block, kSide, false);
          Multiply<P>(dy_rows[row / kSide], out + f * D * P, D / kDepth, dblock, kSide, false);
          bf16* to = dh_left + (row * F + f * kSide) * P;
          for (int64_t i = 0; i < kSide; ++i) {
            for (int half = 0; half < 2; ++half) {
              float *h = block + i * kSide + 16 * half, *dh = dblock + i * kSide + 16 * half;
              __m512 before = Rounded<T>(_mm512_add_ps(Load(h), bias[half]));
              __m512 gradient = Rounded<T>(_mm512_mul_ps(Load(dh), GeluSlope(before)));
              Store(h, Gelu(before));
              Store(dh, gradient);
              StoreLeft<P>(to, i, 16 * half, gradient);
              sum[half] = _mm512_add_ps(sum[half], gradient);
            }
          }
          int64_t at = (f * total + (begin + row) * kSide) * P;
          PackRight<P>(block, kSide, a_right + at);
          PackRight<P>(dblock, kSide, dh_right + at);
          for (int half = 0; half < 2; ++half) Store(&sums[(begin + row) / kSide * F + f + 16 * half], sum[half]);
        }
      }
      for (int64_t d = 0; d < D; d += kSide)
        for (int64_t row = 0; row < count; row += kSide) {
          Multiply<P>(InBlocks<P>(dh_left + row * F * P), back + d * F * P, F / kDepth, block, kSide, false);
          T* to = dx + (first + begin + row) * D + d;
          for (int64_t i = 0; i < kSide; ++i)
            for (int64_t half = 0; half < kSide; half += 16) Store(to + i * D + half, Load(block + i * kSide + half));
        }
    });
    for (int64_t block = 0; block < total / kSide; ++block)
      for (int64_t f = 0; f < F; f += 16) Store(db_in + f, _mm512_add_ps(Load(db_in + f), Load(&sums[block * F + f])));
    Parallel(pool, 2 * D / kSide, [&](int64_t panel) {
      bool of_x = panel < D / kSide;
      int64_t column = (of_x ? panel : panel - D / kSide) * kSide;
      PackLeftPanel<P>(Data<T>(of_x ? x : dy) + first * D + column, D, total,
                       (of_x ? x_left : dy_left) + column * total * P);
    });
    AddOuterProducts<P>(pool, x_left, dh_right, total, D, F, dw_in, first > 0);
    AddOuterProducts<P>(pool, dy_left, a_right, total, D, F, dw_out, first > 0);
  }
  return ffi::Error::Success();
}

inline ffi::Error MlpGradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w_in, Vector b_in,
                              ffi::AnyBuffer w_out, ffi::AnyBuffer dy, ffi::Result<ffi::AnyBuffer> dx,
                              ffi::Result<ffi::Buffer<ffi::F32>> dw_in, ffi::Result<Vector> db_in,
                              ffi::Result<ffi::Buffer<ffi::F32>> dw_out, ffi::Result<Packed> packed) {
  if (!HaveRows(x, w_in)) return DoNotFit();
  int64_t D = x.dimensions().back(), N = x.element_count() / D, F = w_in.dimensions().back();
  if (N % kSide || D % kSide || F % kSide) return NotInBlocks();
  if (!Have(D * F, w_in, w_out, *dw_in, *dw_out) || !Have(N * D, dy, *dx) || !Have(F, *db_in) ||
      !HasOrLacks(F, b_in) || !Readable(x, w_in, w_out) || !Alike(x, dy, *dx))
    return DoNotFit();
  auto run = [&](auto* to) {
    return MlpGradientAs(pool, x, w_in, Bias(b_in), w_out, dy, to, dw_in->typed_data(), db_in->typed_data(),
                         dw_out->typed_data(), N, D, F, Workspace(packed));
  };
  return IsFloat32(x) ? run(Data<float>(dx)) : run(Data<bf16>(dx));
}

}  // namespace gptjax
