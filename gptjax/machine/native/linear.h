// Linear layers: matmuls with weights, and the gradients of weights.
//
// N rows, K contracted, F outputs; all are multiples of 32. Activations are bfloat16 or float32 (`T`), weights may be
// float32 in both cases, accumulation is float32.
#pragma once

#include <algorithm>
#include <utility>

#include "threads.h"
#include "tiles.h"

namespace gptjax {

using Vector = ffi::BufferR1<ffi::F32>;
using Packed = ffi::BufferR1<ffi::BF16>;

constexpr int64_t kRowsAtOnce = 256;  // rows of the left operand in a task: they stay in the L2 cache

// Allocates parts of the XLA buffer into which a kernel packs its operands.
class Workspace {
 public:
  explicit Workspace(ffi::Result<Packed>& packed)
      : at_(reinterpret_cast<bf16*>(packed->typed_data())), left_(packed->element_count()) {}

  int64_t left() const { return left_; }
  bool enough() const { return left_ >= 0; }  // must be checked before memory that `Take` returned is used
  bf16* Take(int64_t count) {
    left_ -= count;
    return std::exchange(at_, at_ + count);
  }

 private:
  bf16* at_;
  int64_t left_;
};

template <typename T>
const T* Data(const ffi::AnyBuffer& x) {
  return static_cast<const T*>(x.untyped_data());
}
template <typename T>
T* Data(ffi::Result<ffi::AnyBuffer>& x) {
  return static_cast<T*>(x->untyped_data());
}

inline bool IsFloat32(const ffi::AnyBuffer& x) { return x.element_type() == ffi::F32; }
inline bool IsBf16(const ffi::AnyBuffer& x) { return x.element_type() == ffi::BF16; }

// Whether all are bfloat16, or all are float32.
template <typename... Others>
bool Alike(const ffi::AnyBuffer& x, const Others&... others) {
  return (IsFloat32(x) && ... && IsFloat32(others)) || (IsBf16(x) && ... && IsBf16(others));
}
// Whether weights are float32 or have the dtype of the activations.
template <typename... Weights>
bool Readable(const ffi::AnyBuffer& x, const Weights&... weights) {
  return (Alike(x) && ... && (IsFloat32(weights) || Alike(x, weights)));
}

inline ffi::Error NotInBlocks() { return ffi::Error::InvalidArgument("sizes must be multiples of 32"); }
inline ffi::Error DoNotFit() { return ffi::Error::InvalidArgument("buffers do not fit one another"); }
inline ffi::Error TooSmallWorkspace() { return ffi::Error::InvalidArgument("the workspace is too small"); }

// Whether each of the buffers has rows of at least one element.
template <typename... Buffers>
bool HaveRows(const Buffers&... buffers) {
  return ((buffers.dimensions().size() && buffers.dimensions().back() > 0) && ...);
}
// Whether each of the buffers has `count` elements.
template <typename... Buffers>
bool Have(int64_t count, const Buffers&... buffers) {
  return ((buffers.element_count() == static_cast<size_t>(count)) && ...);
}
// Whether the buffer has `count` elements, or none.
template <typename Buffer>
bool HasOrLacks(int64_t count, const Buffer& buffer) {
  return buffer.element_count() == 0 || Have(count, buffer);
}

// Packs a weight in panels of 32 outputs. It is [K, F], or [F, K] with `columns`.
template <int P, typename S>
void PackWeight(ffi::ThreadPool& pool, const S* w, bool columns, int64_t K, int64_t F, bf16* to) {
  Parallel(pool, F / kSide, [&](int64_t panel) {
    bf16* out = to + panel * kSide * K * P;
    for (int64_t k = 0; k < K; k += kDepth, out += P * kBlock) {
      if (columns)
        PackRightFromColumns<P>(w + panel * kSide * K + k, K, out);
      else
        PackRight<P>(w + k * F + panel * kSide, F, out);
    }
  });
}

template <int P>
void PackWeight(ffi::ThreadPool& pool, const ffi::AnyBuffer& w, bool columns, int64_t K, int64_t F, bf16* to) {
  if (IsFloat32(w)) return PackWeight<P>(pool, Data<float>(w), columns, K, F, to);
  if constexpr (P == 1) PackWeight<P>(pool, Data<bf16>(w), columns, K, F, to);
}

using Stream = ffi::Buffer<ffi::F32>;

// An array that is added to a result, if there is one.
struct Residual {
  const float* at;
  explicit Residual(const Stream& residual) : at(residual.element_count() ? residual.typed_data() : nullptr) {}
  __m512 operator()(int64_t element, __m512 x) const { return at ? _mm512_add_ps(Load(at + element), x) : x; }
};

struct Bias {
  const float* at;
  explicit Bias(const Vector& bias) : at(bias.element_count() ? bias.typed_data() : nullptr) {}
  __m512 operator()(int64_t column) const { return at ? Load(at + column) : _mm512_setzero_ps(); }
};

template <typename T, typename Out>
ffi::Error LinearAs(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, Bias bias,
                    Residual residual, bool columns, Out* y, int64_t N, int64_t K, int64_t F, Workspace all) {
  constexpr int P = kPlanes<T>;
  bf16* packed = all.Take(K * F * P);
  if (!all.enough()) return TooSmallWorkspace();
  PackWeight<P>(pool, w, columns, K, F, packed);
  const int64_t rows = RowsOfTask(pool, N, kRowsAtOnce, kSide), row_tasks = Ceil(N, rows);
  const int64_t column_tasks = SplitsPerTask(pool, row_tasks, F / kSide);
  const int64_t columns_of_task = Ceil(F / kSide, column_tasks) * kSide;
  Parallel(pool, row_tasks * column_tasks, [&](int64_t task) {
    const int64_t begin = task / column_tasks * rows, count = std::min(N - begin, rows);
    const int64_t first = task % column_tasks * columns_of_task, last = std::min(F, first + columns_of_task);
    if (first >= last) return;
    TileScope tiles;
    alignas(64) float block[kBlock];
    Left left[kRowsAtOnce / kSide];
    bf16* workspace = P == 1 ? nullptr : Scratch<struct LinearRows, bf16>(kRowsAtOnce * K * P);
    for (int64_t row = 0; row < count; row += kSide)
      left[row / kSide] = RowsAsLeft(Data<T>(x) + (begin + row) * K, K, K, workspace + row * K * P);
    for (int64_t column = first; column < last; column += kSide) {
      __m512 b[2] = {bias(column), bias(column + 16)};
      for (int64_t row = 0; row < count; row += kSide) {
        Multiply<P>(left[row / kSide], packed + column * K * P, K / kDepth, block, kSide, false);
        for (int64_t i = 0; i < kSide; ++i)
          for (int half = 0; half < 2; ++half) {
            int64_t to = (begin + row + i) * F + column + 16 * half;
            Store(y + to, residual(to, _mm512_add_ps(Load(block + i * kSide + 16 * half), b[half])));
          }
      }
    }
  });
  return ffi::Error::Success();
}

struct LinearOptions {
  bool columns;  // w is [F, K]
};

inline ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, Vector bias, Stream residual,
                         LinearOptions options, ffi::Result<ffi::AnyBuffer> y, ffi::Result<Packed> packed) {
  if (!HaveRows(x, *y)) return DoNotFit();
  int64_t K = x.dimensions().back(), N = x.element_count() / K, F = y->dimensions().back();
  if (N % kSide || K % kDepth || F % kSide) return NotInBlocks();
  if (!Have(K * F, w) || !Have(N * F, *y) || !HasOrLacks(F, bias) || !HasOrLacks(N * F, residual) || !Readable(x, w) ||
      !Readable(x, *y))
    return DoNotFit();
  auto run = [&](auto as, auto* to) {
    return LinearAs<decltype(as)>(pool, x, w, Bias(bias), Residual(residual), options.columns, to, N, K, F,
                                  Workspace(packed));
  };
  if (IsFloat32(x)) return run(float{}, Data<float>(y));
  return IsFloat32(*y) ? run(bf16{}, Data<float>(y)) : run(bf16{}, Data<bf16>(y));
}

