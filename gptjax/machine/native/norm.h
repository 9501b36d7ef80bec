// Layer norm of the float32 residual stream (arXiv:1607.06450), forward and backward, each in one pass over memory.
//
// N rows of width D, a multiple of 32.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"

namespace gptjax {

constexpr int64_t kNormRows = 64;  // rows in a task; fixed, because gradients are summed task by task

struct NormOptions {
  float epsilon;
};

struct Statistics {
  __m512 mean, inverse;  // mean, and the inverse of the standard deviation
};

inline Statistics StatisticsOf(const float* x, int64_t D, float epsilon) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; d += 16) sum = _mm512_add_ps(sum, Load(x + d));
  __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / D);
  for (int64_t d = 0; d < D; d += 16) {
    __m512 centred = _mm512_sub_ps(Load(x + d), mean);
    squares = _mm512_fmadd_ps(centred, centred, squares);
  }
  return {mean, _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / D + epsilon))};
}

inline __m512 Normed(const float* x, Statistics s) { return _mm512_mul_ps(_mm512_sub_ps(Load(x), s.mean), s.inverse); }

template <typename T>
void LayerNormAs(ffi::ThreadPool& pool, const float* x, int64_t N, int64_t D, const float* scale, Bias bias,
                 float epsilon, T* y) {
  Parallel(pool, (N + kNormRows - 1) / kNormRows, [&](int64_t task) {
    for (int64_t row = task * kNormRows; row < std::min(N, (task + 1) * kNormRows); ++row) {
      const float* from = x + row * D;
      Statistics s = StatisticsOf(from, D, epsilon);
      for (int64_t d = 0; d < D; d += 16)
        Store(y + row * D + d, _mm512_fmadd_ps(Normed(from + d, s), Load(scale + d), bias(d)));
    }
  });
}

inline ffi::Error LayerNorm(ffi::ThreadPool pool, Stream x, Vector scale, Vector bias, NormOptions options,
                            ffi::Result<ffi::AnyBuffer> y) {
  if (!HaveRows(x)) return DoNotFit();
  int64_t D = x.dimensions().back(), N = x.element_count() / D;
  if (D % kSide) return NotInBlocks();
  if (!Have(D, scale) || !HasOrLacks(D, bias) || !Have(N * D, *y) || !Alike(*y)) return DoNotFit();
  if (IsFloat32(*y))
    LayerNormAs(pool, x.typed_data(), N, D, scale.typed_data(), Bias(bias), options.epsilon, Data<float>(y));
  else
    LayerNormAs(pool, x.typed_data(), N, D, scale.typed_data(), Bias(bias), options.epsilon, Data<bf16>(y));
  return ffi::Error::Success();
}

// dx is the gradient through the norm plus `residual`, the gradient of x through the residual stream.
template <typename T>
void LayerNormGradientAs(ffi::ThreadPool& pool, const float* x, int64_t N, int64_t D, const float* scale, const T* dy,
                         const float* residual, float epsilon, float* dx, float* dscale, float* dbias) {
  int64_t tasks = (N + kNormRows - 1) / kNormRows;
  std::vector<float> sums(tasks * 2 * D);  // for each task D sums for the scale, then D sums for the bias
  Parallel(pool, tasks, [&](int64_t task) {
    float *scales = &sums[task * 2 * D], *biases = scales + D;
    for (int64_t row = task * kNormRows; row < std::min(N, (task + 1) * kNormRows); ++row) {
      const float* from = x + row * D;
      const T* gradient = dy + row * D;
      Statistics s = StatisticsOf(from, D, epsilon);
      __m512 level = _mm512_setzero_ps(), along = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += 16) {
        __m512 normed = Normed(from + d, s), g = Load(gradient + d), scaled = _mm512_mul_ps(g, Load(scale + d));
        level = _mm512_add_ps(level, scaled);
        along = _mm512_fmadd_ps(scaled, normed, along);
        Store(scales + d, _mm512_fmadd_ps(g, normed, Load(scales + d)));
        Store(biases + d, _mm512_add_ps(g, Load(biases + d)));
      }
      level = _mm512_set1_ps(_mm512_reduce_add_ps(level) / D);
      along = _mm512_set1_ps(_mm512_reduce_add_ps(along) / D);
      for (int64_t d = 0; d < D; d += 16) {
        __m512 scaled = _mm512_mul_ps(Load(gradient + d), Load(scale + d));
        __m512 rest = _mm512_fnmadd_ps(Normed(from + d, s), along, _mm512_sub_ps(scaled, level));
        Store(dx + row * D + d, _mm512_fmadd_ps(rest, s.inverse, Load(residual + row * D + d)));
      }
    }
  });
  std::fill(dscale, dscale + D, 0.0f);
  std::fill(dbias, dbias + D, 0.0f);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t d = 0; d < D; d += 16) {
      const float* from = &sums[task * 2 * D] + d;
      Store(dscale + d, _mm512_add_ps(Load(dscale + d), Load(from)));
      Store(dbias + d, _mm512_add_ps(Load(dbias + d), Load(from + D)));
    }
}

inline ffi::Error LayerNormGradient(ffi::ThreadPool pool, Stream x, Vector scale, ffi::AnyBuffer dy, Stream residual,
                                    NormOptions options, ffi::Result<Stream> dx, ffi::Result<Vector> dscale,
                                    ffi::Result<Vector> dbias) {
  if (!HaveRows(x)) return DoNotFit();
  int64_t D = x.dimensions().back(), N = x.element_count() / D;
  if (D % kSide) return NotInBlocks();
  if (!Have(D, scale, *dscale, *dbias) || !Have(N * D, dy, residual, *dx) || !Alike(dy)) return DoNotFit();
  auto run = [&](auto* gradient) {
    LayerNormGradientAs(pool, x.typed_data(), N, D, scale.typed_data(), gradient, residual.typed_data(),
                        options.epsilon, dx->typed_data(), dscale->typed_data(), dbias->typed_data());
  };
  if (IsFloat32(dy))
    run(Data<float>(dy));
  else
    run(Data<bf16>(dy));
  return ffi::Error::Success();
}

}  // namespace gptjax
