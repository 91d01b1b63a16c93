// Products with weights of the data's dtype, for few rows, and with int8 weights. Formulas in
// csrc/api.h.
//
// Every output is a sum along K, in vectors, kTogether rows of x by kColumns rows of w at a time.
// Up to kRowsAtOnce rows of x read weights from memory once; more go to linear_tiles.h with int8
// weights, and so do more than kTogether where there is AMX. (int8 is exact in bf16 and fp32, so
// that nothing is rounded before the store.)
#pragma once
#include "linear_tiles.h"
#include "tiles.h"

LX_NAMESPACE_BEGIN

constexpr int kRowsAtOnce = 8, kTogether = 4, kColumns = 4;
constexpr int64_t kBlockBytes = 1 << 18;  // of weights, after widening
constexpr int64_t kMostBlockRows = 64;

// Factors that are summed by themselves first: short chains round less than one long one.
template <class E> constexpr int64_t kChain = 16 * kFactors<E>;

// How many of them a tile of kRows rows takes: of 16 registers, 4 x 4 sums leave none.
template <int kRows>
constexpr int kTileColumns = kVecBytes < 64 && kRows == kTogether ? 3 : kColumns;

// totals (kRows, kColumns), each a vector, += x w^T of K factors, for `rows` <= kRows rows of x and
// `columns` <= kTileColumns rows of w. Where there are fewer, the last is computed again. What is
// `ahead` of the weights is fetched.
template <int kRows, class T, class W>
void linear_tile(Vec<Acc<T>>* totals, const T* const* x, int64_t rows, const W* w,
                 int64_t w_stride, int64_t columns, int64_t K, int64_t ahead) {
  using E = Factor<T>;
  using A = Acc<T>;
  constexpr int kTile = kTileColumns<kRows>;
  constexpr int64_t kLine = 64 / sizeof(W);
  const T* x_row[kRows];
  const W* w_row[kTile];
  for (int r = 0; r < kRows; r++) x_row[r] = x[r < rows ? r : rows - 1];
  for (int c = 0; c < kTile; c++) w_row[c] = w + (c < columns ? c : columns - 1) * w_stride;

  Vec<A> sums[kRows][kTile];
  const auto add = [&](int64_t k, auto... n) {
    Vec<A> b[kTile];
#pragma GCC unroll 4
    for (int c = 0; c < kTile; c++) b[c] = factors<E>(w_row[c] + k, n...);
    if (k % kLine < kFactors<E>)
#pragma GCC unroll 4
      for (int c = 0; c < kTile; c++) __builtin_prefetch(w_row[c] + k + ahead);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      const Vec<A> a = factors<E>(x_row[r] + k, n...);
#pragma GCC unroll 4
      for (int c = 0; c < kTile; c++) sums[r][c] = multiply_add<E>(sums[r][c], a, b[c]);
    }
  };
  for (int64_t k = 0; k < K;) {
    const int64_t end = least(K, k + kChain<E>);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int c = 0; c < kTile; c++) sums[r][c] = Vec<A>{};
    for (; k + kFactors<E> <= end; k += kFactors<E>) add(k);
    if (k < end) add(k, end - k), k = end;
    for (int r = 0; r < kRows; r++)
      for (int c = 0; c < kTile; c++) totals[r * kColumns + c] += sums[r][c];
  }
}

