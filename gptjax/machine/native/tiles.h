// Matrix multiplication of small blocks with float32 sums, by AMX (Intel's tiles) or by the AVX-512 instruction for
// pairs of bfloat16.
//
// Operands are stored as planes of bfloat16: one plane for a bfloat16 matrix, three planes for a float32 matrix, which
// is their sum. Of the nine matmuls of two planes, the six largest are summed; the other three are below the rounding
// error of float32 (arXiv:1904.06376, section 3).
//
// The left operand is stored in rows, or packed in blocks of 32 x 32. The right operand is packed in panels of 32
// columns. In a panel, two consecutive rows are interleaved element by element, so that each pair is one word of 32
// bits, as both instruction sets expect.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(GPTJAX_TILES_HEADER)  // in tests: emulates the AMX instructions
#include GPTJAX_TILES_HEADER
#define GPTJAX_TILES 1
#elif !defined(GPTJAX_WITHOUT_TILES) && ((defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)) || \
                                         (defined(__AMXTILE__) && defined(__AMXBF16__) && defined(__AMXINT8__)))
#include "tile_instructions.h"
#define GPTJAX_TILES 1
#endif

namespace gptjax {

using bf16 = uint16_t;

constexpr int64_t kSide = 32;               // rows and columns of a block of results
constexpr int64_t kDepth = 32;              // contracted elements in one step
constexpr int64_t kBlock = kSide * kDepth;  // elements of a plane of a packed block

template <typename T>
constexpr int kPlanes = std::is_same_v<T, float> ? 3 : 1;

// The pairs of a left and a right plane that are multiplied, smallest terms first.
template <int P>
constexpr int kPlanePairs = P == 3 ? 6 : 1;
constexpr int kLeftPlane[] = {0, 0, 1, 1, 2, 0}, kRightPlane[] = {2, 1, 1, 0, 0, 0};
template <int P>
constexpr int LeftPlane(int i) {
  return P == 3 ? kLeftPlane[i] : 0;
}
template <int P>
constexpr int RightPlane(int i) {
  return P == 3 ? kRightPlane[i] : 0;
}

// 32 rows of a left operand.
struct Left {
  const bf16* at;  // its first element
  int64_t row;     // elements from one row to the next
  int64_t step;    // elements from one step of the contraction to the next
};

inline Left InRows(const bf16* at, int64_t width) { return {at, width, kDepth}; }
// The same, packed: for each step the planes of a block of 32 x 32.
template <int P>
inline Left InBlocks(const bf16* at) {
  return {at, kDepth, P * kBlock};
}

#if defined(GPTJAX_TILES)

// Configures this thread's tiles for `Multiply`, and releases them at the end.
class TileScope {
 public:
  TileScope() {
    TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.bytes_per_row[i] = 64;
      config.rows[i] = 16;
    }
    ConfigureTiles(config);
  }
  ~TileScope() { ReleaseTiles(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// c [32, 32] = left [32, 32 steps] right [32 steps, 32], added to the old c if `add`. The rows of c are `width`
// elements apart.
template <int P>
inline void Multiply(Left left, const bf16* right, int64_t steps, float* c, int64_t width, bool add) {
  if (add) {
    LoadTile<0>(c, width * 4);
    LoadTile<1>(c + 16, width * 4);
    LoadTile<2>(c + 16 * width, width * 4);
    LoadTile<3>(c + 16 * width + 16, width * 4);
  } else {
    ZeroTile<0>();
    ZeroTile<1>();
    ZeroTile<2>();
    ZeroTile<3>();
  }
  const bf16 *first = left.at, *second = first + 16 * left.row;
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 6
    for (int i = 0; i < kPlanePairs<P>; ++i) {
      if (i == 0 || RightPlane<P>(i) != RightPlane<P>(i - 1)) {
        LoadTile<6>(right + RightPlane<P>(i) * kBlock, 128);
        LoadTile<7>(right + RightPlane<P>(i) * kBlock + 32, 128);
      }
      if (i == 0 || LeftPlane<P>(i) != LeftPlane<P>(i - 1)) {
        LoadTile<4>(first + LeftPlane<P>(i) * kBlock, left.row * 2);
        LoadTile<5>(second + LeftPlane<P>(i) * kBlock, left.row * 2);
      }
      MultiplyTilesOfBf16<0, 4, 6>();
      MultiplyTilesOfBf16<1, 4, 7>();
      MultiplyTilesOfBf16<2, 5, 6>();
      MultiplyTilesOfBf16<3, 5, 7>();
    }
    first += left.step;
    second += left.step;
    right += P * kBlock;
  }
  StoreTile<0>(c, width * 4);
  StoreTile<1>(c + 16, width * 4);
  StoreTile<2>(c + 16 * width, width * 4);
  StoreTile<3>(c + 16 * width + 16, width * 4);
}

#else

class TileScope {
 public:
  TileScope() {}
};

template <int P>
inline void Multiply(Left left, const bf16* right, int64_t steps, float* c, int64_t width, bool add) {
  for (int64_t top = 0; top < 32; top += 8) {
    __m512 sums[8][2];
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 2; ++j)
        sums[i][j] = add ? _mm512_loadu_ps(c + (top + i) * width + 16 * j) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step) {
      for (int product = 0; product < kPlanePairs<P>; ++product) {
        const bf16* rows = left.at + top * left.row + step * left.step + LeftPlane<P>(product) * kBlock;
        const bf16* columns = right + (step * P + RightPlane<P>(product)) * kBlock;
        for (int pair = 0; pair < 16; ++pair) {
          const bf16* b = columns + pair * 64;
          __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) {
            int32_t both;
            std::memcpy(&both, rows + i * left.row + 2 * pair, 4);
            __m512bh a = (__m512bh)_mm512_set1_epi32(both);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], a, b0);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], a, b1);
          }
        }
      }
    }
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + (top + i) * width + 16 * j, sums[i][j]);
  }
}

