// Products of decoding: few rows, so that the pace is that at which memory gives the weights, which lie packed.
//
// N rows, K summed, a multiple of 32, F outputs. Weights are bfloat16, or int8 with a scale for each output; then rows
// are two planes of bfloat16, so that only weights are rounded.
#pragma once

#include <algorithm>

#include "linear.h"

namespace gptjax {

// A panel's step of int8 as bfloat16, which holds it exactly.
inline void Widen(const int8_t* from, bf16* to) {
  for (int64_t i = 0; i < kBlock; i += 16)
    Store(to + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + i)))));
}

// block [32, 32] = the sum of the P planes of `left` times `right`, a single plane.
template <int P>
inline void MultiplyPlanes(const bf16* left, const bf16* right, int64_t steps, float* block) {
  for (int p = P - 1; p >= 0; --p)
    Multiply<1>({left + p * kBlock, kDepth, P * kBlock}, right, steps, block, kSide, p < P - 1);
}

template <int P, typename X, typename W>
ffi::Error FewRowsAs(ffi::ThreadPool& pool, const X* x, const W* w, const float* scale, int64_t N, int64_t K, int64_t F,
                     float* y) {
  if (K % kDepth) return NotInBlocks();
  int64_t groups = (N + kSide - 1) / kSide, panels = (F + kSide - 1) / kSide, steps = K / kDepth;
  bf16* left = Scratch<struct FewRowsLeft, bf16>(groups * kSide * K * P);
  X* padded = Scratch<struct FewRowsPadded, X>(kSide * K);
  for (int64_t group = 0; group < groups; ++group) {
    const X* from = x + group * kSide * K;
    if (int64_t rows = N - group * kSide; rows < kSide) {
      std::copy(from, from + rows * K, padded);
      std::fill(padded + rows * K, padded + kSide * K, X{0});
      from = padded;
    }
    for (int64_t step = 0; step < steps; ++step)
      PackLeft<P>(from + step * kDepth, K, left + (group * steps + step) * P * kBlock);
  }
  int64_t at_once = std::max<int64_t>(1, panels / (8 * pool.num_threads()));
  Parallel(pool, (panels + at_once - 1) / at_once, [&](int64_t task) {
    TileScope tiles;
    alignas(64) float block[kBlock];
    bf16* room = Scratch<struct FewRowsPanel, bf16>(K * kSide);
    for (int64_t panel = task * at_once; panel < std::min(panels, (task + 1) * at_once); ++panel) {
      const W* from = w + panel * K * kSide;
      const bf16* right = room;
      if constexpr (std::is_same_v<W, bf16>)
        right = from;
      else
        for (int64_t step = 0; step < steps; ++step) Widen(from + step * kBlock, room + step * kBlock);
      for (int64_t group = 0; group < groups; ++group) {
        MultiplyPlanes<P>(left + group * steps * P * kBlock, right, steps, block);
        for (int64_t i = 0; i < std::min(kSide, N - group * kSide); ++i) {
          for (int64_t half = 0; half < kSide; half += 16) {
            int64_t column = panel * kSide + half, real = std::clamp<int64_t>(F - column, 0, 16);
            __mmask16 mask = (1u << real) - 1;
            __m512 sum = Load(block + i * kSide + half);
            if (scale) sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(mask, scale + column));
            _mm512_mask_storeu_ps(y + (group * kSide + i) * F + column, mask, sum);
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

inline ffi::Error FewRows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, Vector scale,
                          ffi::Result<ffi::Buffer<ffi::F32>> y) {
  int64_t K = x.dimensions().back(), N = x.element_count() / K, F = y->dimensions().back();
  const float* scales = scale.element_count() ? scale.typed_data() : nullptr;
  auto run = [&](auto* x) {
    if (w.element_type() == ffi::S8)
      return FewRowsAs<2>(pool, x, Data<int8_t>(w), scales, N, K, F, y->typed_data());
    return FewRowsAs<1>(pool, x, Data<bf16>(w), scales, N, K, F, y->typed_data());
  };
  return IsFloat32(x) ? run(Data<float>(x)) : run(Data<bf16>(x));
}

}  // namespace gptjax
