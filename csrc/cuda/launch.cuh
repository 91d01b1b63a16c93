// What every launcher shares: types from a DType, strided rows, the status of a launch.
#pragma once
#include <algorithm>

#include "../api.h"
#include "vec.cuh"

namespace lx {

// Calls f(T{}) with the storage type of dtype.
template <class F> Status dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kBFloat16: return f(bf16{});
    case kFloat16: return f(f16{});
    case kFloat64: return f(double{});
  }
  return kUnsupported;
}

// Calls f(T{}, W{}): a second type (weights, tables) that is T itself or fp32.
template <class F> Status dispatch(DType dtype, DType second, const F& f) {
  return dispatch(dtype, [&](auto t) -> Status {
    if (second == dtype) return f(t, t);
    if constexpr (!std::is_same_v<decltype(t), double>)
      if (second == kFloat32) return f(t, float{});
    return kUnsupported;
  });
}

inline int64_t count(const Rows& r) { return r.size[0] * r.size[1] * r.size[2]; }

constexpr int64_t kMaxRows = 1 << 30;   // so that they are counted, and divided, as ints
constexpr int64_t kMaxWidth = 1 << 30;  // of a row: offsets within one are ints

// Where row i begins.
template <class T> __device__ const T* row(const T* p, const Rows& r, int i) {
  if (r.size[0] == 1 && r.size[1] == 1) return p + i * r.stride[2];
  const unsigned n1 = unsigned(r.size[1]), n2 = unsigned(r.size[2]);
  const unsigned k = i % n2, ij = i / n2;
  return p + ij / n1 * r.stride[0] + ij % n1 * r.stride[1] + k * r.stride[2];
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every row begins at a multiple of 16 bytes. p null: nothing to read.
template <class T> bool aligned(const void* p, const Rows& r) {
  bool fits = aligned(p);
  for (int i = 0; i < 3; i++) fits &= r.size[i] == 1 || r.stride[i] % kVecSize<T> == 0;
  return fits || p == nullptr;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The threads of a row of `vecs` vectors where each has up to `keep` at once: whole warps.
inline int row_threads(int64_t vecs, int keep, int most) {
  return int(std::clamp<int64_t>(ceil_div(vecs, 32 * keep) * 32, 32, most));
}

// The status of the launches since the last call; kernels.cu keeps the text of an error.
Status launch_status();

}  // namespace lx
