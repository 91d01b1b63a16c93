// Vectors of fp32 and fp64, and how the four storage types load into and store from them.
//
// Every file under csrc/cpu is compiled once per instruction set with LX_ISA set to its name; all
// names live in namespace lx::LX_ISA, so that no two instruction sets share a function. Arithmetic
// is that of GCC's vector extension (+ - * / < ? : work on whole vectors); only conversions that
// the compiler does not find by itself are intrinsics.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
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

inline Vec32 widen(Bits16 h, bf16) { return (Vec32)(__builtin_convertvector(h, Bits32) << 16); }

// Rounds to nearest even; NaN stays NaN. The CPU's own instruction takes subnormal numbers for 0.
#if defined(__AVX512BF16__)
inline Bits16 narrow(Vec32 v, bf16) { return (Bits16)_mm512_cvtneps_pbh((__m512)v); }
#else
inline Bits16 narrow(Vec32 v, bf16) {
  const Bits32 u = (Bits32)v;
  const Bits32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Bits32 quiet = (u >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, Bits16);
}
#endif

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

template <class A, class Body> inline void for_each_vec(int64_t width, Body body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) body(j, Whole<A>{});
  if (j < width) body(j, width - j);
}

// ---- across lanes, and functions --------------------------------------------------------------

template <class V> inline Lane<V> sum(V v) {
  Lane<V> lane[kLanes<Lane<V>>];
  memcpy(lane, &v, sizeof v);
  for (int half = kLanes<Lane<V>> / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

// Larger of two, numbers or vectors; NaN when either is.
template <class V> inline V max_nan(V a, V b) { return a > b || a != a ? a : b; }

template <class V> inline Lane<V> max_nan(V v) {
  Lane<V> m = v[0];
  for (int i = 1; i < kLanes<Lane<V>>; i++) m = max_nan(m, Lane<V>(v[i]));
  return m;
}

// e^x to about 1 ulp in the range of normal numbers; inf above it, NaN for NaN, below it 0 or a
// subnormal number. x = n ln2 + r with |r| <= ln2 / 2, e^r by its Taylor polynomial; 2^n by the
// exponent bits, in two halves so that n = 128 does not overflow early.
inline Vec32 exp(Vec32 x) {
#if defined(__AVX512F__)
  const __m512 high = _mm512_set1_ps(128), low = _mm512_set1_ps(-128);
  const Vec32 clamped = (Vec32)_mm512_max_ps(low, _mm512_min_ps(high, (__m512)x));  // keeps NaN
  const Vec32 n = (Vec32)_mm512_roundscale_ps((__m512)(clamped * 1.44269504f),
                                              _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec32 big = splat(88.72284f), small = splat(-87.33654f), shift = splat(12582912.f);
  const Vec32 clamped = x > big ? big : (x < small ? small : x);
  const Vec32 n = (clamped * 1.44269504f + shift) - shift;
#endif
  const Vec32 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec32 p = splat(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (Vec32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Int32 k = __builtin_convertvector(n, Int32), half = k >> 1;
  const Vec32 y = p * (Vec32)((half + 127) << 23) * (Vec32)((k - half + 127) << 23);
  const Vec32 low = x < small ? Vec32{} : y;
  return x > big ? splat(__builtin_inff()) : (x == x ? low : x);
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

// e^x for x <= 0 (or a rounding error above): half the work of exp. 0 for -inf and below the range
// of normal numbers, NaN for NaN; the error is about 1 ulp near 0 and grows with |x|.
// x log2(e) = n + f with |f| <= 1/2; 2^f by its minimax polynomial.
inline Vec32 exp_negative(Vec32 x) {
  const Vec32 t = x * 1.44269504f;
#if defined(__AVX512F__)
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-200), (__m512)t);  // NaN stays: it is second
  const Vec32 n = (Vec32)_mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec32 clamped = t < -126.f ? splat(-126.f) : t, shift = splat(12582912.f);
  const Vec32 n = (clamped + shift) - shift;
#endif
  const Vec32 f = (Vec32)clamped - n;
  Vec32 p = splat(1.535336159e-4f);
  p = p * f + 1.339887452e-3f;
  p = p * f + 9.618437360e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.f;
#if defined(__AVX512F__)
  return (Vec32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Vec32 y = p * (Vec32)((__builtin_convertvector(n, Int32) + 127) << 23);
  const Vec32 low = t < -126.f ? Vec32{} : y;
  return x == x ? low : x;
#endif
}

inline Vec64 exp_negative(Vec64 x) { return exp(x); }

LX_NAMESPACE_END
