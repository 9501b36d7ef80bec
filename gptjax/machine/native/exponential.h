// The exponential function of 16 numbers at a time.
#pragma once

#include <immintrin.h>

#include <initializer_list>

namespace gptjax {

// Returns 2^n exp(rest), where n is x / ln 2 rounded to an integer and |rest| <= ln 2 / 2; a Taylor series gives
// exp(rest). The relative error is below 2e-7 for |x| <= 1. It grows with |x|, because the rounding error of x / ln 2
// does: 6e-7 at -10, 4e-6 at -80. Softmax tolerates this, because exp(x) is tiny there.
inline __m512 Exp(__m512 x) {
  __m512 exponent = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  __m512 whole = _mm512_roundscale_ps(exponent, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 rest = _mm512_mul_ps(_mm512_sub_ps(exponent, whole), _mm512_set1_ps(0.693147181f));
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(c));
  return _mm512_scalef_ps(sum, whole);
}

}  // namespace gptjax
