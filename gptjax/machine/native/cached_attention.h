// Attention of one new position of each sequence to a cache of keys and values. Its speed is limited by the memory
// bandwidth of reading the cache. For each sequence it reads only the slots from the first to the last visible one.
//
// B sequence, G key heads, R query heads of each, S slot, C head_dim, a multiple of 16.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"

namespace gptjax {

// Computes the scores of slots for a scaled query; returns the largest score.
template <typename T>
float Scores(const float* query, const T* keys, const bool* visible, int64_t slots, int64_t C, float* scores) {
  float largest = kMasked;
  for (int64_t s = 0; s < slots; ++s, keys += C) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < C; c += 16) sum = _mm512_fmadd_ps(Load(query + c), Load(keys + c), sum);
    scores[s] = visible[s] ? _mm512_reduce_add_ps(sum) : kMasked;
    largest = std::max(largest, scores[s]);
  }
  return largest;
}

// Computes 16 * N channels of the weighted sum of values, times `factor`.
template <int N, typename T>
void WeightedSum(const float* weights, const T* values, int64_t slots, int64_t C, float factor, float* y) {
  __m512 sums[N];
  for (int i = 0; i < N; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t s = 0; s < slots; ++s, values += C)
    for (int i = 0; i < N; ++i)
      sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(weights[s]), Load(values + 16 * i), sums[i]);
  for (int i = 0; i < N; ++i) Store(y + 16 * i, _mm512_mul_ps(sums[i], _mm512_set1_ps(factor)));
}

// Prefetches memory that is read soon: the hardware prefetcher detects only long streams, and these are short.
template <typename T>
inline void Prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) _mm_prefetch((const char*)(from + i), _MM_HINT_T1);
}

template <typename T>
void AttendToCache(ffi::ThreadPool& pool, const float* q, const T* k, const T* v, const bool* visible, int64_t B,
                   int64_t G, int64_t R, int64_t S, int64_t C, float* y) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(C));
  const int64_t heads = std::max<int64_t>(1, B * G / (8 * Threads(pool)));  // key heads in a task
  Parallel(pool, (B * G + heads - 1) / heads, [&](int64_t task) {
    float* query = Scratch<struct ScaledQuery, float>(C);
    float* scores = Scratch<struct SlotScores, float>(S + 16);
    for (int64_t head = task * heads; head < std::min(B * G, (task + 1) * heads); ++head) {
      const bool* seen = visible + head / G * S;
      int64_t first = std::find(seen, seen + S, true) - seen, slots = S - first;
      while (slots && !seen[first + slots - 1]) --slots;
      for (int64_t r = 0; r < R; ++r) {
        const float* from = q + (head * R + r) * C;
        for (int64_t c = 0; c < C; ++c) query[c] = from[c] * scale;
        if (r == 0) Prefetch(v + (head * S + first) * C, slots * C);
        const float largest = Scores(query, k + (head * S + first) * C, seen + first, slots, C, scores);
        std::fill(scores + slots, scores + slots + 16, kMasked);
        __m512 total = _mm512_setzero_ps();
        for (int64_t s = 0; s < slots; s += 16) {
          __m512 weight = Exp(_mm512_sub_ps(Load(scores + s), _mm512_set1_ps(largest)));
          Store(scores + s, weight);
          total = _mm512_add_ps(total, weight);
        }
        const float factor = 1.0f / _mm512_reduce_add_ps(total);
        if (r == 0 && head + 1 < B * G) Prefetch(k + ((head + 1) * S + first) * C, slots * C);
        const T* values = v + (head * S + first) * C;
        float* to = y + (head * R + r) * C;
        int64_t c = 0;
        for (; c + 64 <= C; c += 64) WeightedSum<4>(scores, values + c, slots, C, factor, to + c);
        for (; c < C; c += 16) WeightedSum<1>(scores, values + c, slots, C, factor, to + c);
      }
    }
  });
}

// q [B, H, C]; k, v [B, G, S, C] of float32 or bfloat16; visible [B, S], true for at least one slot of each sequence; y
// has the shape of q.
inline ffi::Error CachedAttention(ffi::ThreadPool pool, ffi::BufferR3<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                  ffi::BufferR2<ffi::PRED> visible, ffi::Result<ffi::BufferR3<ffi::F32>> y) {
  auto d = k.dimensions();
  if (d.size() != 4 || !k.element_count()) return DoNotFit();
  int64_t B = d[0], G = d[1], S = d[2], C = d[3], R = q.dimensions()[1] / G;
  if (q.dimensions()[0] != B || q.dimensions()[2] != C || !Have(B * G * R * C, q, *y) || !Have(B * G * S * C, k, v) ||
      !Have(B * S, visible) || !Alike(k, v))
    return DoNotFit();
  if (C % 16) return ffi::Error::InvalidArgument("cached attention needs heads of a multiple of 16");
  auto run = [&](auto* keys, auto* values) {
    AttendToCache(pool, q.typed_data(), keys, values, visible.typed_data(), B, G, R, S, C, y->typed_data());
  };
  if (k.element_type() == ffi::BF16)
    run(Data<bf16>(k), Data<bf16>(v));
  else
    run(Data<float>(k), Data<float>(v));
  return ffi::Error::Success();
}

}  // namespace gptjax