// result [K, F] = left^T right, added to the old result if `add`. `count` rows of both operands are packed, in panels
// of 32 columns and steps of 32 rows.
template <int P>
void AddOuterProducts(ffi::ThreadPool& pool, const bf16* left, const bf16* right, int64_t count, int64_t K, int64_t F,
                      float* result, bool add) {
  constexpr int64_t kRows = 128, kColumns = 256;  // of a task, if there are enough tasks for all threads
  const int64_t tasks = Ceil(K, kRows) * Ceil(F, kColumns);
  const int64_t rows = std::max(kSide, kRows / SplitsPerTask(pool, tasks, kRows / kSide) / kSide * kSide);
  const int64_t splits = SplitsPerTask(pool, Ceil(K, rows) * Ceil(F, kColumns), kColumns / kSide);
  const int64_t columns = kColumns / splits / kSide * kSide;
  const int64_t width = std::max(kSide, columns), column_tasks = Ceil(F, width);
  Parallel(pool, Ceil(K, rows) * column_tasks, [&](int64_t task) {
    TileScope tiles;
    int64_t top = task / column_tasks * rows, bottom = std::min(K, top + rows);
    int64_t first = task % column_tasks * width, last = std::min(F, first + width);
    for (int64_t column = first; column < last; column += kSide)
      for (int64_t row = top; row < bottom; row += kSide)
        Multiply<P>(InBlocks<P>(left + row * count * P), right + column * count * P, count / kDepth,
                    result + row * F + column, F, add);
  });
}

