// Cross-entropy of rows of logits. Formulas in csrc/api.h.
//
// The forward goes over a row three times (largest, sum of exponentials, the target's entry), but
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

Status cross_entropy_fwd(void* loss, void* lse, const void* logits, Rows logits_rows,
                         const int64_t* target, int64_t V, int64_t ignore_index, DType dtype,
                         Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    parallel_for(stream, count(logits_rows), grain_rows(V), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* z = row<T>(logits, logits_rows, i);
        const A row_lse = log_sum_exp(z, V);
        static_cast<A*>(lse)[i] = row_lse;
        static_cast<A*>(loss)[i] =
            target[i] == ignore_index ? 0 : row_lse - load(z + target[i], 1)[0];
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
                         int64_t ignore_index, DType dtype, Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    parallel_for(stream, count(logits_rows), grain_rows(V), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* z = row<T>(logits, logits_rows, i);
        T* dz = static_cast<T*>(dlogits) + i * V;
        if (target[i] == ignore_index) {
          memset(dz, 0, V * sizeof(T));
          continue;
        }
        const A row_lse = static_cast<const A*>(lse)[i];
        const A scale = static_cast<const A*>(dloss)[i * dloss_stride];
        const Vec<A> at_target = (exp(splat(load(z + target[i], 1)[0] - row_lse)) - 1) * scale;
        for_each_vec<A>(V, [&](int64_t j, auto n) {
          store(dz + j, exp(load(z + j, n) - row_lse) * scale, n);
        });
        store(dz + target[i], at_target, 1);
      }
    });
    return kOk;
  });
}

LX_NAMESPACE_END