// Columns [begin, end), at most kMostBlockRows, of y (M, N) for the rows of w from w_begin, the
// first of them, on. scale null: all 1. More than kRows rows of x take turns with what of w and x
// is in the nearest cache.
template <int kRows, class T, class W>
void linear_columns(T* y, int64_t N, const void* x, const Rows& x_rows, int64_t M, const W* w_begin,
                    int64_t w_stride, const float* scale, int64_t K, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int64_t kTile = kTileColumns<kRows>, kSums = kRows * kColumns;
  constexpr int64_t kTiles = (kMostBlockRows + kTile - 1) / kTile;
  const int64_t tiles = (end - begin + kTile - 1) / kTile;
  for (int64_t first = 0; first < M; first += kRowsAtOnce) {
    const int64_t groups = (least(kRowsAtOnce, M - first) + kRows - 1) / kRows;
    const int64_t run = groups == 1 ? K : kChain<Factor<T>>;
    const int64_t ahead = groups == 1 ? kTile * w_stride : run;
    Vec<A> totals[kRowsAtOnce / kRows * kTiles * kSums];
    memset(totals, 0, groups * kTiles * kSums * sizeof *totals);
    for (int64_t k = 0; k < K; k += run)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t m = first + g * kRows, rows = least(kRows, M - m);
        const T* x_row[kRows];
        for (int r = 0; r < rows; r++) x_row[r] = row<T>(x, x_rows, m + r) + k;
        for (int64_t tile = 0; tile < tiles; tile++)
          linear_tile<kRows>(totals + (g * kTiles + tile) * kSums, x_row, rows,
                             w_begin + tile * kTile * w_stride + k, w_stride,
                             least(kTile, end - begin - tile * kTile), least(run, K - k), ahead);
      }
    for (int64_t m = first; m < least(first + kRowsAtOnce, M); m++)
      for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t g = (m - first) / kRows, r = (m - first) % kRows, n = begin + tile * kTile;
        Vec<A> own[kColumns];
        A sums[kColumns];
        for (int c = 0; c < kColumns; c++)
          own[c] = totals[(g * kTiles + tile) * kSums + r * kColumns + c];
        sum_each(sums, own);
        for (int64_t c = 0; c < least(kTile, end - n); c++)
          store(y + m * N + n + c, splat(scale ? sums[c] * A(scale[n + c]) : sums[c]), 1);
      }
  }
}

// Likewise, with as many rows at a time as there are, up to kTogether.
template <class T, class... Args> void linear_columns_of(int64_t M, T* y, const Args&... args) {
  switch (M) {
    case 1: return linear_columns<1>(y, args...);
    case 2: return linear_columns<2>(y, args...);
    case 3: return linear_columns<3>(y, args...);
    default: return linear_columns<kTogether>(y, args...);
  }
}

// How many rows of w, each of `bytes`, make a block.
inline int64_t block_of_rows(int64_t bytes) {
  const int64_t block = kBlockBytes / bytes / kColumns * kColumns;
  return least(kMostBlockRows, block < kColumns ? kColumns : block);
}

// The columns of quads [first, last) of kColumns each of y = x w^T (scale), w as it lies.
template <class T, class W>
void linear_quads(T* y, const void* x, const Rows& x_rows, const W* w, int64_t w_stride,
                  const float* scale, int64_t N, int64_t K, int64_t first, int64_t last) {
  const int64_t M = count(x_rows), block = block_of_rows((K + 1) * sizeof(W));
  const int64_t stop = least(last * kColumns, N);
  for (int64_t begin = first * kColumns; begin < stop; begin += block)
    linear_columns_of(M, y, N, x, x_rows, M, w + begin * w_stride, w_stride, scale, K, begin,
                      least(begin + block, stop));
}

inline int64_t quads_of(int64_t N) { return (N + kColumns - 1) / kColumns; }

Status linear(void* const* y, const void* x, Rows x_rows, const void* const* w,
              const int64_t* w_stride, const int64_t* N, int count, int64_t K, DType dtype,
              Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const auto* const* weights = reinterpret_cast<const T* const*>(w);
    if constexpr (kAmx<T>)
      if (lx::LX_ISA::count(x_rows) > kTogether)
        return linear_tiles(reinterpret_cast<T* const*>(y), x, x_rows, weights, w_stride, nullptr,
                            N, count, K, stream);
    int64_t quads = 0;
    for (int i = 0; i < count; i++) quads += quads_of(N[i]);
    parallel_for(stream, quads, grain_rows(kColumns * K), [&](int64_t first, int64_t last) {
      for (int i = 0; i < count && last > 0; i++) {
        const int64_t own = quads_of(N[i]);
        if (first < own)
          linear_quads(static_cast<T*>(y[i]), x, x_rows, weights[i], w_stride[i],
                       nullptr, N[i], K, first, least(last, own));
        first = most(first - own, 0), last -= own;
      }
    });
    return kOk;
  });
}

Status linear_int8(void* y, const void* x, Rows x_rows, const int8_t* w, int64_t w_stride,
                   const float* scale, int64_t N, int64_t K, DType dtype, Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    T* out = static_cast<T*>(y);
    if (count(x_rows) > (kAmx<Factor<T>> ? kTogether : kRowsAtOnce))
      return linear_tiles(&out, x, x_rows, &w, &w_stride, scale, &N, 1, K, stream);
    parallel_for(stream, quads_of(N), grain_rows(kColumns * K), [&](int64_t first, int64_t last) {
      linear_quads(out, x, x_rows, w, w_stride, scale, N, K, first, last);
    });
    return kOk;
  });
}

LX_NAMESPACE_END