#endif

inline __m512i Float32Bits(__m256i x) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
inline __m512 ToFloat32(__m256i x) { return _mm512_castsi512_ps(Float32Bits(x)); }
inline __m256i ToBf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512 Load(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 Load(const bf16* x) { return ToFloat32(_mm256_loadu_si256((const __m256i*)x)); }
inline void Store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void Store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, ToBf16(x)); }

// The planes of 16 numbers.
template <int P>
struct Planes {
  __m256i plane[P];
};

template <int P>
inline Planes<P> Split(__m512 x) {
  Planes<P> planes;
  for (int p = 0; p < P; ++p) {
    planes.plane[p] = ToBf16(x);
    if (p + 1 < P) x = _mm512_sub_ps(x, ToFloat32(planes.plane[p]));
  }
  return planes;
}

template <int P>
inline Planes<P> LoadPlanes(const float* x) {
  return Split<P>(_mm512_loadu_ps(x));
}
template <int P>
inline Planes<P> LoadPlanes(const bf16* x) {
  static_assert(P == 1);
  return {{_mm256_loadu_si256((const __m256i*)x)}};
}

// Interleaves two rows of 16 numbers into 16 pairs.
inline __m512i Pairs(__m256i upper, __m256i lower) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(upper), Float32Bits(lower));
}

// Transposes 16 x 16 words of 32 bits.
inline void Transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Packs 32 rows and 32 columns of a right operand that is stored in rows.
template <int P, typename S>
inline void PackRight(const S* from, int64_t width, bf16* to) {
  for (int pair = 0; pair < 16; ++pair, from += 2 * width, to += 64) {
    for (int half = 0; half < 32; half += 16) {
      Planes<P> upper = LoadPlanes<P>(from + half), lower = LoadPlanes<P>(from + width + half);
      for (int p = 0; p < P; ++p)
        _mm512_storeu_si512(to + p * kBlock + 2 * half, Pairs(upper.plane[p], lower.plane[p]));
    }
  }
}

// The same for a right operand that is stored in columns: 32 columns of 32 numbers each.
template <int P, typename S>
inline void PackRightFromColumns(const S* from, int64_t width, bf16* to) {
  for (int half = 0; half < 2; ++half) {
    __m512i words[P][16];
    for (int i = 0; i < 16; ++i) {
      const S* column = from + (16 * half + i) * width;
      Planes<P> first = LoadPlanes<P>(column), second = LoadPlanes<P>(column + 16);
      for (int p = 0; p < P; ++p)
        words[p][i] = _mm512_inserti64x4(_mm512_castsi256_si512(first.plane[p]), second.plane[p], 1);
    }
    for (int p = 0; p < P; ++p) {
      Transpose(words[p]);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + p * kBlock + 64 * i + 32 * half, words[p][i]);
    }
  }
}

// Packs 32 rows and 32 columns of a left operand.
template <int P, typename S>
inline void PackLeft(const S* from, int64_t width, bf16* to) {
  for (int i = 0; i < kSide; ++i)
    for (int half = 0; half < 32; half += 16) {
      Planes<P> planes = LoadPlanes<P>(from + i * width + half);
      for (int p = 0; p < P; ++p)
        _mm256_storeu_si256((__m256i*)(to + p * kBlock + i * kDepth + half), planes.plane[p]);
    }
}

// The same for a left operand that is stored in columns: the 32 rows of `from` become columns.
template <int P, typename S>
inline void PackLeftFromColumns(const S* from, int64_t width, bf16* to) {
  for (int half = 0; half < 32; half += 16) {
    __m512i words[P][16];
    for (int i = 0; i < 16; ++i) {
      const S* x = from + 2 * i * width + half;
      Planes<P> upper = LoadPlanes<P>(x), lower = LoadPlanes<P>(x + width);
      for (int p = 0; p < P; ++p) words[p][i] = Pairs(upper.plane[p], lower.plane[p]);
    }
    for (int p = 0; p < P; ++p) {
      Transpose(words[p]);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + p * kBlock + (half + i) * kDepth, words[p][i]);
    }
  }
}

// Writes 16 numbers of row i into a packed block of a left operand.
template <int P>
inline void StoreLeft(bf16* block, int64_t i, int64_t half, __m512 x) {
  Planes<P> planes = Split<P>(x);
  for (int p = 0; p < P; ++p) _mm256_storeu_si256((__m256i*)(block + p * kBlock + i * kDepth + half), planes.plane[p]);
}

// 32 rows of `depth` numbers as a left operand: bfloat16 is read in place, float32 is packed into `workspace`.
inline Left RowsAsLeft(const bf16* from, int64_t width, int64_t, bf16*) { return InRows(from, width); }
inline Left RowsAsLeft(const float* from, int64_t width, int64_t depth, bf16* workspace) {
  for (int64_t k = 0; k < depth; k += kDepth) PackLeft<3>(from + k, width, workspace + k / kDepth * 3 * kBlock);
  return InBlocks<3>(workspace);
}

}  // namespace gptjax
