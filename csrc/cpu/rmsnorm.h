// RMSNorm, with and without a residual added first. Formulas in csrc/api.h.
//
// A row is read twice, the second time from cache, while memory brings the next one. The backward
// takes four rows at a time, so that the weight is read once for the four, and from run to run of
// columns, so that the weight and its gradient stay in the nearest cache while the results are
// written in long pieces. The gradient of the weight is summed per part (a fixed share of the
// rows), then over the parts in order.
#pragma once
#include <cmath>

#include "parallel.h"

LX_NAMESPACE_BEGIN

// What rows of T with weights of W are gone over as.
template <class T, class W> using Columns = std::conditional_t<std::is_same_v<T, W>, T, Acc<T>>;

template <class T, class W>
void rmsnorm_fwd_row(T* y, T* h, Acc<T>* rstd, const T* x, const T* residual, const W* weight,
                     int64_t D, double eps, bool past) {
  using A = Acc<T>;
  Vec<A> squares[4] = {};
  for_each_vec<T>(D, squares, [&](int64_t j, auto n, Vec<A>& square) {
    Vec<A> v = load(x + j, n);
    // Normalise what is stored: the backward sees the same numbers.
    if (residual) v = store_rounded(h + j, v + load(residual + j, n), n);
    square += v * v;
  });
  const double mean = double(sum(squares)) / D;
  *rstd = static_cast<A>(1 / std::sqrt(mean + eps));
  const T* in = residual ? h : x;
  for_each_vec<Columns<T, W>>(D, [&](int64_t j, auto n) {
    fetch_ahead(x, j, D);
    if (residual) fetch_ahead(residual, j, D);
    store(y + j, load(in + j, n) * *rstd * load(weight + j, n), n, past);
  });
}

Status rmsnorm_fwd(void* y, void* h, void* rstd, const void* x, Rows x_rows, const void* residual,
                   Rows residual_rows, const void* weight, int64_t D, double eps, DType dtype,
                   DType weight_dtype, Stream stream) {
  return dispatch(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    const bool past = past_cache(static_cast<T*>(y), count(x_rows), D, D);
    parallel_for(stream, count(x_rows), grain_rows(D), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        rmsnorm_fwd_row(static_cast<T*>(y) + i * D, h ? static_cast<T*>(h) + i * D : nullptr,
                        static_cast<Acc<T>*>(rstd) + i, row<T>(x, x_rows, i),
                        residual ? row<T>(residual, residual_rows, i) : nullptr,
                        static_cast<const decltype(w)*>(weight), D, eps, past);
    });
    return kOk;
  });
}

constexpr int64_t kRun = 1024;  // columns

inline int64_t rmsnorm_bwd_parts(int64_t rows) { return rows < 1024 ? (rows + 31) / 32 : 32; }

// kRows rows of dx; their share of dweight is added to dw (D), in the order of the vectors, unless
// it is null.
template <int kRows, class T, class W>
void rmsnorm_bwd_rows(T* dx, Acc<T>* dw, const T* const* dy, const T* const* dh, const T* const* h,
                      const W* weight, const Acc<T>* rstd, int64_t D, bool past) {
  using A = Acc<T>;
  Vec<A> dots[kRows] = {};
  for_each_vec<Columns<T, W>>(D, [&](int64_t j, auto n) {
    const Vec<A> w = load(weight + j, n);
    for (int r = 0; r < kRows; r++) dots[r] += load(dy[r] + j, n) * w * load(h[r] + j, n);
  });
  A scale[kRows];
  for (int r = 0; r < kRows; r++)
    scale[r] = static_cast<A>(double(rstd[r]) * rstd[r] * sum(dots[r]) / D);
  for (int64_t begin = 0; begin < D; begin += kRun)
    for (int r = 0; r < kRows; r++) {
      const T *dy_row = dy[r], *h_row = h[r], *dh_row = dh ? dh[r] : nullptr;
      T* dx_row = dx + r * D;
      const A inverse = rstd[r], factor = scale[r];
      for_each_vec<Columns<T, W>>(D - begin < kRun ? D - begin : kRun, [&](int64_t k, auto n) {
        const int64_t j = begin + k;
        fetch_ahead(dy_row, j, kRows * D);
        fetch_ahead(h_row, j, kRows * D);
        const Vec<A> g = load(dy_row + j, n), v = load(h_row + j, n);
        Vec<A> d = inverse * (g * load(weight + j, n) - v * factor);
        if (dh_row) {
          fetch_ahead(dh_row, j, kRows * D);
          d += load(dh_row + j, n);
        }
        store(dx_row + j, d, n, past);
        if (dw) store_ordered(dw, j, load_ordered(dw, j, n) + g * (v * inverse), n);
      });
    }
}

template <class T, class W>
void rmsnorm_bwd_part(T* dx, Acc<T>* dw, const void* dy, const Rows& dy_rows, const void* dh,
                      const Rows& dh_rows, const void* h, const Rows& h_rows, const W* weight,
                      const Acc<T>* rstd, int64_t D, int64_t begin, int64_t end, bool past) {
  if (dw) memset(dw, 0, D * sizeof *dw);
  const auto rows_from = [&](int64_t i, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    const T *dy_row[kRows], *dh_row[kRows], *h_row[kRows];
    for (int r = 0; r < kRows; r++) {
      dy_row[r] = row<T>(dy, dy_rows, i + r);
      h_row[r] = row<T>(h, h_rows, i + r);
      if (dh) dh_row[r] = row<T>(dh, dh_rows, i + r);
    }
    rmsnorm_bwd_rows<kRows>(dx + i * D, dw, dy_row, dh ? dh_row : nullptr, h_row, weight, rstd + i,
                            D, past);
  };
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) rows_from(i, std::integral_constant<int, 4>{});
  for (; i < end; i++) rows_from(i, std::integral_constant<int, 1>{});
}

Status rmsnorm_bwd(void* dx, void* dweight, void* partial, const void* dy, Rows dy_rows,
                   const void* dh, Rows dh_rows, const void* h, Rows h_rows, const void* weight,
                   const void* rstd, int64_t D, DType dtype, DType weight_dtype, Stream stream) {
  return dispatch(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    using A = Acc<T>;
    constexpr int64_t kPair = 2 * kLanes<A>;  // elements of a pair of vectors
    const int64_t rows = count(h_rows), parts = rmsnorm_bwd_parts(rows);
    const bool past = past_cache(static_cast<T*>(dx), rows, D, D);
    A* sums = dweight ? static_cast<A*>(partial) : nullptr;  // (parts, D)
    parallel_for(stream, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++)
        rmsnorm_bwd_part(static_cast<T*>(dx), sums ? sums + p * D : nullptr, dy, dy_rows, dh,
                         dh_rows, h, h_rows, static_cast<const W*>(weight),
                         static_cast<const A*>(rstd), D, rows * p / parts, rows * (p + 1) / parts,
                         past);
    });
    if (!dweight) return kOk;
    const int64_t pairs = (D + kPair - 1) / kPair;
    parallel_for(stream, pairs, grain_rows(kPair * parts), [&](int64_t begin, int64_t end) {
      begin *= kPair;
      for_each_vec<Columns<T, W>>(least(end * kPair, D) - begin, [&](int64_t j, auto n) {
        Vec<A> total{};
        for (int64_t p = 0; p < parts; p++) total += load_ordered(sums + p * D, begin + j, n);
        store(static_cast<W*>(dweight) + begin + j, total, n);
      });
    });
    return kOk;
  });
}

LX_NAMESPACE_END
