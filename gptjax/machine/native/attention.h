// Causal attention by blocks of queries whose weights stay in the cache, forward and backward (arXiv:2205.14135).
//
// B batch, T position, G key heads, R query heads of each, C head_dim; H = G R. Queries, keys and values are one array
// [B, T, G, R + 2, C] of bfloat16 or float32. T and C are multiples of 32. Accumulation and softmax are float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "exponential.h"
#include "linear.h"

namespace gptjax {

using Sums = ffi::Buffer<ffi::F32>;
using Segments = ffi::Buffer<ffi::S32>;

struct AttentionOptions {
  int64_t window;
};

constexpr int64_t kQueries = 128;  // queries in a block of the backward pass
constexpr float kMasked = -1e30f;

struct Shape {
  int64_t B, T, G, E, C;
  explicit Shape(const ffi::AnyBuffer& qkv) {
    auto d = qkv.dimensions();
    B = d[0], T = d[1], G = d[2], E = d[3], C = d[4];
  }
  int64_t R() const { return E - 2; }
  int64_t H() const { return G * R(); }
  int64_t outputs() const { return B * T * H() * C; }
  int64_t row() const { return G * E * C; }  // elements from one position to the next
  bool in_blocks() const { return T % kSide == 0 && C % kSide == 0; }
  bool fits(const Segments& segments) const { return E > 2 && T > 0 && C > 0 && HasOrLacks(B * T, segments); }
};

// The attention mask.
struct Mask {
  const int32_t* segments;  // of this sequence, or null
  int64_t window;           // 0: all earlier keys

  // The first block of keys that a block of queries attends to.
  int64_t First(int64_t query) const {
    return window ? std::max<int64_t>(0, query - window + 1) / kSide * kSide : 0;
  }
  // Whether every query of a block attends to every key of a block.
  bool All(int64_t query, int64_t key) const {
    return !segments && key < query && (!window || query + kSide - 1 - key < window);
  }
  // Mask of the 16 keys from `key` that a query attends to.
  __mmask16 Keep(int64_t query, int64_t key) const {
    __m512i keys = _mm512_add_epi32(_mm512_set1_epi32(key), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                                                              13, 14, 15));
    __mmask16 keep = _mm512_cmple_epi32_mask(keys, _mm512_set1_epi32(query));
    if (window) keep &= _mm512_cmpgt_epi32_mask(keys, _mm512_set1_epi32(query - window));
    if (segments)
      keep &= _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(segments + key), _mm512_set1_epi32(segments[query]));
    return keep;
  }
};

// Both pack an array [T, C], whose rows are `width` elements apart, as a right operand. `PackRows` packs it for a
// matmul that contracts its rows, `PackColumns` for one that contracts its columns.
template <int P, typename S>
void PackRows(const S* x, int64_t width, int64_t T, int64_t C, bf16* to) {
  for (int64_t c = 0; c < C; c += kSide)
    for (int64_t t = 0; t < T; t += kDepth, to += P * kBlock) PackRight<P>(x + t * width + c, width, to);
}
template <int P, typename S>
void PackColumns(const S* x, int64_t width, int64_t T, int64_t C, bf16* to) {
  for (int64_t t = 0; t < T; t += kSide)
    for (int64_t c = 0; c < C; c += kDepth, to += P * kBlock) PackRightFromColumns<P>(x + t * width + c, width, to);
}

