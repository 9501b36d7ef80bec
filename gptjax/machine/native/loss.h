// Cross-entropy over a vocabulary, given hidden states. Only the logits of some columns are in memory at a time. All
// logits are computed twice: first for the log-normalizers, then for the gradients.
//
// N rows, D width, V vocabulary; N and D are multiples of 32. A row whose target is -1 has no loss.
#pragma once

#include <algorithm>
#include <cmath>

#include "exponential.h"
#include "linear.h"

namespace gptjax {

constexpr int64_t kColumnsAtOnce = 1024;  // columns of the vocabulary
constexpr int64_t kLossRows = 64;         // largest number of rows in a task
constexpr float kNoLogit = -1e30f;

struct LossOptions {
  int64_t vocab_size;  // columns from here on are padding
  float smoothing, z_loss;
};

// Packs columns [first, first + count) of the vocabulary, padded with zeros: into `to` as right operands of the matmul
// that computes the logits, and, unless `back` is null, into `back` as right operands of the matmul with their
// gradients.
template <int P, typename S>
void PackColumnsOfVocabulary(ffi::ThreadPool& pool, const S* w, int64_t V, int64_t D, int64_t first, int64_t count,
                             bf16* to, bf16* back) {
  Parallel(pool, count / kSide, [&](int64_t panel) {
    int64_t begin = first + panel * kSide, rows = std::clamp<int64_t>(V - begin, 0, kSide);
    const S* from = w + begin * D;
    if (rows < kSide) {
      S* padded = Scratch<struct PaddedRows, S>(kSide * D);
      std::copy(from, from + rows * D, padded);
      std::fill(padded + rows * D, padded + kSide * D, S{0});
      from = padded;
    }
    for (int64_t d = 0; d < D; d += kDepth) {
      PackRightFromColumns<P>(from + d, D, to + (panel * D + d) * kSide * P);
      if (back) PackRight<P>(from + d, D, back + (d * count + panel * kBlock) * P);
    }
  });
}

// Computes the logits of 32 rows and `count` columns.
template <int P>
void Logits(Left x, const bf16* columns, int64_t D, int64_t first, int64_t count, int64_t vocab_size, float* logits) {
  for (int64_t column = 0; column < count; column += kSide)
    Multiply<P>(x, columns + column * D * P, D / kDepth, logits + column, count, false);
  for (int64_t column = std::max<int64_t>(0, vocab_size - first); column < count; ++column)
    for (int64_t i = 0; i < kSide; ++i) logits[i * count + column] = kNoLogit;
}

template <typename T, typename S>
ffi::Error CrossEntropyAs(ffi::ThreadPool& pool, const T* x, const S* w, const int32_t* targets, int64_t N, int64_t D,
                          int64_t V, LossOptions options, float* log_z, float* at_target, float* total, float* dx,
                          float* dw, Workspace workspace) {
  constexpr int P = kPlanes<T>;
  bf16* columns = workspace.Take(kColumnsAtOnce * D * P);
  bf16* back = dx ? workspace.Take(kColumnsAtOnce * D * P) : nullptr;
  bf16* x_right = dx ? workspace.Take(N * D * P) : nullptr;
  bf16* dlogits = dx ? workspace.Take(N * kColumnsAtOnce * P) : nullptr;  // blocks of 32 rows, then of 32 columns
  if (!workspace.enough()) return TooSmallWorkspace();
  auto over_rows = [&](int64_t first, auto&& visit) {  // calls visit(row, logits, count) for 32 rows at a time
    int64_t count = std::min<int64_t>(kColumnsAtOnce, (V - first + kSide - 1) / kSide * kSide);
    PackColumnsOfVocabulary<P>(pool, w, V, D, first, count, columns, back);
    const int64_t rows = RowsOfTask(pool, N, kLossRows, kSide);
    Parallel(pool, Ceil(N, rows), [&](int64_t task) {
      TileScope tiles;
      float* logits = Scratch<struct LogitsOfRows, float>(kSide * kColumnsAtOnce);
      bf16* packed = Scratch<struct LossRows, bf16>(kSide * D * P);
      for (int64_t row = task * rows; row < std::min(N, (task + 1) * rows); row += kSide) {
        Logits<P>(RowsAsLeft(x + row * D, D, D, packed), columns, D, first, count, options.vocab_size, logits);
        visit(row, logits, count);
      }
    });
    return count;
  };

  std::fill(log_z, log_z + N, kNoLogit);  // log-normalizers over the columns so far
  std::fill(at_target, at_target + N, 0.0f);
  std::fill(total, total + N, 0.0f);
  for (int64_t first = 0; first < V; first += kColumnsAtOnce) {
    over_rows(first, [&](int64_t row, const float* logits, int64_t count) {
      int64_t real = std::clamp<int64_t>(options.vocab_size - first, 0, count);
      for (int64_t i = 0; i < kSide; ++i, logits += count) {
        __m512 largest = _mm512_set1_ps(log_z[row + i]), sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < count; j += 16) largest = _mm512_max_ps(largest, Load(logits + j));
        float top = _mm512_reduce_max_ps(largest);
        for (int64_t j = 0; j < count; j += 16)
          sum = _mm512_add_ps(sum, Exp(_mm512_sub_ps(Load(logits + j), _mm512_set1_ps(top))));
        log_z[row + i] = top + std::log(_mm512_reduce_add_ps(sum) + std::exp(log_z[row + i] - top));
        int64_t target = targets[row + i] - first;
        if (target >= 0 && target < count) at_target[row + i] = logits[target];
        if (options.smoothing)
          for (int64_t j = 0; j < real; ++j) total[row + i] += logits[j];
      }
    });
  }
  if (!dx) return ffi::Error::Success();

