// Rotary position embedding, both pair layouts; the backward is the rotation by minus the angles.
//
// A token's table row is read once, for all its heads. Interleaved pairs are rotated as
//   y = x * (c0 c0 c1 c1 ..) + swap(x) * (-s0 s0 -s1 s1 ..),  swap exchanging neighbours,
// with the two factors spread out once per token; but where vectors go in pairs, as they are.
#pragma once
#include "parallel.h"

LX_NAMESPACE_BEGIN

// (x1, x0, x3, x2, ...)
template <class V> inline V swap_neighbours(V v) {
  using Index = std::conditional_t<sizeof(Lane<V>) == 4, Int32, Int64>;
  Index index;
  for (int i = 0; i < kLanes<Lane<V>>; i++) index[i] = i ^ 1;
  return __builtin_shuffle(v, index);
}

constexpr int64_t kRopeChunk = 512;  // elements of a head whose factors are spread out at a time

template <class T, class W>
void rope_token_interleaved(T* y, const T* x, int64_t x_head_stride, const W* cos, const W* sin,
                            Acc<T> sign, int64_t H, int64_t D, bool past) {
  using A = Acc<T>;
  int64_t begin = 0;
  if constexpr (kInPairs<T>) {
    constexpr int64_t kPair = 2 * kLanes<A>;
    begin = D / kPair * kPair;
    for (int64_t h = 0; h < H; h++)
      for (int64_t j = 0; j < begin; j += kPair) {
        OddKept kept;
        const Odd odd{kept};
        const Even even{kept};
        const T* in = x + h * x_head_stride + j;
        T* out = y + h * D + j;
        const Vec<A> cj = load(cos + j / 2), sj = load(sin + j / 2) * sign;
        const Vec<A> a = load(in, even), b = load(in, odd);
        store(out, a * sj + b * cj, odd, past);
        store(out, a * cj - b * sj, even, past);
      }
  }
  alignas(64) A c[kRopeChunk], s[kRopeChunk];
  for (; begin < D; begin += kRopeChunk) {
    const int64_t width = least(D - begin, kRopeChunk);
    for_each_vec<A>(width / 2, [&](int64_t j, auto n) {
      const Vec<A> cj = load(cos + begin / 2 + j, n), sj = load(sin + begin / 2 + j, n) * sign;
      for (int i = 0; i < kLanes<A> && j + i < width / 2; i++) {
        c[2 * (j + i)] = c[2 * (j + i) + 1] = cj[i];
        s[2 * (j + i)] = -sj[i];
        s[2 * (j + i) + 1] = sj[i];
      }
    });
    for (int64_t h = 0; h < H; h++) {
      const T* in = x + h * x_head_stride + begin;
      T* out = y + h * D + begin;
      for_each_vec<A>(width, [&](int64_t j, auto n) {
        const Vec<A> v = load(in + j, n);
        store(out + j, v * load(c + j, n) + swap_neighbours(v) * load(s + j, n), n, past);
      });
    }
  }
}

template <class T, class W>
void rope_token_halves(T* y, const T* x, int64_t x_head_stride, const W* cos, const W* sin,
                       Acc<T> sign, int64_t H, int64_t D, bool past) {
  using A = Acc<T>;
  alignas(64) A c[kRopeChunk], s[kRopeChunk];  // in the order of the vectors
  const int64_t half = D / 2;
  for (int64_t begin = 0; begin < half; begin += kRopeChunk) {
    const int64_t width = least(half - begin, kRopeChunk);
    for_each_vec<T>(width, [&](int64_t j, auto n) {
      store_ordered(c, j, load(cos + begin + j, n), n);
      store_ordered(s, j, load(sin + begin + j, n) * sign, n);
    });
    for (int64_t h = 0; h < H; h++) {
      const T* in = x + h * x_head_stride + begin;
      T* out = y + h * D + begin;
      for_each_vec<T>(width, [&](int64_t j, auto n) {
        const Vec<A> cj = load_ordered(c, j, n), sj = load_ordered(s, j, n);
        const Vec<A> a = load(in + j, n), b = load(in + half + j, n);
        store(out + j, a * cj - b * sj, n, past);
        store(out + half + j, a * sj + b * cj, n, past);
      });
    }
  }
}

Status rope(void* q_out, void* k_out, const void* q, Rows q_rows, const void* k, Rows k_rows,
            const void* cos, const void* sin, const int64_t table_stride[2], int64_t D,
            int interleaved, int inverse, DType dtype, DType table_dtype, Stream stream) {
  return dispatch(dtype, table_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const auto rotate = interleaved ? rope_token_interleaved<T, W> : rope_token_halves<T, W>;
    const int64_t tokens = q_rows.size[1], heads = q_rows.size[2] + k_rows.size[2];
    const auto past = [&](void* out, const Rows& rows) {
      return past_cache(static_cast<T*>(out), count(rows), D, interleaved ? D : D / 2);
    };
    const bool q_past = past(q_out, q_rows), k_past = k && past(k_out, k_rows);
    parallel_for(stream, q_rows.size[0] * tokens, grain_rows(heads * D), [&](int64_t begin,
                                                                             int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / tokens, position = i % tokens;
        const int64_t at = b * table_stride[0] + position * table_stride[1];
        const auto rotate_token = [&](void* out, const void* x, const Rows& x_rows, bool past) {
          rotate(static_cast<T*>(out) + i * x_rows.size[2] * D,
                 static_cast<const T*>(x) + b * x_rows.stride[0] + position * x_rows.stride[1],
                 x_rows.stride[2], static_cast<const W*>(cos) + at,
                 static_cast<const W*>(sin) + at, inverse ? -1 : 1, x_rows.size[2], D, past);
        };
        rotate_token(q_out, q, q_rows, q_past);
        if (k) rotate_token(k_out, k, k_rows, k_past);
      }
    });
    return kOk;
  });
}

LX_NAMESPACE_END
