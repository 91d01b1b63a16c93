// Cross-entropy of rows of logits. Formulas in csrc/api.h.
//
// The forward goes over a row once, once more to smooth labels, and twice more where its first
// columns hold no logit near the largest.
#pragma once
#include <cmath>

#include "parallel.h"

LX_NAMESPACE_BEGIN

// The largest of a row of V; NaN when one is.
template <class T> Acc<T> largest(const T* z, int64_t V) {
  using A = Acc<T>;
  const A none = -std::numeric_limits<A>::infinity();
  Vec<A> top[4] = {splat(none), splat(none), splat(none), splat(none)};
  for_each_vec<T>(V, top, [&](int64_t j, auto n, Vec<A>& t) {
    t = max_nan(t, load_or(none, z + j, n));
  });
  return max_nan(max_nan(max_nan(top[0], top[1]), max_nan(top[2], top[3])));
}

// sum(exp(z - shift)) of a row of V.
template <class T> Acc<T> sum_of_exp(const T* z, int64_t V, Acc<T> shift) {
  using A = Acc<T>;
  Vec<A> sums[4] = {};
  for_each_vec<T, kReadInPairs<T>>(V, sums, [&](int64_t j, auto n, Vec<A>& s) {
    fetch_ahead(z, j, 1024);
    s += exp_near(load_or(-std::numeric_limits<A>::infinity(), z + j, n) - shift);
  });
  return sum(sums);
}

// log(sum(exp(z))) of a row of V. Any shift will do with which no sum overflows and which is the
// logit of one column: the largest of the first few, and of all only if that was too small.
template <class T> Acc<T> log_sum_exp(const T* z, int64_t V) {
  using A = Acc<T>;
  const A inf = std::numeric_limits<A>::infinity();
  const auto finite = [&](A a) { return a < inf && a > -inf; };
  A shift = largest(z, V < 256 ? V : 256);
  A total = finite(shift) ? sum_of_exp(z, V, shift) : inf;
  if (!finite(total)) {
    const A most = largest(z, V);
    shift = finite(most) ? most : 0;  // inf - inf would hide an infinite result
    total = sum_of_exp(z, V, shift);
  }
  return shift + std::log(total);
}

// sum(z) of a row of V.
template <class T> Acc<T> row_sum(const T* z, int64_t V) {
  Vec<Acc<T>> sums[4] = {};
  for_each_vec<T, kReadInPairs<T>>(V, sums, [&](int64_t j, auto n, auto& s) {
    s += load(z + j, n);
  });
  return sum(sums);
}

Status cross_entropy_fwd(void* loss, void* lse, const void* logits, Rows logits_rows,
                         const int64_t* target, int64_t V, int64_t ignore_index,
                         double label_smoothing, double z_loss, DType dtype, Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    const A smoothing = label_smoothing, z_factor = z_loss;
    parallel_for(stream, count(logits_rows), grain_rows(V), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        A &row_loss = static_cast<A*>(loss)[i], &row_lse = static_cast<A*>(lse)[i];
        row_loss = row_lse = 0;
        if (target[i] == ignore_index) continue;
        const T* z = row<T>(logits, logits_rows, i);
        row_lse = log_sum_exp(z, V);
        if (target[i] < 0 || target[i] >= V) {
          row_loss = std::numeric_limits<A>::quiet_NaN();
          continue;
        }
        const A at_target = load(z + target[i], 1)[0];
        row_loss = row_lse - at_target;
        if (smoothing != 0) row_loss += smoothing * (at_target - row_sum(z, V) / V);
        if (z_factor != 0) row_loss += z_factor * row_lse * row_lse;
      }
    });
    return kOk;
  });
}

Status mean_loss(void* mean, void* inv_count, const void* loss, const int64_t* target, int64_t rows,
                 int64_t ignore_index, DType dtype, Stream) {
  return dispatch(dtype, [&](auto t) {
    using A = Acc<decltype(t)>;
    double total = 0;
    int64_t counted = 0;
    for (int64_t i = 0; i < rows; i++) {
      if (target[i] == ignore_index) continue;
      total += static_cast<const A*>(loss)[i];
      counted++;
    }
    *static_cast<A*>(mean) = static_cast<A>(total / counted);
    *static_cast<A*>(inv_count) = static_cast<A>(1.0 / counted);
    return kOk;
  });
}

Status cross_entropy_bwd(void* dlogits, const void* logits, Rows logits_rows, const int64_t* target,
                         const void* lse, const void* dloss, int64_t dloss_stride, int64_t V,
                         int64_t ignore_index, double label_smoothing, double z_loss, DType dtype,
                         Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    const A smoothing = label_smoothing, z_factor = z_loss;
    const A on_target = (1 - label_smoothing) + label_smoothing / V;
    const bool past = dlogits != logits &&
                      past_cache(static_cast<T*>(dlogits), count(logits_rows), V, V);
    parallel_for(stream, count(logits_rows), grain_rows(V), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* z = row<T>(logits, logits_rows, i);
        T* dz = static_cast<T*>(dlogits) + i * V;
        if (target[i] == ignore_index) {
          memset(dz, 0, V * sizeof(T));
          continue;
        }
        const bool is_column = target[i] >= 0 && target[i] < V;
        const A nan = std::numeric_limits<A>::quiet_NaN();
        const A row_lse = static_cast<const A*>(lse)[i];
        const A dl = is_column ? static_cast<const A*>(dloss)[i * dloss_stride] : nan;
        const A of_z_loss = z_factor == 0 ? 0 : dl * 2 * z_factor * row_lse;
        const A scale = dl + of_z_loss, even = dl * smoothing / V;
        Vec<A> at_target{};
        if (is_column) {
          const Vec<A> p = exp(splat(load(z + target[i], 1)[0] - row_lse));
          at_target = (p - on_target) * dl + p * of_z_loss;
        }
        for_each_vec<T>(V, [&](int64_t j, auto n) {
          fetch_ahead(z, j, 1024);
          store(dz + j, exp_to<T>(load(z + j, n) - row_lse) * scale - even, n, past);
        });
        if (past) _mm_sfence();  // before another store to the same place
        if (is_column) store(dz + target[i], at_target, 1);
      }
    });
    return kOk;
  });
}

LX_NAMESPACE_END