  Parallel(pool, D / kSide, [&](int64_t panel) {
    for (int64_t n = 0; n < N; n += kDepth)
      PackRight<P>(x + n * D + panel * kSide, D, x_right + (panel * N + n) * kSide * P);
  });
  std::fill(dx, dx + N * D, 0.0f);
  for (int64_t first = 0; first < V; first += kColumnsAtOnce) {
    int64_t count = over_rows(first, [&](int64_t row, const float* logits, int64_t count) {
      bf16* out = dlogits + row * count * P;
      for (int64_t i = 0; i < kSide; ++i) {
        const float* from = logits + i * count;
        bool counts = targets[row + i] >= 0;
        float z = log_z[row + i], weight = counts ? 1.0f + 2.0f * options.z_loss * z : 0.0f;
        float even = counts ? options.smoothing / options.vocab_size : 0.0f;
        int64_t target = counts ? targets[row + i] - first : -1;
        for (int64_t j = 0; j < count; j += 16) {
          __m512 logit = Load(from + j);
          __mmask16 real = _mm512_cmp_ps_mask(logit, _mm512_set1_ps(kNoLogit), _CMP_NEQ_UQ);
          __m512 d = _mm512_mul_ps(Exp(_mm512_sub_ps(logit, _mm512_set1_ps(z))), _mm512_set1_ps(weight));
          d = _mm512_maskz_sub_ps(real, d, _mm512_set1_ps(even));
          if (target >= j && target < j + 16)
            d = _mm512_mask_sub_ps(d, 1 << (target - j), d, _mm512_set1_ps(1.0f - options.smoothing));
          StoreLeft<P>(out + j / kDepth * P * kBlock, i, j % kDepth, d);
        }
      }
      for (int64_t d = 0; d < D; d += kSide)
        Multiply<P>(InBlocks<P>(out), back + d * count * P, count / kDepth, dx + row * D + d, D, true);
    });
    constexpr int64_t kColumns = 128;  // largest number of columns in a task
    const int64_t width = RowsOfTask(pool, count, kColumns, kSide), column_tasks = Ceil(count, width);
    const int64_t splits = std::min<int64_t>(Ceil(Threads(pool), column_tasks), D / kSide);
    const int64_t depth = Ceil(D / kSide, splits) * kSide;
    Parallel(pool, column_tasks * splits, [&](int64_t task) {
      TileScope tiles;
      alignas(64) float block[kBlock];
      int64_t begin = task / splits * width, end = std::min(count, begin + width);
      bf16* transposed = Scratch<struct TransposedLogits, bf16>(kColumns * N * P);
      for (int64_t column = begin; column < end; column += kSide)
        for (int64_t n = 0; n < N; n += kDepth)
          for (int p = 0; p < P; ++p)
            PackLeftFromColumns<1>(dlogits + ((n * count + column * kSide) * P) + p * kBlock, kDepth,
                                   transposed + ((column - begin) * N + n * kSide) * P + p * kBlock);
      for (int64_t d = task % splits * depth; d < std::min(D, (task % splits + 1) * depth); d += kSide)
        for (int64_t column = begin; column < end; column += kSide) {
          Multiply<P>(InBlocks<P>(transposed + (column - begin) * N * P), x_right + d * N * P, N / kDepth, block, kSide,
                      false);
          for (int64_t i = 0; i < std::min(kSide, V - first - column); ++i)
            std::copy(block + i * kSide, block + (i + 1) * kSide, dw + (first + column + i) * D + d);
        }
    });
  }
  return ffi::Error::Success();
}

