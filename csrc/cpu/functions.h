// Sums and largest elements across lanes, and exponentials.
#pragma once
#include <cmath>

#include "vec.h"

LX_NAMESPACE_BEGIN

// The groups of lanes of two vectors, halved in length: op of first halves and second ones.
template <int group, class V, class Op> inline V fold(V a, V b, const Op& op) {
  constexpr int L = kLanes<Lane<V>>;
  using Int = std::conditional_t<sizeof(Lane<V>) == 4, int32_t, int64_t>;
  static constexpr auto order = [] {
    std::array<Int, L> order{};
    for (int i = 0; i < L; i++) order[i] = i / (group / 2) * group + i % (group / 2);
    return order;
  }();
  std::conditional_t<sizeof(Int) == 4, Int32, Int64> first;
  memcpy(&first, order.data(), sizeof first);
  return op(__builtin_shuffle(a, b, first), __builtin_shuffle(a, b, first + group / 2));
}

// All lanes of a vector by op: halves of its first n, halves of those, and so on.
template <int n, class V, class Op> inline Lane<V> reduce(V v, const Op& op) {
  if constexpr (n == 1) return v[0];
  else return reduce<n / 2>(fold<n>(v, v, op), op);
}

// Likewise of each of four vectors at once, in the same order: out (4).
template <class V, class Op>
inline void reduce_each(Lane<V>* out, const V (&v)[4], const Op& op) {
  constexpr int L = kLanes<Lane<V>>;
  if constexpr (L < 4) {
    for (int c = 0; c < 4; c++) out[c] = reduce<L>(v[c], op);
  } else {
    V folded = fold<L / 2>(fold<L>(v[0], v[1], op), fold<L>(v[2], v[3], op), op);
    if constexpr (L >= 16) folded = fold<4>(folded, folded, op);
    if constexpr (L >= 8) folded = fold<2>(folded, folded, op);
    for (int c = 0; c < 4; c++) out[c] = folded[c];
  }
}

inline constexpr auto kPlus = [](auto a, auto b) { return a + b; };
inline constexpr auto kLarger = [](auto a, auto b) { return a > b ? a : b; };

template <class V> inline Lane<V> sum(V v) { return reduce<kLanes<Lane<V>>>(v, kPlus); }
template <class V> inline void sum_each(Lane<V>* out, const V (&v)[4]) {
  reduce_each(out, v, kPlus);
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

template <class V> inline Lane<V> sum(const V (&v)[4]) {
  return sum((v[0] + v[1]) + (v[2] + v[3]));
}

constexpr float kLog2e = 1.44269504f;

// e^x to about 1 ulp; 0 below 2^-125.5 (with AVX-512: below the subnormal numbers), inf where it
// overflows, NaN for NaN. x = n ln2 + r with |r| <= ln2 / 2; e^r by its minimax polynomial.
inline Vec32 exp(Vec32 x) {
#if defined(__AVX512F__)
  const Vec32 clamped = at_least(-128, at_most(128, x));
  const Vec32 n = (Vec32)_mm512_roundscale_ps((__m512)(clamped * kLog2e),
                                              _MM_FROUND_TO_NEAREST_INT);
#else
  // moved ends in the bits of n + 126; 2^128 is no number, so 2^(n - 1) it is, of 2 p.
  const Vec32 clamped = at_least(-87.3f, at_most(89, x)), shift = splat(12582912.f + 126);
  const Vec32 moved = clamped * kLog2e + shift, n = moved - shift;
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
  return (p + p) * (Vec32)((Bits32)moved << 23);
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

inline Vec32 polynomial(Vec32 x, float first, std::initializer_list<float> others) {
  Vec32 p = splat(first);
  for (float c : others) p = p * x + c;
  return p;
}

// ln x to 3 ulp, for normal x > 0; NaN for NaN, inf for inf. x = m 2^e with m from sqrt(1/2) to
// sqrt(2), and ln m = 2 artanh((m - 1) / (m + 1)) by its series.
inline Vec32 log(Vec32 x) {
  constexpr int32_t kLeast = 0x3f3504f4;  // the bits of m's least value
  const Int32 e = ((Int32)x - kLeast) >> 23;
  const Vec32 m = (Vec32)((Int32)x - (e << 23)), s = (m - 1) / (m + 1);
  const Vec32 series = polynomial(s * s, 2.f / 9, {2.f / 7, 2.f / 5, 2.f / 3, 2.f});
  const Vec32 y = __builtin_convertvector(e, Vec32) * 0.693147181f + s * series;
  return x < __builtin_inff() ? y : x;
}

inline Vec64 log(Vec64 x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = std::log(x[i]);
  return x;
}

// 2^f by minimax polynomials, as exact as what it becomes a part of, rounded to T, can show: to
// 2.9e-6 for fp16, 8.6e-5 or better for bf16, and about 1 ulp. With AVX-512 for f from 0, where it
// is 1, to 1, else from -1/2 to 1/2.
template <class T> inline Vec32 exp2_fraction(Vec32 f) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>)
    return polynomial(f, 7.706719637e-2f, {2.276448160e-1f, 6.951168180e-1f, 1.f});
  if constexpr (std::is_same_v<T, f16>)
    return polynomial(f, 1.342668477e-2f, {5.224247277e-2f, 2.412802130e-1f, 6.930448413e-1f,
                                           1.f});
  return polynomial(f, 1.867130050e-3f, {9.017030708e-3f, 5.579991266e-2f, 2.401644439e-1f,
                                         6.931512952e-1f, 1.f});
#else
  if constexpr (std::is_same_v<T, bf16>)
    return polynomial(f, 5.517166853e-2f, {2.426111251e-1f, 6.932609677e-1f, 9.999280572e-1f});
  if constexpr (std::is_same_v<T, f16>)
    return polynomial(f, 9.570102207e-3f, {5.591785908e-2f, 2.402474433e-1f, 6.931217909e-1f,
                                           9.999992847e-1f});
  return polynomial(f, 1.326472731e-3f, {9.671512991e-3f, 5.550733581e-2f, 2.402224243e-1f,
                                         6.931470037e-1f, 1.f});
#endif
}

