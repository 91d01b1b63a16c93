// Vectors of fp32 and fp64, and how the four storage types load into and store from them.
//
// Every file under csrc/cpu is compiled once per instruction set with LX_ISA set to its name; all
// names live in namespace lx::LX_ISA, so that no two instruction sets share a function. Arithmetic
// is that of GCC's vector extension (+ - * / < ? : work on whole vectors); only conversions that
// the compiler does not find by itself are intrinsics.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "../api.h"

#ifndef LX_ISA
#error "csrc/cpu is compiled once per instruction set, with -DLX_ISA=plain|avx2|avx512|..."
#endif

#define LX_NAMESPACE_BEGIN namespace lx { namespace LX_ISA {
#define LX_NAMESPACE_END } }

LX_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// The type a storage type is computed in.
template <class T> using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A: float or double.
template <class A> constexpr int kLanes = kVecBytes / sizeof(A);
typedef float Vec32 __attribute__((vector_size(kVecBytes)));
typedef double Vec64 __attribute__((vector_size(kVecBytes)));
typedef int32_t Int32 __attribute__((vector_size(kVecBytes)));
typedef int64_t Int64 __attribute__((vector_size(kVecBytes)));
typedef uint32_t Bits32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVecBytes / 2)));
template <class A> using Vec = std::conditional_t<std::is_same_v<A, double>, Vec64, Vec32>;
template <class V> using Lane = std::remove_cvref_t<decltype(V{}[0])>;

inline Vec32 splat(float a) { return Vec32{} + a; }
inline Vec64 splat(double a) { return Vec64{} + a; }

// ---- float <-> storage, whole vectors ---------------------------------------------------------

inline Vec32 widen(Bits16 h, bf16) {
#if defined(__AVX512F__)  // GCC finds longer ways
  return (Vec32)((Bits32)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif defined(__AVX2__)
  return (Vec32)((Bits32)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return (Vec32)(__builtin_convertvector(h, Bits32) << 16);
#endif
}

// Rounds to nearest even; NaN stays NaN. The CPU's own instruction takes subnormal numbers for 0.
inline Bits16 narrow(Vec32 v, bf16) {
#if defined(__AVX512BF16__)
  return (Bits16)_mm512_cvtneps_pbh((__m512)v);
#else
  const Bits32 u = (Bits32)v, rounded = u + 0x7fff + ((u >> 16) & 1);
  const Bits32 high = (rounded | (Bits32)(v != v)) >> 16;
#if defined(__AVX512F__)  // GCC finds longer ways
  return (Bits16)_mm512_cvtepi32_epi16((__m512i)high);
#elif defined(__AVX2__)
  return (Bits16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)high),
                                  _mm256_extracti128_si256((__m256i)high, 1));
#else
  return __builtin_convertvector(high, Bits16);
#endif
#endif
}

#if defined(__AVX512F__)
inline Vec32 widen(Bits16 h, f16) { return (Vec32)_mm512_cvtph_ps((__m256i)h); }
inline Bits16 narrow(Vec32 v, f16) {
  return (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
inline Vec32 widen(Bits16 h, f16) { return (Vec32)_mm256_cvtph_ps((__m128i)h); }
inline Bits16 narrow(Vec32 v, f16) {
  return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline Vec32 widen(Bits16 h, f16) {
  Vec32 v;
  for (int i = 0; i < kLanes<float>; i++) {
    _Float16 x;
    const uint16_t bits = h[i];
    memcpy(&x, &bits, 2);
    v[i] = x;
  }
  return v;
}
inline Bits16 narrow(Vec32 v, f16) {
  Bits16 h;
  for (int i = 0; i < kLanes<float>; i++) {
    const _Float16 x = v[i];
    uint16_t bits;
    memcpy(&bits, &x, 2);
    h[i] = bits;
  }
  return h;
}
#endif

// ---- load and store ---------------------------------------------------------------------------

// kLanes<Acc<T>> elements at p.
template <class T> inline Vec<Acc<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    Bits16 h;
    memcpy(&h, p, sizeof h);
    return widen(h, T{});
  } else {
    Vec<T> v;
    memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class T> inline void store(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const Bits16 h = narrow(v, T{});
    memcpy(p, &h, sizeof h);
  } else {
    memcpy(p, &v, sizeof v);
  }
}

// store, past the caches (the vector at p is aligned): memory need not be read before it is written.
template <class T> inline void store_past_cache(T* p, Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const Bits16 h = narrow(v, T{});
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)h);
#else
    memcpy(p, &h, sizeof h);
#endif
  } else {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
  }
}

// The first n < kLanes elements at p, the rest `fill`.
template <class T> inline Vec<Acc<T>> load(const T* p, int64_t n, Acc<T> fill = 0) {
  T part[kLanes<Acc<T>>] = {};
  memcpy(part, p, n * sizeof(T));
  Vec<Acc<T>> v = load(part);
  for (int64_t i = n; i < kLanes<Acc<T>>; i++) v[i] = fill;
  return v;
}

