// Cross-entropy of rows of logits. Formulas in csrc/api.h.
//
// The forward goes over a row twice (largest, sum of exponentials; once more to smooth labels), but
// only the first pass reads memory: a row of 131,072 fp32 is 512 KiB and stays in the L2 cache.
#pragma once
#include <cmath>

#include "parallel.h"

LX_NAMESPACE_BEGIN

// log(sum(exp(z))) of a row of V.
template <class T> Acc<T> log_sum_exp(const T* z, int64_t V) {
  using A = Acc<T>;
  const A inf = std::numeric_limits<A>::infinity();
  Vec<A> top[4] = {splat(-inf), splat(-inf), splat(-inf), splat(-inf)};
  int lane = 0;
  for_each_vec<A>(V, [&](int64_t j, auto n) {
    Vec<A>& t = top[lane++ & 3];
    if constexpr (std::is_same_v<decltype(n), Whole<A>>)
      t = max_nan(t, load(z + j));
    else
      t = max_nan(t, load(z + j, n, -inf));
  });
  const A most = max_nan(max_nan(max_nan(top[0], top[1]), max_nan(top[2], top[3])));
  const A shift = most < inf && most > -inf ? most : 0;  // inf - inf would hide an infinite result
  Vec<A> sums[4] = {};
  for_each_vec<A>(V, [&](int64_t j, auto n) {
    Vec<A>& s = sums[lane++ & 3];
    if constexpr (std::is_same_v<decltype(n), Whole<A>>)
      s += exp(load(z + j) - shift);
    else
      s += exp(load(z + j, n, -inf) - shift);
  });
  return shift + std::log(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// sum(z) of a row of V.
template <class T> Acc<T> row_sum(const T* z, int64_t V) {
  Vec<Acc<T>> sums[4] = {};
  int lane = 0;
  for_each_vec<Acc<T>>(V, [&](int64_t j, auto n) { sums[lane++ & 3] += load(z + j, n); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
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
        for_each_vec<A>(V, [&](int64_t j, auto n) {
          store(dz + j, exp(load(z + j, n) - row_lse) * scale - even, n);
        });
        if (is_column) store(dz + target[i], at_target, 1);
      }
    });
    return kOk;
  });
}

LX_NAMESPACE_END
