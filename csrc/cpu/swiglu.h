// SwiGLU's elementwise part. Formulas in csrc/api.h; s = sigmoid(gate).
#pragma once
#include "parallel.h"

LX_NAMESPACE_BEGIN

template <class T> inline Vec<Acc<T>> sigmoid(Vec<Acc<T>> x) { return 1 / (1 + exp_to<T>(-x)); }

Status swiglu_fwd(void* out, const void* gate, Rows gate_rows, const void* up, Rows up_rows,
                  int64_t F, DType dtype, Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const bool past = past_cache(static_cast<T*>(out), count(gate_rows), F, F);
    parallel_for(stream, count(gate_rows), grain_rows(F), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T *g_row = row<T>(gate, gate_rows, i), *u_row = row<T>(up, up_rows, i);
        T* out_row = static_cast<T*>(out) + i * F;
        for_each_vec<T>(F, [&](int64_t j, auto n) {
          const Vec<Acc<T>> g = load(g_row + j, n);
          store(out_row + j, g * sigmoid<T>(g) * load(u_row + j, n), n, past);
        });
      }
    });
    return kOk;
  });
}

Status swiglu_bwd(void* dgate, void* dup, int64_t grad_stride, const void* dout, Rows dout_rows,
                  const void* gate, Rows gate_rows, const void* up, Rows up_rows, int64_t F,
                  DType dtype, Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t rows = count(gate_rows);
    const bool past = past_cache(static_cast<T*>(dgate), rows, F, grad_stride) &&
                      past_cache(static_cast<T*>(dup), rows, F, grad_stride);
    parallel_for(stream, rows, grain_rows(F), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T *d_row = row<T>(dout, dout_rows, i), *g_row = row<T>(gate, gate_rows, i);
        const T* u_row = row<T>(up, up_rows, i);
        T* dg_row = static_cast<T*>(dgate) + i * grad_stride;
        T* du_row = static_cast<T*>(dup) + i * grad_stride;
        for_each_vec<T>(F, [&](int64_t j, auto n) {
          const Vec<Acc<T>> d = load(d_row + j, n), g = load(g_row + j, n), s = sigmoid<T>(g);
          store(dg_row + j, d * load(u_row + j, n) * s * (1 + g * (1 - s)), n, past);
          store(du_row + j, d * (g * s), n, past);
        });
      }
    });
    return kOk;
  });
}

LX_NAMESPACE_END
