// Products on the matrix tiles of AMX (Sapphire Rapids and later): eight registers of 16 rows of
// 64 bytes. One instruction adds a (16, 16 units) times b (16 units, 16) to sums (16, 16) in fp32,
// where a unit is two neighbouring bf16: the operands of tiles.h as they lie. Subnormal numbers
// count as zero, as they do for vdpbf16ps.
#pragma once
#include "vec.h"

LX_NAMESPACE_BEGIN

constexpr int kAmxSide = 16;  // of a tile of sums, in numbers

#if defined(__AMX_BF16__)
template <class E> constexpr bool kAmx = std::is_same_v<E, bf16>;

// Gives the tile registers of this thread their shape, as long as this lives.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, reserved[15] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    // _tile_loadconfig says of eight bytes only that it reads them.
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// One instruction each, on the tile registers with these numbers; rows lie `bytes` apart.
template <int tile> inline void amx_load(const float* p, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(tile) : "memory");
}
template <int tile> inline void amx_store(float* p, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(bytes), "i"(tile) : "memory");
}
template <int tile> inline void amx_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(tile)); }
template <int sum, int a, int b> inline void amx_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// c (16 groups, 16 vecs) = or += a (16 groups, K units) b (K units, 16 vecs), K a multiple of 16.
// The four sums, in registers 0 to 3, are 1 group by up to 4 vectors or 2 by up to 2.
template <bool kAdd, int groups, int vecs>
inline void amx_product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b,
                        int64_t ldb, int64_t K) {
  static_assert(groups == 1 || (groups == 2 && vecs <= 2));
  constexpr int64_t kSide = kAmxSide;
  float* c_low = c + kSide * ldc;
  const float* a_low = a + kSide * lda;
  const int64_t b_next = kSide * ldb;
  lda *= sizeof(float), ldb *= sizeof(float), ldc *= sizeof(float);  // the instructions count bytes
  asm volatile("" ::: "memory");  // _tile_loadd does not say that it reads memory
  if (kAdd) {
    _tile_loadd(0, c, ldc);
    if (vecs > 1) _tile_loadd(1, c + kSide, ldc);
    if (groups == 2) _tile_loadd(2, c_low, ldc);
    else if (vecs > 2) _tile_loadd(2, c + 2 * kSide, ldc);
    if (groups == 2 && vecs == 2) _tile_loadd(3, c_low + kSide, ldc);
    else if (vecs > 3) _tile_loadd(3, c + 3 * kSide, ldc);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += kSide, a += kSide, a_low += kSide, b += b_next) {
    _tile_loadd(4, a, lda);
    _tile_loadd(6, b, ldb);
    _tile_dpbf16ps(0, 4, 6);
    if (groups == 2) {
      _tile_loadd(5, a_low, lda);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (vecs > 1) {
      _tile_loadd(7, b + kSide, ldb);
      _tile_dpbf16ps(1, 4, 7);
      if (groups == 2) _tile_dpbf16ps(3, 5, 7);
    }
    if (vecs > 2) {
      _tile_loadd(5, b + 2 * kSide, ldb);
      _tile_dpbf16ps(2, 4, 5);
    }
    if (vecs > 3) {
      _tile_loadd(6, b + 3 * kSide, ldb);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, c, ldc);
  if (vecs > 1) _tile_stored(1, c + kSide, ldc);
  if (groups == 2) _tile_stored(2, c_low, ldc);
  else if (vecs > 2) _tile_stored(2, c + 2 * kSide, ldc);
  if (groups == 2 && vecs == 2) _tile_stored(3, c_low + kSide, ldc);
  else if (vecs > 3) _tile_stored(3, c + 3 * kSide, ldc);
}

#else
template <class E> constexpr bool kAmx = false;
struct AmxTiles {};
template <bool kAdd, int groups, int vecs, class... Args> void amx_product(const Args&...) = delete;
#endif

// What must live while operands of E are multiplied.
struct NoTiles {};
template <class E> using TileState = std::conditional_t<kAmx<E>, AmxTiles, NoTiles>;

LX_NAMESPACE_END
