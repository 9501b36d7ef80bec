// Causal attention in blocks of queries whose weights stay in the cache, forward and backward (arXiv:2205.14135).
//
// B batch, T position, G key heads, R query heads of each, C head_dim; H = G R. Queries, keys and values lie in one array
// [B, T, G, R + 2, C] of bfloat16. T and C are multiples of 32. Sums and softmax are float32.

#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "exponential.h"
#include "threads.h"
#include "tiles.h"

namespace gptjax {

using Heads = ffi::Buffer<ffi::BF16>;
using Sums = ffi::Buffer<ffi::F32>;
using Segments = ffi::Buffer<ffi::S32>;

constexpr int64_t kQueries = 128;  // of a block of the backward pass
constexpr float kMasked = -1e30f;

template <int Kind, typename T>
T* Scratch(int64_t count) {  // of this thread; each kind has its own, which is kept
  thread_local std::vector<T> buffer;
  if (buffer.size() < static_cast<size_t>(count + 64)) buffer.resize(count + 64);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~uintptr_t{63});
}

struct Shape {
  int64_t B, T, G, E, C;
  explicit Shape(const Heads& qkv) {
    auto d = qkv.dimensions();
    B = d[0], T = d[1], G = d[2], E = d[3], C = d[4];
  }
  int64_t R() const { return E - 2; }
  int64_t H() const { return G * R(); }
  int64_t row() const { return G * E * C; }  // from a position to the next
  bool fits() const { return T % kSide == 0 && C % kSide == 0 && E > 2; }
};

// Which keys a query sees.
struct Sight {
  const int32_t* segments;  // of this row of the batch, or none
  int64_t window;           // 0: all keys before

  int64_t First(int64_t query) const {  // the first block that a block of queries sees
    return window ? std::max<int64_t>(0, query - window + 1) / kSide * kSide : 0;
  }
  // Whether a block of queries sees all of a block of keys.
  bool All(int64_t query, int64_t key) const {
    return !segments && key < query && (!window || query + kSide - 1 - key < window);
  }
  __mmask16 Keep(int64_t query, int64_t key) const {  // of 16 keys
    __m512i keys = _mm512_add_epi32(_mm512_set1_epi32(key), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                                                              13, 14, 15));
    __mmask16 keep = _mm512_cmple_epi32_mask(keys, _mm512_set1_epi32(query));
    if (window) keep &= _mm512_cmpgt_epi32_mask(keys, _mm512_set1_epi32(query - window));
    if (segments)
      keep &= _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(segments + key), _mm512_set1_epi32(segments[query]));
    return keep;
  }
};

// Packs [T, C], whose rows are `width` apart, as a right operand: its rows summed over, or its columns.
void PackRows(const bf16* x, int64_t width, int64_t T, int64_t C, bf16* to) {
  for (int64_t c = 0; c < C; c += kSide)
    for (int64_t t = 0; t < T; t += kDepth, to += kSide * kDepth) PackRight(x + t * width + c, width, to);
}
void PackColumns(const bf16* x, int64_t width, int64_t T, int64_t C, bf16* to) {
  for (int64_t t = 0; t < T; t += kSide)
    for (int64_t c = 0; c < C; c += kDepth, to += kSide * kDepth) PackRightFromColumns(x + t * width + c, width, to);
}