template <typename S>
void AttentionAs(ffi::ThreadPool& pool, const ffi::AnyBuffer& qkv, const Segments& segments, int64_t window, S* y,
                 float* log_sums) {
  constexpr int P = kPlanes<S>;
  Shape s(qkv);
  int64_t T = s.T, C = s.C, H = s.H(), R = s.R();
  const float scale = 1.0f / std::sqrt(static_cast<float>(C));
  Parallel(pool, s.B * s.G, [&](int64_t task) {
    TileScope tiles;
    int64_t b = task / s.G, g = task % s.G;
    const S* head = Data<S>(qkv) + b * T * s.row() + g * s.E * C;
    Mask mask{segments.element_count() ? segments.typed_data() + b * T : nullptr, window};
    bf16* keys = Scratch<struct KeyColumns, bf16>(T * C * P);
    bf16* values = Scratch<struct ValueRows, bf16>(T * C * P);
    float* scores = Scratch<struct Scores, float>(kSide * T);
    bf16* weights = Scratch<struct Weights, bf16>(kSide * T * P);
    bf16* workspace = Scratch<struct Queries, bf16>(kSide * C * P);
    PackColumns<P>(head + R * C, s.row(), T, C, keys);
    PackRows<P>(head + (R + 1) * C, s.row(), T, C, values);
    alignas(64) float block[kBlock];
    for (int64_t r = 0; r < R; ++r) {
      int64_t h = g * R + r;
      for (int64_t query = 0; query < T; query += kSide) {
        int64_t first = mask.First(query), last = query + kSide, width = last - first;
        Left q = RowsAsLeft(head + query * s.row() + r * C, s.row(), C, workspace);
        for (int64_t key = first; key < last; key += kSide)
          Multiply<P>(q, keys + key * C * P, C / kDepth, scores + key - first, width, false);
        float inverse[kSide];
        for (int64_t i = 0; i < kSide; ++i) {
          float* row = scores + i * width;
          __m512 largest = _mm512_set1_ps(kMasked);
          for (int64_t key = first; key < last; key += kSide) {
            bool all = mask.All(query, key);
            for (int64_t half = 0; half < kSide; half += 16) {
              float* at = row + key - first + half;
              __m512 x = Load(at);
              if (!all) {
                x = _mm512_mask_blend_ps(mask.Keep(query + i, key + half), _mm512_set1_ps(kMasked), x);
                Store(at, x);
              }
              largest = _mm512_max_ps(largest, x);
            }
          }
          float top = _mm512_reduce_max_ps(largest) * scale;
          __m512 total = _mm512_setzero_ps();
          for (int64_t j = 0; j < width; j += 16) {
            __m512 x = Exp(_mm512_fmsub_ps(Load(row + j), _mm512_set1_ps(scale), _mm512_set1_ps(top)));
            total = _mm512_add_ps(total, x);
            StoreLeft<P>(weights + j / kDepth * P * kBlock, i, j % kDepth, x);
          }
          float sum = _mm512_reduce_add_ps(total);
          inverse[i] = 1.0f / sum;
          log_sums[(b * H + h) * T + query + i] = top + std::log(sum);
        }
        for (int64_t c = 0; c < C; c += kSide) {
          Multiply<P>(InBlocks<P>(weights), values + (c * T + first * kSide) * P, width / kDepth, block, kSide, false);
          for (int64_t i = 0; i < kSide; ++i) {
            S* at = y + ((b * T + query + i) * H + h) * C + c;
            for (int64_t half = 0; half < kSide; half += 16)
              Store(at + half, _mm512_mul_ps(Load(block + i * kSide + half), _mm512_set1_ps(inverse[i])));
          }
        }
      }
    }
  });
}

inline ffi::Error Attention(ffi::ThreadPool pool, ffi::AnyBuffer qkv, Segments segments, AttentionOptions options,
                            ffi::Result<ffi::AnyBuffer> y, ffi::Result<Sums> log_sums) {
  if (qkv.dimensions().size() != 5) return DoNotFit();
  Shape s(qkv);
  if (!s.in_blocks()) return NotInBlocks();
  if (!s.fits(segments) || !Have(s.outputs(), *y) || !Have(s.B * s.H() * s.T, *log_sums) || !Alike(qkv, *y))
    return DoNotFit();
  if (IsFloat32(qkv))
    AttentionAs(pool, qkv, segments, options.window, Data<float>(y), log_sums->typed_data());
  else
    AttentionAs(pool, qkv, segments, options.window, Data<bf16>(y), log_sums->typed_data());
  return ffi::Error::Success();
}

// For each of 32 queries, the sum over channels of the output times its gradient.
template <typename S>
void RowSums(const S* y, const S* dy, int64_t width, int64_t C, float* sums) {
  for (int64_t i = 0; i < kSide; ++i) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < C; c += 16)
      total = _mm512_fmadd_ps(Load(y + i * width + c), Load(dy + i * width + c), total);
    sums[i] = _mm512_reduce_add_ps(total);
  }
}