template <class T> inline void store(T* p, Vec<Acc<T>> v, int64_t n) {
  T part[kLanes<Acc<T>>];
  store(part, v);
  memcpy(p, part, n * sizeof(T));
}

// Calls body(j, n) for the vectors of a row of `width` elements: n is an integral constant kLanes
// in whole vectors, and a smaller count in the last; load and store take it as it comes.
template <class A> struct Whole {};
template <class T, class A> inline Vec<A> load(const T* p, Whole<A>) {
  return load(p);
}
template <class T, class A> inline void store(T* p, Vec<A> v, Whole<A>) { store(p, v); }

// store, past the caches or not.
template <class T, class A> inline void store(T* p, Vec<A> v, Whole<A>, bool past_cache) {
  past_cache ? store_past_cache(p, v) : store(p, v);
}
template <class T, class V> inline void store(T* p, V v, int64_t n, bool) { store(p, v, n); }

// load, with `fill` beyond the last element.
template <class T, class A> inline Vec<A> load_or(A, const T* p, Whole<A>) { return load(p); }
template <class T, class A> inline Vec<A> load_or(A fill, const T* p, int64_t n) {
  return load(p, n, fill);
}

template <class A, class Body> inline void for_each_vec(int64_t width, Body body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) body(j, Whole<A>{});
  if (j < width) body(j, width - j);
}

// Likewise; body(j, n, sum) with one of four sums, so that no addition waits for the one before.
template <class A, class V, class Body>
inline void for_each_vec(int64_t width, V (&sums)[4], Body body) {
  int64_t j = 0;
  for (; j + 4 * kLanes<A> <= width; j += 4 * kLanes<A>)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) body(j + i * kLanes<A>, Whole<A>{}, sums[i]);
  for (; j + kLanes<A> <= width; j += kLanes<A>) body(j, Whole<A>{}, sums[0]);
  if (j < width) body(j, width - j, sums[1]);
}

// ---- across lanes, and functions --------------------------------------------------------------

