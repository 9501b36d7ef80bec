// Products of small matrices of bfloat16, summed in float32: by AMX (Intel's tiles) or by AVX-512's pair products.
//
// The left operand lies in rows. The right one is packed in panels of 32 columns; in each, two rows that follow one
// another lie interleaved, element by element, so that a pair is one word of 32 bits, as both instruction sets want it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace gptjax {

using bf16 = uint16_t;

constexpr int64_t kSide = 32;             // rows and columns of a block of results
constexpr int64_t kDepth = 32;            // summed in one step
constexpr int64_t kHalf = kSide / 2;      // rows or columns of a tile
constexpr int64_t kTile = kHalf * kDepth; // elements of a tile

// Where a tile of the left operand begins, and how far it is to its next row and to what is summed in the next step.
struct Left {
  const bf16* at;
  int64_t row;
  int64_t step;
};

inline Left InRows(const bf16* at, int64_t width) { return {at, width, kDepth}; }
// Packed: 32 rows of 32 follow one another, then those of the next step.
inline Left InTiles(const bf16* at) { return {at, kDepth, 2 * kTile}; }

#if defined(__AMX_BF16__)

// Sets this thread's tiles up for `Multiply`, and lets go of them at the end.
class TileScope {
 public:
  TileScope() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

// c [32, 32] (+)= left [32, 32 steps] right [32 steps, 32], rows of c being `width` apart.
inline void Multiply(Left left, const bf16* right, int64_t steps, float* c, int64_t width, bool add) {
  if (add) {
    _tile_loadd(0, c, width * 4);
    _tile_loadd(1, c + 16, width * 4);
    _tile_loadd(2, c + 16 * width, width * 4);
    _tile_loadd(3, c + 16 * width + 16, width * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const bf16 *first = left.at, *second = first + 16 * left.row;
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(6, right, 128);
    _tile_loadd(4, first, left.row * 2);
    _tile_loadd(7, right + 32, 128);
    _tile_loadd(5, second, left.row * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    first += left.step;
    second += left.step;
    right += 2 * kTile;
  }
  _tile_stored(0, c, width * 4);
  _tile_stored(1, c + 16, width * 4);
  _tile_stored(2, c + 16 * width, width * 4);
  _tile_stored(3, c + 16 * width + 16, width * 4);
}

#else

class TileScope {};

inline void Multiply(Left left, const bf16* right, int64_t steps, float* c, int64_t width, bool add) {
  for (int64_t top = 0; top < 32; top += 8) {
    const bf16* rows = left.at + top * left.row;
    __m512 sums[8][2];
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 2; ++j)
        sums[i][j] = add ? _mm512_loadu_ps(c + (top + i) * width + 16 * j) : _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step) {
      for (int pair = 0; pair < 16; ++pair) {
        const bf16* b = right + step * 2 * kTile + pair * 64;
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          int32_t both;
          std::memcpy(&both, rows + i * left.row + step * left.step + 2 * pair, 4);
          __m512bh a = (__m512bh)_mm512_set1_epi32(both);
          sums[i][0] = _mm512_dpbf16_ps(sums[i][0], a, b0);
          sums[i][1] = _mm512_dpbf16_ps(sums[i][1], a, b1);
        }
      }
    }
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + (top + i) * width + 16 * j, sums[i][j]);
  }
}

#endif

inline __m512i Float32Bits(__m256i x) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
inline __m512 LoadBf16(const bf16* x) {
  return _mm512_castsi512_ps(Float32Bits(_mm256_loadu_si256((const __m256i*)x)));
}
inline __m256i ToBf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void StoreBf16(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, ToBf16(x)); }
inline __m256i LoadAsBf16(const bf16* x) { return _mm256_loadu_si256((const __m256i*)x); }
inline __m256i LoadAsBf16(const float* x) { return ToBf16(_mm512_loadu_ps(x)); }

// Two rows of 16 numbers as 16 pairs.
inline __m512i Pairs(__m256i upper, __m256i lower) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(upper), Float32Bits(lower));
}

// Turns 16 x 16 words of 32 bits around.
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

// Packs 32 rows and 32 columns of a right operand that lies in rows.
template <typename T>
inline void PackRight(const T* from, int64_t width, bf16* to) {
  for (int pair = 0; pair < 16; ++pair, from += 2 * width, to += 64) {
    _mm512_storeu_si512(to, Pairs(LoadAsBf16(from), LoadAsBf16(from + width)));
    _mm512_storeu_si512(to + 32, Pairs(LoadAsBf16(from + 16), LoadAsBf16(from + width + 16)));
  }
}

inline __m512i Load32AsBf16(const bf16* x) { return _mm512_loadu_si512(x); }
inline __m512i Load32AsBf16(const float* x) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(LoadAsBf16(x)), LoadAsBf16(x + 16), 1);
}

// The same for one that lies in columns: 32 columns of 32 numbers each.
template <typename T>
inline void PackRightFromColumns(const T* from, int64_t width, bf16* to) {
  for (int half = 0; half < 2; ++half) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = Load32AsBf16(from + (16 * half + i) * width);
    Transpose(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 64 * i + 32 * half, r[i]);
  }
}

// Packs 32 rows of a left operand that lies in columns, 32 of them: `from` has 32 rows of 32.
inline void PackLeftFromColumns(const bf16* from, int64_t width, bf16* to) {
  for (int half = 0; half < 2; ++half) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
      const bf16* x = from + 2 * i * width + 16 * half;
      r[i] = Pairs(LoadAsBf16(x), LoadAsBf16(x + width));
    }
    Transpose(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + kTile * half + 32 * i, r[i]);
  }
}

}  // namespace gptjax
