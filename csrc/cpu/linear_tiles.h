// y = x (scale w)^T for more rows of x than registers hold, on tiles: their rows are rows of w,
// their columns rows of x. Formulas in csrc/api.h.
//
// x is laid out once, transposed, in panels as wide as a tile. An item of work is some rows of w;
// runs of kDepth units of them are laid out as factors (int8 is exact in every type), while they
// are in a core's caches multiplied with all of x or kMostColumns of its rows, panel by panel, each
// of which stays in the nearest cache, and added to sums.
#pragma once
#include "tiles.h"

LX_NAMESPACE_BEGIN

// Rows and columns of a product: with AMX square, which fetches least.
template <class E> constexpr int kRows = kAmx<E> ? 2 * kAmxSide : kTileRows<E>;
template <class E>
constexpr int64_t kPanel = kTileVecs<E> * kTileRows<E> / kRows<E> * kLanes<Acc<E>>;
template <class E>
constexpr int64_t kDepth = kAmx<E> ? 256 : 128;  // units; longer chains of sums round more
constexpr int64_t kMostColumns = 512;

// y (M, N), columns [n, n + rows), rows [m, m + columns) = sums (rows, columns) transposed, scaled.
template <class T, class A>
void store_transposed(T* y, int64_t N, int64_t n, int64_t rows, int64_t m, int64_t columns,
                      const A* sums, int64_t ld, const float* scale) {
  constexpr int kLane = kLanes<A>;
  for (int64_t i = 0; i < rows; i += kLane) {
    const int64_t left = least(kLane, rows - i);
    Vec<A> factor = splat(A(1));
    for (int64_t c = 0; scale && c < left; c++) factor[c] = scale[n + i + c];
    for (int64_t j = 0; j < columns; j += kLane) {
      Vec<A> block[kLane];
      for (int r = 0; r < kLane; r++) block[r] = load(sums + (i + r) * ld + j);
      transpose<A>(block);
      for (int64_t r = 0; r < least(kLane, columns - j); r++) {
        T* to = y + (m + j + r) * N + n + i;
        left == kLane ? store(to, block[r] * factor) : store(to, block[r] * factor, left);
      }
    }
  }
}

// Each y[i] (M, N[i]) = x (scale w[i])^T; scale null: all 1.
template <class T, class W>
Status linear_tiles(T* const* y, const void* x, const Rows& x_rows, const W* const* w,
                    const int64_t* w_stride, const float* scale, const int64_t* N, int weights,
                    int64_t K, Stream stream) {
  using E = Factor<T>;
  using A = Acc<E>;
  constexpr int kLane = kLanes<A>, kU = kUnit<E>;
  const int64_t M = count(x_rows), columns = round_up(M, kLane);
  const int64_t units = round_up(K, kFactors<E>) / kU;
  const int64_t threads = num_threads(stream), group = least(columns, kMostColumns);
  int64_t all = 0, rows = columns <= 32 ? 32 : columns <= 128 ? 64 : 128;
  for (int i = 0; i < weights; i++) all += N[i];
  while (rows > most(kRows<E>, kLane) && all / rows < 4 * threads) rows /= 2;
  int64_t items = 0;
  for (int i = 0; i < weights; i++) items += (N[i] + rows - 1) / rows;

  const int64_t own = rows * (kDepth<E> + group);  // numbers of a thread
  const Scratch scratch((units * columns + threads * own) * sizeof(A));
  if (!scratch.begin()) return kOutOfMemory;
  auto* xt = reinterpret_cast<A*>(scratch.begin());
  // The panel that begins with column m, and how wide it is.
  const auto panel = [=](int64_t m) { return xt + units * m; };
  const auto width = [=](int64_t m) { return least(kPanel<E>, columns - m); };
  parallel_for(stream, columns / kLane, grain_rows(kLane * K), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin * kLane; g < end * kLane; g += kLane) {
      const int64_t first = g / kPanel<E> * kPanel<E>;
      transposed_lines<E>(panel(first) + g - first, width(first), kLane, K, [&](int64_t i) {
        return g + i < M ? row<T>(x, x_rows, g + i) : nullptr;
      });
    }
  });
  parallel_items(stream, items, [&](int64_t item, int64_t thread) {
    int i = 0;
    for (; item >= (N[i] + rows - 1) / rows; i++) item -= (N[i] + rows - 1) / rows;
    const int64_t n = item * rows, left = least(rows, N[i] - n);
    A *lines = xt + units * columns + thread * own, *sums = lines + rows * kDepth<E>;
    [[maybe_unused]] const TileState<E> state;
    for (int64_t begin = 0; begin < columns; begin += group) {
      const int64_t end = least(begin + group, columns);
      for (int64_t k = 0; k == 0 || k < K; k += kDepth<E> * kU) {
        const int64_t run = least(kDepth<E> * kU, K - k);
        const A* a = lines;
        int64_t lda = kDepth<E>;
        const W* from = w[i] + n * w_stride[i] + k;
        if (std::is_same_v<W, E> && left == rows && K % (kTileUnits<E> * kU) == 0 &&
            w_stride[i] % kU == 0) {
          a = reinterpret_cast<const A*>(from);
          lda = w_stride[i] / kU;
        } else {
          for (int64_t r = 0; r < rows; r++) {
            const W* own_row = from + least(r, left - 1) * w_stride[i];
            prefetch(own_row + run, least(run, K - k - run));
            for (int64_t at = 0; at < run; at += kFactors<E>)
              store(lines + r * lda + at / kU, factors_left<E>(own_row + at, run - at));
          }
        }
        for (int64_t m = begin; m < end; m += kPanel<E>)
          for (int64_t r = 0; r < left; r += kRows<E>) {
            const auto add = [&](auto kAdd) {
              product<kAdd, E, kRows<E>, true>(sums + r * group + m - begin, group, a + r * lda,
                                               lda, panel(m) + k / kU * width(m), width(m), 0,
                                               width(m) / kLane, (run + kU - 1) / kU);
            };
            k ? add(std::true_type{}) : add(std::false_type{});
          }
      }
      store_transposed(y[i], N[i], n, left, begin, least(end, M) - begin, sums, group, scale);
    }
  });
  return kOk;
}

LX_NAMESPACE_END