// Packs `count` rows of 32 columns of x as a panel of a left operand, for a matmul that contracts rows.
template <int P, typename S>
void PackLeftPanel(const S* x, int64_t width, int64_t count, bf16* to) {
  for (int64_t n = 0; n < count; n += kDepth, to += P * kBlock) PackLeftFromColumns<P>(x + n * width, width, to);
}

template <typename T>
ffi::Error WeightGradientAs(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy, float* dw,
                            float* sums, int64_t N, int64_t K, int64_t F, Workspace workspace) {
  constexpr int P = kPlanes<T>;
  int64_t at_once = workspace.left() / ((K + F) * P) / kDepth * kDepth;
  if (!at_once) return TooSmallWorkspace();
  bf16 *left = workspace.Take(K * at_once * P), *right = workspace.Take(F * at_once * P);
  std::fill(sums, sums + F, 0.0f);
  for (int64_t begin = 0; begin < N; begin += at_once) {
    int64_t count = std::min(at_once, N - begin), lefts = K / kSide, rights = F / kSide;
    Parallel(pool, lefts + rights, [&](int64_t panel) {
      if (panel < lefts)
        return PackLeftPanel<P>(Data<T>(x) + begin * K + panel * kSide, K, count, left + panel * kSide * count * P);
      int64_t column = (panel - lefts) * kSide;
      const T* from = Data<T>(dy) + begin * F + column;
      bf16* out = right + column * count * P;
      __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t n = 0; n < count; n += kDepth, from += kDepth * F, out += P * kBlock) {
        PackRight<P>(from, F, out);
        for (int64_t i = 0; i < kDepth; ++i)
          for (int half = 0; half < 2; ++half)
            total[half] = _mm512_add_ps(total[half], Load(from + i * F + 16 * half));
      }
      for (int64_t at = column; at < column + kSide; at += 16)
        Store(sums + at, _mm512_add_ps(Load(sums + at), total[(at - column) / 16]));
    });
    AddOuterProducts<P>(pool, left, right, count, K, F, dw, begin > 0);
  }
  return ffi::Error::Success();
}

// Computes dw [K, F] = x^T dy and the sums of the columns of dy. The more space `packed` has, the more rows are packed
// at a time.
inline ffi::Error WeightGradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                                 ffi::Result<ffi::Buffer<ffi::F32>> dw, ffi::Result<Vector> sums,
                                 ffi::Result<Packed> packed) {
  if (!HaveRows(x, dy)) return DoNotFit();
  int64_t K = x.dimensions().back(), F = dy.dimensions().back(), N = x.element_count() / K;
  if (N % kDepth || K % kSide || F % kSide) return NotInBlocks();
  if (!Have(N * F, dy) || !Have(K * F, *dw) || !Have(F, *sums) || !Alike(x, dy)) return DoNotFit();
  auto run = IsFloat32(x) ? WeightGradientAs<float> : WeightGradientAs<bf16>;
  return run(pool, x, dy, dw->typed_data(), sums->typed_data(), N, K, F, Workspace(packed));
}

}  // namespace gptjax
