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

// a - 0 is a, to the compiler too; a + 0 it would compute.
inline Vec32 splat(float a) { return a - Vec32{}; }
inline Vec64 splat(double a) { return a - Vec64{}; }

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

// v rounded to bf16 (nearest even; NaN stays NaN), in the upper halves of the lanes.
inline Bits32 round_bf16(Vec32 v) {
  const Bits32 u = (Bits32)v, rounded = u + 0x7fff + ((u >> 16) & 1);
  return rounded | (Bits32)(v != v);
}

// The CPU's own instruction takes subnormal numbers for 0.
inline Bits16 narrow(Vec32 v, bf16) {
#if defined(__AVX512BF16__)
  return (Bits16)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)  // GCC finds longer ways
  return (Bits16)_mm512_cvtepi32_epi16((__m512i)(round_bf16(v) >> 16));
#elif defined(__AVX2__)
  const __m256i high = (__m256i)(round_bf16(v) >> 16);
  return (Bits16)_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#else
  return __builtin_convertvector(round_bf16(v) >> 16, Bits16);
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

// store, past the caches (p is aligned to the vector): memory need not be read before the write.
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

LX_NAMESPACE_END