ffi::Error Attention(ffi::ThreadPool pool, Heads qkv, Segments segments, int64_t window, ffi::Result<Heads> y,
                     ffi::Result<Sums> log_sums) {
  Shape s(qkv);
  if (!s.fits()) return ffi::Error::InvalidArgument("attention needs multiples of 32");
  int64_t T = s.T, C = s.C, H = s.H(), R = s.R();
  auto* input = reinterpret_cast<const bf16*>(qkv.typed_data());
  auto* output = reinterpret_cast<bf16*>(y->typed_data());
  const float scale = 1.0f / std::sqrt(static_cast<float>(C));
  Parallel(pool, s.B * s.G, [&](int64_t task) {
    TileScope tiles;
    int64_t b = task / s.G, g = task % s.G;
    const bf16* head = input + b * T * s.row() + g * s.E * C;
    Sight sight{segments.element_count() ? segments.typed_data() + b * T : nullptr, window};
    bf16* keys = Scratch<0, bf16>(T * C);
    bf16* values = Scratch<1, bf16>(T * C);
    float* scores = Scratch<2, float>(kSide * T);
    bf16* weights = Scratch<3, bf16>(kSide * T);
    PackColumns(head + R * C, s.row(), T, C, keys);
    PackRows(head + (R + 1) * C, s.row(), T, C, values);
    alignas(64) float block[kSide * kSide];
    for (int64_t r = 0; r < R; ++r) {
      int64_t h = g * R + r;
      for (int64_t query = 0; query < T; query += kSide) {
        int64_t first = sight.First(query), last = query + kSide, width = last - first;
        for (int64_t key = first; key < last; key += kSide)
          Multiply(InRows(head + query * s.row() + r * C, s.row()), keys + key * C, C / kDepth, scores + key - first,
                   width, false);
        float inverse[kSide];
        for (int64_t i = 0; i < kSide; ++i) {
          float* row = scores + i * width;
          __m512 largest = _mm512_set1_ps(kMasked);
          for (int64_t key = first; key < last; key += kSide) {
            bool all = sight.All(query, key);
            for (int64_t half = 0; half < kSide; half += 16) {
              float* at = row + key - first + half;
              __m512 x = _mm512_loadu_ps(at);
              if (!all) {
                x = _mm512_mask_blend_ps(sight.Keep(query + i, key + half), _mm512_set1_ps(kMasked), x);
                _mm512_storeu_ps(at, x);
              }
              largest = _mm512_max_ps(largest, x);
            }
          }
          float top = _mm512_reduce_max_ps(largest) * scale;
          __m512 total = _mm512_setzero_ps();
          for (int64_t j = 0; j < width; j += 16) {
            __m512 x = Exp(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(scale), _mm512_set1_ps(top)));
            total = _mm512_add_ps(total, x);
            StoreBf16(weights + i * width + j, x);
          }
          float sum = _mm512_reduce_add_ps(total);
          inverse[i] = 1.0f / sum;
          log_sums->typed_data()[(b * H + h) * T + query + i] = top + std::log(sum);
        }
        for (int64_t c = 0; c < C; c += kSide) {
          Multiply(InRows(weights, width), values + c * T + first * kSide, width / kDepth, block, kSide, false);
          for (int64_t i = 0; i < kSide; ++i) {
            bf16* at = output + ((b * T + query + i) * H + h) * C + c;
            for (int64_t half = 0; half < kSide; half += 16)
              StoreBf16(at + half, _mm512_mul_ps(_mm512_load_ps(block + i * kSide + half), _mm512_set1_ps(inverse[i])));
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

// The sums over channels of outputs times their gradients, for 32 queries.
void RowSums(const bf16* y, const bf16* dy, int64_t width, int64_t C, float* sums) {
  for (int64_t i = 0; i < kSide; ++i) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < C; c += 16)
      total = _mm512_fmadd_ps(LoadBf16(y + i * width + c), LoadBf16(dy + i * width + c), total);
    sums[i] = _mm512_reduce_add_ps(total);
  }
}

void Store(const float* x, float factor, int64_t rows, int64_t C, bf16* to, int64_t width) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < C; c += 16)
      StoreBf16(to + i * width + c, _mm512_mul_ps(_mm512_loadu_ps(x + i * C + c), _mm512_set1_ps(factor)));
}

ffi::Error AttentionGradient(ffi::ThreadPool pool, Heads qkv, Segments segments, Heads y, Sums log_sums, Heads dy,
                             int64_t window, ffi::Result<Heads> dqkv) {
  Shape s(qkv);
  if (!s.fits()) return ffi::Error::InvalidArgument("attention needs multiples of 32");
  int64_t T = s.T, C = s.C, H = s.H(), R = s.R();
  auto* input = reinterpret_cast<const bf16*>(qkv.typed_data());
  auto* outputs = reinterpret_cast<const bf16*>(y.typed_data());
  auto* gradients = reinterpret_cast<const bf16*>(dy.typed_data());
  auto* result = reinterpret_cast<bf16*>(dqkv->typed_data());
  const float scale = 1.0f / std::sqrt(static_cast<float>(C));
  Parallel(pool, s.B * s.G, [&](int64_t task) {
    TileScope tiles;
    int64_t b = task / s.G, g = task % s.G;
    const bf16* head = input + b * T * s.row() + g * s.E * C;
    bf16* dhead = result + b * T * s.row() + g * s.E * C;
    Sight sight{segments.element_count() ? segments.typed_data() + b * T : nullptr, window};
    bf16* key_columns = Scratch<0, bf16>(T * C);
    bf16* value_columns = Scratch<1, bf16>(T * C);
    bf16* key_rows = Scratch<4, bf16>(T * C);
    bf16* weights = Scratch<3, bf16>(kQueries * T);
    bf16* dscores = Scratch<5, bf16>(kQueries * T);
    float* dkeys = Scratch<6, float>(T * C);
    float* dvalues = Scratch<7, float>(T * C);
    bf16* query_rows = Scratch<8, bf16>(kQueries * C);
    bf16* dy_rows = Scratch<9, bf16>(kQueries * C);
    bf16* turned = Scratch<10, bf16>(kSide * kQueries);
    float* dqueries = Scratch<11, float>(kQueries * C);
    PackColumns(head + R * C, s.row(), T, C, key_columns);
    PackRows(head + R * C, s.row(), T, C, key_rows);
    PackColumns(head + (R + 1) * C, s.row(), T, C, value_columns);
    std::fill(dkeys, dkeys + T * C, 0.0f);
    std::fill(dvalues, dvalues + T * C, 0.0f);
    alignas(64) float block[kSide * kSide], dblock[kSide * kSide];
    for (int64_t r = 0; r < R; ++r) {
      int64_t h = g * R + r, wide = H * C;
      for (int64_t begin = 0; begin < T; begin += kQueries) {
        int64_t end = std::min(T, begin + kQueries), count = end - begin;
        int64_t first = sight.First(begin), width = end - first;
        const bf16* q = head + begin * s.row() + r * C;
        const bf16* out = outputs + ((b * T + begin) * H + h) * C;
        const bf16* dout = gradients + ((b * T + begin) * H + h) * C;
        for (int64_t query = begin; query < end; query += kSide) {
          int64_t top = query - begin;
          float sums[kSide];
          RowSums(out + top * wide, dout + top * wide, wide, C, sums);
          const float* logs = log_sums.typed_data() + (b * H + h) * T + query;
          for (int64_t key = first; key < end; key += kSide) {
            bf16* w = weights + top * width + key - first;
            bf16* d = dscores + top * width + key - first;
            if (key > query || key < sight.First(query)) {
              for (int64_t i = 0; i < kSide; ++i) {
                _mm512_storeu_si512(w + i * width, _mm512_setzero_si512());
                _mm512_storeu_si512(d + i * width, _mm512_setzero_si512());
              }
              continue;
            }
            Multiply(InRows(q + top * s.row(), s.row()), key_columns + key * C, C / kDepth, block, kSide, false);
            Multiply(InRows(dout + top * wide, wide), value_columns + key * C, C / kDepth, dblock, kSide, false);
            bool all = sight.All(query, key);
            for (int64_t i = 0; i < kSide; ++i) {
              for (int64_t half = 0; half < kSide; half += 16) {
                __m512 x = _mm512_load_ps(block + i * kSide + half);
                x = Exp(_mm512_fmsub_ps(x, _mm512_set1_ps(scale), _mm512_set1_ps(logs[i])));
                if (!all) x = _mm512_maskz_mov_ps(sight.Keep(query + i, key + half), x);
                StoreBf16(w + i * width + half, x);
                __m512 dx = _mm512_sub_ps(_mm512_load_ps(dblock + i * kSide + half), _mm512_set1_ps(sums[i]));
                StoreBf16(d + i * width + half, _mm512_mul_ps(x, dx));
              }
            }
          }
        }
        for (int64_t c = 0; c < C; c += kSide)
          for (int64_t row = 0; row < count; row += kSide)
            Multiply(InRows(dscores + row * width, width), key_rows + c * T + first * kSide, width / kDepth,
                     dqueries + row * C + c, C, false);
        Store(dqueries, scale, count, C, dhead + begin * s.row() + r * C, s.row());
        PackRows(q, s.row(), count, C, query_rows);
        PackRows(dout, wide, count, C, dy_rows);
        for (int64_t key = first; key < end; key += kSide) {
          // queries before the block of keys do not see it
          int64_t skipped = std::max<int64_t>(0, key - begin), steps = (count - skipped) / kDepth;
          for (auto [from, right, to] : {std::tuple{dscores, query_rows, dkeys}, {weights, dy_rows, dvalues}}) {
            for (int64_t step = 0; step < steps; ++step)
              PackLeftFromColumns(from + (skipped + step * kDepth) * width + key - first, width,
                                  turned + step * kSide * kDepth);
            for (int64_t c = 0; c < C; c += kSide)
              Multiply(InTiles(turned), right + c * count + skipped * kSide, steps, to + key * C + c, C, true);
          }
        }
      }
    }
    Store(dkeys, scale, T, C, dhead + R * C, s.row());
    Store(dvalues, 1.0f, T, C, dhead + (R + 1) * C, s.row());
  });
  return ffi::Error::Success();
}

}  // namespace gptjax