#if defined(__AVX512F__)
// 2^t as exact as T can show; NaN for NaN. With AVX-512 for any t; else for t from -127, which
// gives 0, to 128, which gives inf.
template <class T = float> inline Vec32 exp2_near(Vec32 t) {
  // t less its floor; of an infinite t, 0.
  const Vec32 f = (Vec32)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (Vec32)_mm512_scalef_ps((__m512)exp2_fraction<T>(f), (__m512)t);  // times 2^floor(t)
}

// e^x with half the work of exp, as exact as T can show: in fp32 the error is about 1 ulp near 0
// and grows with |x|. 0 for -inf and below the range of normal numbers, NaN for NaN, inf from 2^128
// (without AVX-512, 2^127.5) on.
template <class T = float> inline Vec32 exp_near(Vec32 x) { return exp2_near<T>(x * kLog2e); }

// exp_near for x <= 0, or not far above.
template <class T = float> inline Vec32 exp_negative(Vec32 x) { return exp_near<T>(x); }
#else
// What a number is rounded to an integer n by: a sum with this one, which ends in the bits n + 127.
constexpr float kRounder = 12582912.f + 127;

template <class T = float> inline Vec32 exp2_near(Vec32 t) {
  const Vec32 rounded = t + kRounder;
  return exp2_fraction<T>(t - (rounded - kRounder)) * (Vec32)((Bits32)rounded << 23);
}

template <class T = float> inline Vec32 exp_negative(Vec32 x) {
  const Vec32 bounded = at_least(-88, x), rounded = bounded * kLog2e + kRounder;
  return exp2_fraction<T>(bounded * kLog2e - (rounded - kRounder)) *
         (Vec32)((Bits32)rounded << 23);
}

template <class T = float> inline Vec32 exp_near(Vec32 x) {
  return exp_negative<T>(at_most(88.8f, x));
}
#endif
template <class T = double> inline Vec64 exp_near(Vec64 x) { return exp(x); }
template <class T = double> inline Vec64 exp_negative(Vec64 x) { return exp(x); }

// e^x as exact as what it becomes a part of, rounded to T, can show.
template <class T> inline Vec<Acc<T>> exp_to(Vec<Acc<T>> x) {
  if constexpr (sizeof(T) == 2) return exp_near<T>(x);
  else return exp(x);
}

// Whether a comparison holds in some lane.
template <class V> inline bool any(V comparison) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)comparison, (__m512i)comparison);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)comparison, (__m256i)comparison);
#else
  return _mm_movemask_epi8((__m128i)comparison);
#endif
}

LX_NAMESPACE_END
