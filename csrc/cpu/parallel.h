// Loops over the caller's thread pool, and the rows of a strided tensor.
#pragma once
#include <atomic>

#include "columns.h"
#include "functions.h"

LX_NAMESPACE_BEGIN

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// body(begin, end) over contiguous parts of [0, n), at least `grain` items each.
template <class Body> void parallel_for(Stream stream, int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  auto pool = static_cast<const ThreadPool*>(stream);
  pool->parallel_for(
      0, n, grain,
      [](int64_t begin, int64_t end, void* arg) {
        (*static_cast<const Body*>(arg))(begin, end);
        _mm_sfence();  // stores past the caches are seen by whoever sees that this part is done
      },
      const_cast<Body*>(&body));
}

inline int num_threads(Stream stream) {
  return static_cast<const ThreadPool*>(stream)->num_threads();
}

// body(i, thread) for each i of [0, n), handed out one by one: for items of unequal cost. No two
// calls with the same thread, a number below num_threads, run at once.
template <class Body> void parallel_items(Stream stream, int64_t n, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(stream, num_threads(stream), 1, [&](int64_t thread, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i, thread);
  });
}

// About how many elements are worth a thread.
constexpr int64_t kGrainElements = 16384;
inline int64_t grain_rows(int64_t width) { return kGrainElements / (width + 1) + 1; }

// Whether rows of `width` elements, `stride` apart from p on, are written past the caches: they are
// aligned, and more than a core's caches would keep until somebody reads them.
template <class T> bool past_cache(const T* p, int64_t rows, int64_t width, int64_t stride) {
  constexpr int64_t kCaches = 4 << 20, kVec = kLanes<Acc<T>> * sizeof(T);
  constexpr int64_t kAlign = kInPairs<T> ? 2 * kVec : kVec;
  return rows * width * int64_t(sizeof(T)) > kCaches &&
         reinterpret_cast<uintptr_t>(p) % kAlign == 0 && stride * sizeof(T) % kAlign == 0;
}

inline int64_t count(const Rows& r) { return r.size[0] * r.size[1] * r.size[2]; }

// Element offset of row i.
inline int64_t offset(const Rows& r, int64_t i) {
  if (r.size[0] == 1 && r.size[1] == 1) return i * r.stride[2];
  const int64_t k = i % r.size[2], ij = i / r.size[2];
  return ij / r.size[1] * r.stride[0] + ij % r.size[1] * r.stride[1] + k * r.stride[2];
}

template <class T> const T* row(const void* p, const Rows& r, int64_t i) {
  return static_cast<const T*>(p) + offset(r, i);
}

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

LX_NAMESPACE_END