struct LossParts {
  ffi::Result<Vector>&log_z, &at_target, &total;
};

inline ffi::Error CrossEntropyOf(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w,
                                 const ffi::BufferR1<ffi::S32>& targets, LossOptions options, LossParts parts,
                                 float* dx, float* dw, Workspace workspace) {
  if (!HaveRows(x, w)) return DoNotFit();
  int64_t D = x.dimensions().back(), N = x.element_count() / D, V = w.dimensions().front();
  if (N % kSide || D % kSide) return NotInBlocks();
  if (!Have(V * D, w) || !Have(N, targets, *parts.log_z, *parts.at_target, *parts.total) || !Readable(x, w))
    return DoNotFit();
  auto run = [&](auto* x, auto* w) {
    return CrossEntropyAs(pool, x, w, targets.typed_data(), N, D, V, options, parts.log_z->typed_data(),
                          parts.at_target->typed_data(), parts.total->typed_data(), dx, dw, workspace);
  };
  if (IsFloat32(x)) return run(Data<float>(x), Data<float>(w));
  return IsFloat32(w) ? run(Data<bf16>(x), Data<float>(w)) : run(Data<bf16>(x), Data<bf16>(w));
}

inline ffi::Error CrossEntropy(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                               ffi::BufferR1<ffi::S32> targets, LossOptions options, ffi::Result<Vector> log_z,
                               ffi::Result<Vector> at_target, ffi::Result<Vector> total,
                               ffi::Result<Packed> packed) {
  return CrossEntropyOf(pool, x, w, targets, options, {log_z, at_target, total}, nullptr,
                        nullptr, Workspace(packed));
}

inline ffi::Error CrossEntropyGradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                                       ffi::BufferR1<ffi::S32> targets, LossOptions options,
                                       ffi::Result<Vector> log_z, ffi::Result<Vector> at_target,
                                       ffi::Result<Vector> total, ffi::Result<ffi::Buffer<ffi::F32>> dx,
                                       ffi::Result<ffi::Buffer<ffi::F32>> dw, ffi::Result<Packed> packed) {
  if (!Have(x.element_count(), *dx) || !Have(w.element_count(), *dw)) return DoNotFit();
  return CrossEntropyOf(pool, x, w, targets, options, {log_z, at_target, total},
                        dx->typed_data(), dw->typed_data(), Workspace(packed));
}

}  // namespace gptjax