template <class V> inline Lane<V> sum(V v) {
  Lane<V> lane[kLanes<Lane<V>>];
  memcpy(lane, &v, sizeof v);
  for (int half = kLanes<Lane<V>> / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

// The groups of lanes of two vectors, halved in length: first halves plus second ones.
template <int group, class V> inline V fold(V a, V b) {
  constexpr int L = kLanes<Lane<V>>;
  using Int = std::conditional_t<sizeof(Lane<V>) == 4, int32_t, int64_t>;
  static constexpr auto order = [] {
    std::array<Int, L> order{};
    for (int i = 0; i < L; i++) order[i] = i / (group / 2) * group + i % (group / 2);
    return order;
  }();
  std::conditional_t<sizeof(Int) == 4, Int32, Int64> first;
  memcpy(&first, order.data(), sizeof first);
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + group / 2);
}

// sum of each of four vectors at once, in the same order: out (4).
template <class V> inline void sum_each(Lane<V>* out, const V (&v)[4]) {
  constexpr int L = kLanes<Lane<V>>;
  if constexpr (L < 4) {
    for (int c = 0; c < 4; c++) out[c] = sum(v[c]);
  } else {
    V folded = fold<L / 2>(fold<L>(v[0], v[1]), fold<L>(v[2], v[3]));
    if constexpr (L >= 16) folded = fold<4>(folded, folded);
    if constexpr (L >= 8) folded = fold<2>(folded, folded);
    for (int c = 0; c < 4; c++) out[c] = folded[c];
  }
}

// Larger of two, numbers or vectors; NaN when either is.
template <class V> inline V max_nan(V a, V b) { return a > b || a != a ? a : b; }

template <class V> inline Lane<V> max_nan(V v) {
  Lane<V> m = v[0];
  for (int i = 1; i < kLanes<Lane<V>>; i++) m = max_nan(m, Lane<V>(v[i]));
  return m;
}

// The larger, the smaller of a bound and x; NaN when x is (the instructions return their second).
#if defined(__AVX512F__)
inline Vec32 at_least(float bound, Vec32 x) {
  return (Vec32)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
}
inline Vec32 at_most(float bound, Vec32 x) {
  return (Vec32)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
}
#elif defined(__AVX2__)
inline Vec32 at_least(float bound, Vec32 x) {
  return (Vec32)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
}
inline Vec32 at_most(float bound, Vec32 x) {
  return (Vec32)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
}
#else
inline Vec32 at_least(float bound, Vec32 x) { return splat(bound) > x ? splat(bound) : x; }
inline Vec32 at_most(float bound, Vec32 x) { return splat(bound) < x ? splat(bound) : x; }
#endif

template <class V> inline Lane<V> sum(const V (&v)[4]) { return sum((v[0] + v[1]) + (v[2] + v[3])); }

// e^x to about 1 ulp; 0 below 2^-125.5 (with AVX-512: below the subnormal numbers), inf where it
// overflows, NaN for NaN. x = n ln2 + r with |r| <= ln2 / 2; e^r by its minimax polynomial.
inline Vec32 exp(Vec32 x) {
#if defined(__AVX512F__)
  const Vec32 clamped = at_least(-128, at_most(128, x));
  const Vec32 n = (Vec32)_mm512_roundscale_ps((__m512)(clamped * 1.44269504f),
                                              _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec32 clamped = at_least(-87.3f, at_most(89, x)), shift = splat(12582912.f);
  const Vec32 moved = clamped * 1.44269504f + shift, n = moved - shift;
#endif
  const Vec32 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec32 p = splat(1.381446698e-3f);
  p = p * r + 8.368780479e-3f;
  p = p * r + 4.166839422e-2f;
  p = p * r + 1.666652011e-1f;
  p = p * r + 4.999999341e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (Vec32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // moved ends in the bits of n; 2^128 is no number, so 2^(n - 1) it is, of 2 p.
  const Bits32 half_power = ((Bits32)moved << 23) + (126u << 23);
  return (p + p) * (Vec32)half_power;
#endif
}

inline Vec64 exp(Vec64 x) {
  const Vec64 big = splat(709.782712893384), small = splat(-708.396418532264);
  const Vec64 shift = splat(6755399441055744.0);
  const Vec64 clamped = x > big ? big : (x < small ? small : x);
  const Vec64 moved = clamped * 1.4426950408889634 + shift, n = moved - shift;
  const Vec64 r = (clamped - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  Vec64 p = splat(1. / 6227020800);
  for (double c : {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                   1. / 720, 1. / 120, 1. / 24, 1. / 6, 0.5, 1., 1.})
    p = p * r + c;
  const Int64 k = (Int64)moved - (Int64)shift, half = k >> 1;
  const Vec64 y = p * (Vec64)((half + 1023) << 52) *
                        (Vec64)((k - half + 1023) << 52);
  const Vec64 low = x < small ? Vec64{} : y;
  return x > big ? splat(__builtin_inf()) : (x == x ? low : x);
}

// 2^t to about 1 ulp, by a minimax polynomial; NaN for NaN. With AVX-512 for any t; else for t from
// -127, which gives 0, to 128, which gives inf.
inline Vec32 exp2_near(Vec32 t) {
#if defined(__AVX512F__)
  // t less its floor; of an infinite t, 0.
  const Vec32 f = (Vec32)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec32 p = splat(1.867130050e-3f);
  p = p * f + 9.017030708e-3f;
  p = p * f + 5.579991266e-2f;
  p = p * f + 2.401644439e-1f;
  p = p * f + 6.931512952e-1f;
  p = p * f + 1.f;
  return (Vec32)_mm512_scalef_ps((__m512)p, (__m512)t);  // times 2^floor(t)
#else
  const Vec32 shift = splat(12582912.f), moved = t + shift, f = t - (moved - shift);
  Vec32 p = splat(1.326472731e-3f);
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.f;
  return p * (Vec32)(((Bits32)moved << 23) + (127u << 23));  // moved ends in the bits of t, rounded
#endif
}

// e^x with half the work of exp: the error is about 1 ulp near 0 and grows with |x|. 0 for -inf and
// below the range of normal numbers, NaN for NaN, inf from 2^128 (without AVX-512, 2^127.5) on.
inline Vec32 exp_near(Vec32 x) {
  const Vec32 t = x * 1.44269504f;
#if defined(__AVX512F__)
  return exp2_near(t);
#else
  return exp2_near(at_least(-127, at_most(128, t)));
#endif
}
inline Vec64 exp_near(Vec64 x) { return exp(x); }

// e^x as exact as what it becomes a part of, rounded to T, can show.
template <class T> inline Vec<Acc<T>> exp_to(Vec<Acc<T>> x) {
  if constexpr (sizeof(T) == 2) return exp_near(x);
  else return exp(x);
}

// exp_near for x <= 0, or not far above.
inline Vec32 exp_negative(Vec32 x) {
  const Vec32 t = x * 1.44269504f;
#if defined(__AVX512F__)
  return exp2_near(t);
#else
  return exp2_near(at_least(-127, t));
#endif
}
inline Vec64 exp_negative(Vec64 x) { return exp(x); }

// Whether a comparison holds in some lane.
template <class V> inline bool any(V comparison) {
  int64_t words[kVecBytes / 8], all = 0;
  memcpy(words, &comparison, kVecBytes);
  for (int64_t word : words) all |= word;
  return all;
}

LX_NAMESPACE_END