template <typename S>
void StoreRows(const float* x, float factor, int64_t rows, int64_t C, S* to, int64_t width) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < C; c += 16)
      Store(to + i * width + c, _mm512_mul_ps(Load(x + i * C + c), _mm512_set1_ps(factor)));
}

template <typename S>
void AttentionGradientAs(ffi::ThreadPool& pool, const ffi::AnyBuffer& qkv, const Segments& segments, const S* y,
                         const float* log_sums, const S* dy, int64_t window, S* dqkv) {
  constexpr int P = kPlanes<S>;
  Shape s(qkv);
  int64_t T = s.T, C = s.C, H = s.H(), R = s.R();
  const float scale = 1.0f / std::sqrt(static_cast<float>(C));
  Parallel(pool, s.B * s.G, [&](int64_t task) {
    TileScope tiles;
    int64_t b = task / s.G, g = task % s.G;
    const S* head = Data<S>(qkv) + b * T * s.row() + g * s.E * C;
    S* dhead = dqkv + b * T * s.row() + g * s.E * C;
    Mask mask{segments.element_count() ? segments.typed_data() + b * T : nullptr, window};
    bf16* key_columns = Scratch<struct KeyColumns, bf16>(T * C * P);
    bf16* value_columns = Scratch<struct ValueColumns, bf16>(T * C * P);
    bf16* key_rows = Scratch<struct KeyRows, bf16>(T * C * P);
    // Left operands of matmuls that contract keys, in blocks of 32 queries and 32 keys.
    bf16* weights = Scratch<struct Weights, bf16>(kQueries * T * P);
    bf16* dscores = Scratch<struct ScoreGradients, bf16>(kQueries * T * P);
    float* dkeys = Scratch<struct KeyGradients, float>(T * C);
    float* dvalues = Scratch<struct ValueGradients, float>(T * C);
    bf16* query_rows = Scratch<struct QueryRows, bf16>(kQueries * C * P);
    bf16* dy_rows = Scratch<struct OutputRows, bf16>(kQueries * C * P);
    bf16* workspace = Scratch<struct Queries, bf16>(2 * kSide * C * P);
    bf16* transposed = Scratch<struct Transposed, bf16>(kSide * kQueries * P);
    float* dqueries = Scratch<struct QueryGradients, float>(kQueries * C);
    PackColumns<P>(head + R * C, s.row(), T, C, key_columns);
    PackRows<P>(head + R * C, s.row(), T, C, key_rows);
    PackColumns<P>(head + (R + 1) * C, s.row(), T, C, value_columns);
    std::fill(dkeys, dkeys + T * C, 0.0f);
    std::fill(dvalues, dvalues + T * C, 0.0f);
    alignas(64) float block[kBlock], dblock[kBlock];
    for (int64_t r = 0; r < R; ++r) {
      int64_t h = g * R + r, wide = H * C;
      for (int64_t begin = 0; begin < T; begin += kQueries) {
        int64_t end = std::min(T, begin + kQueries), count = end - begin;
        int64_t first = mask.First(begin), keys = (end - first) / kSide;  // blocks of keys
        const S* q = head + begin * s.row() + r * C;
        const S* out = y + ((b * T + begin) * H + h) * C;
        const S* dout = dy + ((b * T + begin) * H + h) * C;
        for (int64_t query = begin; query < end; query += kSide) {
          int64_t top = query - begin;
          float sums[kSide];
          RowSums(out + top * wide, dout + top * wide, wide, C, sums);
          const float* logs = log_sums + (b * H + h) * T + query;
          Left q_left = RowsAsLeft(q + top * s.row(), s.row(), C, workspace);
          Left dy_left = RowsAsLeft(dout + top * wide, wide, C, workspace + kSide * C * P);
          for (int64_t key = first; key < end; key += kSide) {
            int64_t at = (top / kSide * keys + (key - first) / kSide) * P * kBlock;
            if (key > query || key < mask.First(query)) {
              std::fill(weights + at, weights + at + P * kBlock, bf16{0});
              std::fill(dscores + at, dscores + at + P * kBlock, bf16{0});
              continue;
            }
            Multiply<P>(q_left, key_columns + key * C * P, C / kDepth, block, kSide, false);
            Multiply<P>(dy_left, value_columns + key * C * P, C / kDepth, dblock, kSide, false);
            bool all = mask.All(query, key);
            for (int64_t i = 0; i < kSide; ++i) {
              for (int64_t half = 0; half < kSide; half += 16) {
                __m512 x = Load(block + i * kSide + half);
                x = Exp(_mm512_fmsub_ps(x, _mm512_set1_ps(scale), _mm512_set1_ps(logs[i])));
                if (!all) x = _mm512_maskz_mov_ps(mask.Keep(query + i, key + half), x);
                __m512 dx = _mm512_sub_ps(Load(dblock + i * kSide + half), _mm512_set1_ps(sums[i]));
                StoreLeft<P>(weights + at, i, half, x);
                StoreLeft<P>(dscores + at, i, half, _mm512_mul_ps(x, dx));
              }
            }
          }
        }
        for (int64_t c = 0; c < C; c += kSide)
          for (int64_t row = 0; row < count; row += kSide)
            Multiply<P>(InBlocks<P>(dscores + row / kSide * keys * P * kBlock), key_rows + (c * T + first * kSide) * P,
                        keys, dqueries + row * C + c, C, false);
        StoreRows(dqueries, scale, count, C, dhead + begin * s.row() + r * C, s.row());
        PackRows<P>(q, s.row(), count, C, query_rows);
        PackRows<P>(dout, wide, count, C, dy_rows);
        for (int64_t key = 0; key < keys; ++key) {
          // Queries before this block of keys do not attend to it.
          int64_t skipped = std::max<int64_t>(0, first + key * kSide - begin) / kSide, steps = count / kSide - skipped;
          for (auto [from, right, to] : {std::tuple{dscores, query_rows, dkeys}, {weights, dy_rows, dvalues}}) {
            for (int64_t step = 0; step < steps; ++step)
              for (int p = 0; p < P; ++p)
                PackLeftFromColumns<1>(from + (((skipped + step) * keys + key) * P + p) * kBlock, kDepth,
                                       transposed + (step * P + p) * kBlock);
            for (int64_t c = 0; c < C; c += kSide)
              Multiply<P>(InBlocks<P>(transposed), right + (c * count + skipped * kBlock) * P, steps,
                          to + (first + key * kSide) * C + c, C, true);
          }
        }
      }
    }
    StoreRows(dkeys, scale, T, C, dhead + R * C, s.row());
    StoreRows(dvalues, 1.0f, T, C, dhead + (R + 1) * C, s.row());
  });
}

inline ffi::Error AttentionGradient(ffi::ThreadPool pool, ffi::AnyBuffer qkv, Segments segments, ffi::AnyBuffer y,
                                    Sums log_sums, ffi::AnyBuffer dy, AttentionOptions options,
                                    ffi::Result<ffi::AnyBuffer> dqkv) {
  if (qkv.dimensions().size() != 5) return DoNotFit();
  Shape s(qkv);
  if (!s.in_blocks()) return NotInBlocks();
  if (!s.fits(segments) || !Have(s.outputs(), y, dy) || !Have(s.B * s.H() * s.T, log_sums) ||
      !Have(qkv.element_count(), *dqkv) || !Alike(qkv, y, dy, *dqkv))
    return DoNotFit();
  if (IsFloat32(qkv))
    AttentionGradientAs(pool, qkv, segments, Data<float>(y), log_sums.typed_data(), Data<float>(dy), options.window,
                        Data<float>(dqkv));
  else
    AttentionGradientAs(pool, qkv, segments, Data<bf16>(y), log_sums.typed_data(), Data<bf16>(dy), options.window,
                        Data<bf16>(dqkv));
  return ffi::Error::Success();
}

}  // namespace gptjax
