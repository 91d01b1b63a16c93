// Products with int8 weights. Formula in csrc/api.h.
//
// Every output is a sum along K, in vectors, kTileRows rows of x by kColumns rows of w at a time.
// int8 is exact in bf16 and fp32, so that nothing is rounded before the store. Up to kTileRows rows
// of x, weights go from memory into registers once. With more, a block of rows of w is first
// widened into scratch that stays in L2, where all rows of x meet it.
#pragma once
#include "tiles.h"

LX_NAMESPACE_BEGIN

constexpr int kColumns = 4;
constexpr int64_t kBlockBytes = 1 << 18;  // of widened weights
constexpr int64_t kMostBlockRows = 64;

// Factors that a vector holds.
template <class E> constexpr int kFactors = kLanes<Acc<E>> * kUnit<E>;
// Factors that are summed by themselves first: short chains round less than one long one.
template <class E> constexpr int64_t kChain = 16 * kFactors<E>;

// kLanes int8 as numbers.
template <class A> inline Vec<A> numbers(const int8_t* p) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return (Vec32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>)
    return (Vec32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; i++) v[i] = p[i];
  return v;
}

// kFactors elements at p, int8 or of a storage type, as a vector of units (see tiles.h).
template <class E, class T> inline Vec<Acc<E>> factors(const T* p) {
  using A = Acc<E>;
  if constexpr (std::is_same_v<T, E>) {
    Vec<A> v;
    memcpy(&v, p, sizeof v);
    return v;
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return line<E>(numbers<A>(p), kUnit<E> == 2 ? numbers<A>(p + kLanes<A>) : Vec<A>{});
  } else {
    return load(p);
  }
}

// The first n of them, the rest 0.
template <class E, class T> inline Vec<Acc<E>> factors(const T* p, int64_t n) {
  T part[kFactors<E>] = {};
  memcpy(part, p, n * sizeof(T));
  return factors<E>(part);
}

template <class E>
inline Vec<Acc<E>> multiply_add(Vec<Acc<E>> c, Vec<Acc<E>> a, Vec<Acc<E>> b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bf16>)
    return (Vec32)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  else
#endif
    return c + a * b;
}

// y (rows, columns), of rows N apart, for `rows` <= kRows rows of x and `columns` <= kColumns rows
// of w, int8 or widened. Where there are fewer, the last is computed again and not stored.
template <int kRows, class T, class W>
void linear_int8_tile(T* y, int64_t N, const T* const* x, int64_t rows, const W* w,
                      int64_t w_stride, int64_t columns, const float* scale, int64_t K) {
  using E = Factor<T>;
  using A = Acc<T>;
  const T* x_row[kRows];
  const W* w_row[kColumns];
  for (int r = 0; r < kRows; r++) x_row[r] = x[r < rows ? r : rows - 1];
  for (int c = 0; c < kColumns; c++) w_row[c] = w + (c < columns ? c : columns - 1) * w_stride;

  Vec<A> totals[kRows][kColumns] = {}, sums[kRows][kColumns];
  const auto add = [&](int64_t k, auto... n) {
    Vec<A> b[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) b[c] = factors<E>(w_row[c] + k, n...);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const Vec<A> a = factors<E>(x_row[r] + k, n...);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) sums[r][c] = multiply_add<E>(sums[r][c], a, b[c]);
    }
  };
  for (int64_t k = 0; k < K;) {
    const int64_t end = K - k < kChain<E> ? K : k + kChain<E>;
    memset(sums, 0, sizeof sums);
    for (; k + kFactors<E> <= end; k += kFactors<E>) add(k);
    if (k < end) add(k, end - k), k = end;
    for (int r = 0; r < kRows; r++)
      for (int c = 0; c < kColumns; c++) totals[r][c] += sums[r][c];
  }
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++)
      store(y + r * N + c, splat(sum(totals[r][c]) * A(scale[c])), 1);
}

// Widened rows of w, `padded` factors apart.
template <class E, class W>
void widen_rows(W* out, int64_t padded, const int8_t* w, int64_t w_stride, int64_t rows,
                int64_t K) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = 0; k < K; k += kFactors<E>) {
      const int64_t left = K - k;
      const int8_t* from = w + i * w_stride + k;
      const Vec<Acc<E>> v = left < kFactors<E> ? factors<E>(from, left) : factors<E>(from);
      memcpy(out + i * padded + k, &v, sizeof v);
    }
}

Status linear_int8(void* y, const void* x, Rows x_rows, const int8_t* w, int64_t w_stride,
                   const float* scale, int64_t N, int64_t K, DType dtype, Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using E = Factor<T>;
    const int64_t M = count(x_rows), padded = round_up(K + 1, kFactors<E>);
    const auto tiles = [&](auto rows_at_once, const auto* w_block, int64_t stride, int64_t begin,
                           int64_t end) {
      constexpr int kRows = decltype(rows_at_once)::value;
      for (int64_t m = 0; m < M; m += kRows) {
        const int64_t rows = M - m < kRows ? M - m : kRows;
        const T* x_row[kRows];
        for (int r = 0; r < rows; r++) x_row[r] = row<T>(x, x_rows, m + r);
        for (int64_t n = begin; n < end; n += kColumns)
          linear_int8_tile<kRows>(static_cast<T*>(y) + m * N + n, N, x_row, rows,
                                  w_block + (n - begin) * stride, stride,
                                  end - n < kColumns ? end - n : kColumns, scale + n, K);
      }
    };
    if (M <= kTileRows) {
      const int64_t quads = (N + kColumns - 1) / kColumns;
      parallel_for(stream, quads, grain_rows(kColumns * K), [&](int64_t first, int64_t last) {
        const int64_t begin = first * kColumns, end = last < quads ? last * kColumns : N;
        const int8_t* from = w + begin * w_stride;
        switch (M) {
          case 1: return tiles(std::integral_constant<int, 1>{}, from, w_stride, begin, end);
          case 2: return tiles(std::integral_constant<int, 2>{}, from, w_stride, begin, end);
          case 3: return tiles(std::integral_constant<int, 3>{}, from, w_stride, begin, end);
          default: return tiles(std::integral_constant<int, 4>{}, from, w_stride, begin, end);
        }
      });
      return kOk;
    }
    int64_t block = kBlockBytes / int64_t(padded * sizeof(E)) / kColumns * kColumns;
    block = block < kColumns ? kColumns : block > kMostBlockRows ? kMostBlockRows : block;
    std::atomic<bool> out_of_memory{false};
    parallel_for(stream, (N + block - 1) / block, grain_rows(block * K),
                 [&](int64_t first, int64_t last) {
      const Scratch scratch(block * padded * sizeof(E));
      auto* wide = reinterpret_cast<E*>(scratch.begin());  // (block, padded)
      if (!wide) out_of_memory = true;
      for (int64_t b = first; wide && b < last; b++) {
        const int64_t begin = b * block, end = begin + block < N ? begin + block : N;
        widen_rows<E>(wide, padded, w + begin * w_stride, w_stride, end - begin, K);
        tiles(std::integral_constant<int, kTileRows>{}, wide, padded, begin, end);
      }
    });
    return out_of_memory ? kOutOfMemory : kOk;
  });
}

LX_NAMESPACE_END
