// What the instructions of gptjax/machine/native/tile_instructions.h compute, without AMX: so that the code that uses
// tiles is tested, and checked by sanitizers, on any processor with AVX-512 and bfloat16. Tiles that are used before they
// are configured, or are still configured when they are configured again, end the program.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace gptjax {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

struct EmulatedTiles {
  bool configured = false;
  alignas(64) char tile[8][16][64];
};
inline EmulatedTiles& TilesOfThread() {
  thread_local EmulatedTiles tiles;
  return tiles;
}
inline void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}
inline EmulatedTiles& ConfiguredTiles() {
  Require(TilesOfThread().configured, "used before they are configured");
  return TilesOfThread();
}

inline void ConfigureTiles(const TileConfig& config) {
  Require(!TilesOfThread().configured, "configured twice");
  Require(config.palette == 1 && config.start_row == 0, "a wrong palette or start row");
  for (int i = 0; i < 8; ++i) Require(config.bytes_per_row[i] == 64 && config.rows[i] == 16, "a wrong shape");
  for (int i = 8; i < 16; ++i) Require(config.bytes_per_row[i] == 0 && config.rows[i] == 0, "there are eight");
  std::memset(&TilesOfThread(), 0x7f, sizeof(EmulatedTiles));  // large numbers, where nothing was loaded
  TilesOfThread().configured = true;
}
inline void ReleaseTiles() { ConfiguredTiles().configured = false; }

template <int kTile>
inline void ZeroTile() {
  std::memset(ConfiguredTiles().tile[kTile], 0, sizeof(EmulatedTiles::tile[0]));
}
template <int kTile>
inline void LoadTile(const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(ConfiguredTiles().tile[kTile][i], (const char*)from + i * stride, 64);
}
template <int kTile>
inline void StoreTile(void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy((char*)to + i * stride, ConfiguredTiles().tile[kTile][i], 64);
}

template <int kSum, int kLeft, int kRight>
inline void MultiplyTilesOfBf16() {
  auto& tiles = ConfiguredTiles().tile;
  for (int i = 0; i < 16; ++i) {
    __m512 sum = _mm512_load_ps(tiles[kSum][i]);
    for (int k = 0; k < 16; ++k) {
      int32_t pair;
      std::memcpy(&pair, tiles[kLeft][i] + 4 * k, 4);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_load_si512(tiles[kRight][k]));
    }
    _mm512_store_ps(tiles[kSum][i], sum);
  }
}
template <int kSum, int kLeft, int kRight>
inline void MultiplyTilesOfInt8() {
  auto& tiles = ConfiguredTiles().tile;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      int32_t sum;
      std::memcpy(&sum, tiles[kSum][i] + 4 * j, 4);
      for (int k = 0; k < 64; ++k)
        sum += static_cast<int8_t>(tiles[kLeft][i][k]) * static_cast<int8_t>(tiles[kRight][k / 4][4 * j + k % 4]);
      std::memcpy(tiles[kSum][i] + 4 * j, &sum, 4);
    }
}

}  // namespace gptjax
