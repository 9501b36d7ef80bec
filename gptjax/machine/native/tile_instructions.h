// The AMX instructions that kernels use. Each declares to the compiler all memory that it reads or writes.
//
// The intrinsics of compilers do not. Those of GCC 12 declare 8 of the 64 bytes that `_tile_loadconfig` reads and none
// that `_tile_loadd` reads, so the compiler may move an earlier store behind the load.
#pragma once

#include <cstdint>

namespace gptjax {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

inline void ConfigureTiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void ReleaseTiles() { asm volatile("tilerelease"); }

template <int kTile>
inline void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows are `stride` bytes apart.
template <int kTile>
inline void LoadTile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
inline void StoreTile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}

// sum += left right; one word has two bfloat16 numbers or four int8 numbers.
template <int kSum, int kLeft, int kRight>
inline void MultiplyTilesOfBf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}
template <int kSum, int kLeft, int kRight>
inline void MultiplyTilesOfInt8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

}  // namespace gptjax
