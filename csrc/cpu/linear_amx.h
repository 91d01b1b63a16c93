// y = x (scale w)^T in bf16 on AMX's tiles, for more rows of x than registers hold: the rows of a
// tile are rows of w, its columns rows of x. Formulas in csrc/api.h.
//
// x is laid out once, transposed. An item of work is some rows of w; runs of kDepth factors of them
// are laid out (int8 is exact in bf16), while they are in a core's caches multiplied with all of x
// or kMostColumns of its rows, and added to sums in fp32.
#pragma once
#include "tiles.h"

LX_NAMESPACE_BEGIN

// Each y[i] (M, N[i]) = x (scale w[i])^T; scale null: all 1.
template <class W>
Status linear_amx(void* const* y, const void* x, const Rows& x_rows, const W* const* w,
                  const int64_t* w_stride, const float* scale, const int64_t* N, int weights,
                  int64_t K, Stream stream);

#if defined(__AMX_BF16__)
constexpr int64_t kDepth = 512, kMostColumns = 512;

// The first n <= 32 factors at p, bf16 or int8, as 16 units.
inline Vec32 amx_units(const bf16* p, int64_t n) {
  Vec32 v{};
  n == 32 ? memcpy(&v, p, sizeof v) : memcpy(&v, p, n * sizeof *p);
  return v;
}
inline Vec32 amx_units(const int8_t* p, int64_t n) {
  int8_t part[32] = {};
  if (n < 32) p = static_cast<const int8_t*>(memcpy(part, p, n));
  const auto wide = [p](int at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + at))));
  };
  return (Vec32)_mm512_cvtne2ps_pbh(wide(16), wide(0));
}

// out (K units, columns) = transposed rows [16 group, 16 group + 16) of x, zero beyond the data.
inline void amx_columns(float* out, int64_t columns, const void* x, const Rows& x_rows, int64_t M,
                        int64_t K, int64_t group) {
  for (int64_t k = 0; k < K; k += 32) {
    Vec32 block[16] = {};
    for (int64_t r = 0; r < least(16, M - 16 * group); r++)
      block[r] = amx_units(row<bf16>(x, x_rows, 16 * group + r) + k, least(32, K - k));
    transpose<float>(block);
    for (int64_t r = 0; r < 16; r++) store(out + (k / 2 + r) * columns + 16 * group, block[r]);
  }
}

// y (M, N), columns [n, n + rows), rows [m, m + columns) = sums (rows, columns) transposed, scaled.
inline void amx_store(bf16* y, int64_t N, int64_t n, int64_t rows, int64_t m, int64_t columns,
                      const float* sums, int64_t ld, const float* scale) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < columns; j += 16) {
      const int64_t left = least(16, rows - i);
      const Vec32 factor = scale ? load(scale + n + i, left) : splat(1.f);
      Vec32 block[16];
      for (int r = 0; r < 16; r++) block[r] = load(sums + (i + r) * ld + j);
      transpose<float>(block);
      for (int64_t r = 0; r < least(16, columns - j); r++) {
        bf16* to = y + (m + j + r) * N + n + i;
        left == 16 ? store(to, block[r] * factor) : store(to, block[r] * factor, left);
      }
    }
}

template <class W>
Status linear_amx(void* const* y, const void* x, const Rows& x_rows, const W* const* w,
                  const int64_t* w_stride, const float* scale, const int64_t* N, int weights,
                  int64_t K, Stream stream) {
  const int64_t M = count(x_rows), columns = round_up(M, 16), units = round_up(K, 32) / 2;
  const int64_t threads = num_threads(stream), group = least(columns, kMostColumns);
  int64_t all = 0, rows = columns <= 32 ? 32 : columns <= 128 ? 64 : 128;
  for (int i = 0; i < weights; i++) all += N[i];
  while (rows > kTileRows<bf16> && all / rows < 4 * threads) rows /= 2;
  int64_t items = 0;
  for (int i = 0; i < weights; i++) items += (N[i] + rows - 1) / rows;

  const int64_t own = rows * (kDepth / 2 + group);  // floats of a thread
  const Scratch scratch((units * columns + threads * own) * sizeof(float));
  if (!scratch.begin()) return kOutOfMemory;
  auto* xt = reinterpret_cast<float*>(scratch.begin());
  parallel_for(stream, columns / 16, grain_rows(16 * K), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) amx_columns(xt, columns, x, x_rows, M, K, g);
  });
  parallel_items(stream, items, [&](int64_t item, int64_t thread) {
    int i = 0;
    for (; item >= (N[i] + rows - 1) / rows; i++) item -= (N[i] + rows - 1) / rows;
    const int64_t n = item * rows, left = least(rows, N[i] - n);
    float *lines = xt + units * columns + thread * own, *sums = lines + rows * (kDepth / 2);
    const AmxTiles tiles;
    for (int64_t m = 0; m < columns; m += group) {
      const int64_t width = least(group, columns - m);
      for (int64_t k = 0; k == 0 || k < K; k += kDepth) {
        const int64_t run = least(kDepth, K - k);
        const float* a = lines;
        int64_t lda = kDepth / 2;
        const W* from = w[i] + n * w_stride[i] + k;
        if (std::is_same_v<W, bf16> && left == rows && K % 32 == 0 && w_stride[i] % 2 == 0) {
          a = reinterpret_cast<const float*>(from);
          lda = w_stride[i] / 2;
        } else {
          for (int64_t r = 0; r < rows; r++) {
            const W* own_row = from + least(r, left - 1) * w_stride[i];
            prefetch(own_row + run, least(run, K - k - run));
            for (int64_t at = 0; at < run; at += 32)
              store(lines + r * lda + at / 2, amx_units(own_row + at, least(32, run - at)));
          }
        }
        for (int64_t r = 0; r < left; r += kTileRows<bf16>) {
          const auto add = [&](auto kAdd) {
            product<kAdd, bf16>(sums + r * group, group, a + r * lda, lda,
                                xt + k / 2 * columns + m, columns, 0, width / 16, (run + 1) / 2);
          };
          k ? add(std::true_type{}) : add(std::false_type{});
        }
      }
      amx_store(static_cast<bf16*>(y[i]), N[i], n, left, m, least(width, M - m), sums, group,
                scale);
    }
  });
  return kOk;
}
#endif

LX_NAMESPACE_END
