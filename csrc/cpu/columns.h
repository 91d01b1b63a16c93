// The vectors of a row of elements.
#pragma once
#include "vec.h"

LX_NAMESPACE_BEGIN

// kLanes elements.
template <class A> struct Whole {};

template <class T, class A> inline Vec<A> load(const T* p, Whole<A>) { return load(p); }
template <class T, class A> inline void store(T* p, Vec<A> v, Whole<A>) { store(p, v); }

// store, past the caches or not.
template <class T, class A> inline void store(T* p, Vec<A> v, Whole<A>, bool past_cache) {
  past_cache ? store_past_cache(p, v) : store(p, v);
}
template <class T, class V> inline void store(T* p, V v, int64_t n, bool) { store(p, v, n); }

// Of 2 kLanes elements every second one: those at 0, 2 and so on, or those at 1, 3 and so on. bf16
// goes in such pairs where it is only read, or there is no AVX-512: a register holds both, in the
// lower and in the upper halves of its lanes, so that no element moves from lane to lane. What is
// stored of the odd ones is kept until the even ones are stored, in the same order.
template <class T> constexpr bool kReadInPairs = std::is_same_v<T, bf16>;
template <class T> constexpr bool kInPairs = kReadInPairs<T> && kVecBytes < 64;
struct OddKept {
  Bits32 bits[2];
  int stored = 0, taken = 0;
};
struct Odd { OddKept& kept; };
struct Even { OddKept& kept; };

inline Vec32 load(const bf16* p, Odd) {
  Bits32 both;
  memcpy(&both, p, sizeof both);
  return (Vec32)(both & 0xffff0000);
}
inline Vec32 load(const bf16* p, Even) {
  Bits32 both;
  memcpy(&both, p, sizeof both);
  return (Vec32)(both << 16);
}
template <int first> inline Vec32 every_second(const float* p) {
  Int32 index;
  for (int i = 0; i < kLanes<float>; i++) index[i] = 2 * i + first;
  return __builtin_shuffle(load(p), load(p + kLanes<float>), index);
}
inline Vec32 load(const float* p, Odd) { return every_second<1>(p); }
inline Vec32 load(const float* p, Even) { return every_second<0>(p); }

inline void store(bf16*, Vec32 v, Odd n, bool = false) {
  n.kept.bits[n.kept.stored++] = round_bf16(v);
}
inline void store(bf16* p, Vec32 v, Even n, bool past_cache = false) {
  const Bits32 odd = n.kept.bits[n.kept.taken++], even = round_bf16(v) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const Vec32 both = (Vec32)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
  const Vec32 both = (Vec32)(even | (odd & 0xffff0000));
#endif
  store(reinterpret_cast<float*>(p), both, Whole<float>{}, past_cache);
}

// store; returns what was stored, rounded.
template <class T, class N> inline Vec<Acc<T>> store_rounded(T* p, Vec<Acc<T>> v, N n) {
  store(p, v, n);
  if constexpr (std::is_same_v<N, Odd> || std::is_same_v<N, Even>)
    return (Vec32)(round_bf16(v) & 0xffff0000);
  else
    return load(p, n);
}

// Scratch rows in the order of the vectors: of a pair the even elements lie before the odd ones.
template <class A, class N> inline Vec<A> load_ordered(const A* row, int64_t j, N n) {
  if constexpr (std::is_same_v<N, Odd>) return load(row + j + kLanes<A>);
  else if constexpr (std::is_same_v<N, Even>) return load(row + j);
  else return load(row + j, n);
}
template <class A, class N> inline void store_ordered(A* row, int64_t j, Vec<A> v, N n) {
  if constexpr (std::is_same_v<N, Odd>) store(row + j + kLanes<A>, v);
  else if constexpr (std::is_same_v<N, Even>) store(row + j, v);
  else store(row + j, v, n);
}

// Fetches the element `ahead` after element j of a row, a vector's first, once a line: the CPU's
// own fetching ahead ends with each page.
template <class T> inline void fetch_ahead(const T* row, int64_t j, int64_t ahead) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (kLanes<Acc<T>> >= kLine || j % kLine == 0) __builtin_prefetch(row + j + ahead);
}

// load, with `fill` beyond the last element.
template <class T, class N> inline Vec<Acc<T>> load_or(Acc<T>, const T* p, N n) {
  return load(p, n);
}
template <class T> inline Vec<Acc<T>> load_or(Acc<T> fill, const T* p, int64_t n) {
  return load(p, n, fill);
}

// Calls body(j, n) for the vectors of a row of `width` elements T: load and store take n as it
// comes, Odd before Even, Whole, or the number of elements of the last, fewer than kLanes.
template <class T, class Body> inline void for_each_vec(int64_t width, Body body) {
  using A = Acc<T>;
  int64_t j = 0;
  if constexpr (kInPairs<T>)
    for (; j + 2 * kLanes<A> <= width; j += 2 * kLanes<A>) {
      OddKept kept;
      body(j, Odd{kept});
      body(j, Even{kept});
    }
  for (; j + kLanes<A> <= width; j += kLanes<A>) body(j, Whole<A>{});
  if (j < width) body(j, width - j);
}

// Likewise; body(j, n, sum) with one of four sums, so that no addition waits for the one before.
template <class T, bool kPairs = kInPairs<T>, class V, class Body>
inline void for_each_vec(int64_t width, V (&sums)[4], Body body) {
  using A = Acc<T>;
  int64_t j = 0;
  for (; j + 4 * kLanes<A> <= width; j += 4 * kLanes<A>)
    if constexpr (kPairs) {
      OddKept kept[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        body(j + i * 2 * kLanes<A>, Odd{kept[i]}, sums[2 * i]);
        body(j + i * 2 * kLanes<A>, Even{kept[i]}, sums[2 * i + 1]);
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) body(j + i * kLanes<A>, Whole<A>{}, sums[i]);
    }
  for (; j + kLanes<A> <= width; j += kLanes<A>) body(j, Whole<A>{}, sums[0]);
  if (j < width) body(j, width - j, sums[1]);
}

LX_NAMESPACE_END
