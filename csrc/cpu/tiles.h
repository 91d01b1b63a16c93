// Small matrix products out of packed blocks: what attention is made of.
//
// A product C = A B runs over the "units" of its inner dimension: one number of the accumulation
// type, or, where the CPU multiplies pairs of bf16 (vdpbf16ps, AMX), two neighbouring bf16 in the
// bits of one float. A is (rows, K units), B (K units, columns), C (rows, columns) of the
// accumulation type; rows come in groups of kTileRows, columns in vectors, units in groups of
// kTileUnits, and what is beyond the data is zero.
//
// Rows X (n, D) of a tensor become operands in three ways:
//   lines(X)     (n, D / kUnit units): units along the width, as they lie in memory
//   pairs(X)     (n / kUnit units, D): units along the rows, kUnit rows interleaved
//   transpose()  of either: a B operand as an A operand and the other way round
#pragma once
#include <cstdlib>

#include "amx.h"
#include "parallel.h"

LX_NAMESPACE_BEGIN

// The type a storage type is multiplied in: bf16 itself, or its accumulation type.
#if defined(__AVX512BF16__)
template <class T> using Factor = std::conditional_t<std::is_same_v<T, bf16>, bf16, Acc<T>>;
#else
template <class T> using Factor = Acc<T>;
#endif
template <class E> constexpr int kUnit = std::is_same_v<E, bf16> ? 2 : 1;

// The shape of one tile of sums.
template <class E> constexpr int kTileRows = kAmx<E> ? kAmxSide : 4;
template <class E> constexpr int kTileUnits = kAmx<E> ? 16 : 1;
#if defined(__AVX512F__)
template <class E> constexpr int kTileVecs = 4;  // 16 of 32 registers hold sums; 4 of AMX's 8
#else
template <class E> constexpr int kTileVecs = 2;  // 8 of 16
#endif

// What sizes of operands are rounded up to: whole vectors, whole groups of rows.
template <class E>
constexpr int kPad = kLanes<Acc<E>> > kTileRows<E> ? kLanes<Acc<E>> : kTileRows<E>;
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- products ---------------------------------------------------------------------------------

template <class E> inline Vec<Acc<E>> multiply_add(Vec<Acc<E>> c, Acc<E> a, Vec<Acc<E>> b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bf16>)
    return (Vec32)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  else
#endif
    return c + a * b;
}

// The sums of kTileRows rows by kVecs vectors of columns over K units, added to kSets sets of sums
// in turn: with two, no addition of a narrow tile waits for the one before.
template <class E, int kVecs, int kSets> struct Tile {
  using A = Acc<E>;
  Vec<A> sum[kTileRows<E>][kVecs * kSets] = {};

  void multiply(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t K) {
    const auto add = [&](int64_t k, int set) {
      Vec<A> columns[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) columns[v] = load(b + k * ldb + v * kLanes<A>);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows<E>; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; v++)
          sum[r][set + v] = multiply_add<E>(sum[r][set + v], a[r * lda + k], columns[v]);
    };
    int64_t k = 0;
    for (; k + kSets <= K; k += kSets)
#pragma GCC unroll 2
      for (int set = 0; set < kSets; set++) add(k + set, set);
    if (k < K) add(k, 0);
    if constexpr (kSets == 2)
      for (int r = 0; r < kTileRows<E>; r++) sum[r][0] += sum[r][1];
  }
};

// Calls f(begin, n) for groups of up to kVecs of the vectors [begin, end), n a constant.
template <int kVecs, class F> inline void for_each_vec_group(int begin, int end, const F& f) {
  for (; begin + kVecs <= end; begin += kVecs) f(begin, std::integral_constant<int, kVecs>{});
  if constexpr (kVecs > 1)
    if (begin < end) for_each_vec_group<kVecs - 1>(begin, end, f);
}

// C = A B, or C += A B, for kRows rows, the vectors [begin, end) of columns and K units. A B is
// summed by itself first, as short chains of sums round less than one long one; but not by AMX,
// whose factors were rounded to bf16. Unless kTwoSets lets narrow tiles sum in an order of their
// own, a sum has the same bits whatever is computed beside it, and for B^T A^T.
template <bool kAdd, class E, int kRows = kTileRows<E>, bool kTwoSets = false>
void product(Acc<E>* c, int64_t ldc, const Acc<E>* a, int64_t lda, const Acc<E>* b, int64_t ldb,
             int begin, int end, int64_t K) {
  constexpr int64_t kLane = kLanes<Acc<E>>;
  for_each_vec_group<kTileVecs<E> * kTileRows<E> / kRows>(begin, end, [=](int at, auto vecs) {
    if constexpr (kAmx<E>) {
      amx_product<kAdd, kRows / kAmxSide, vecs>(c + at * kLane, ldc, a, lda, b + at * kLane, ldb,
                                                round_up(K, kTileUnits<E>));
    } else {
      Tile<E, vecs, kTwoSets && vecs == 1 ? 2 : 1> tile;
      tile.multiply(a, lda, b + at * kLane, ldb, K);
      for (int r = 0; r < kRows; r++)
        for (int v = 0; v < vecs; v++) {
          Acc<E>* to = c + r * ldc + (at + v) * kLane;
          store(to, kAdd ? load(to) + tile.sum[r][v] : tile.sum[r][v]);
        }
    }
  });
}

// C = A B, or where `add` C += A B, for kTileRows rows.
template <class E>
void product(bool add, Acc<E>* c, int64_t ldc, const Acc<E>* a, int64_t lda, const Acc<E>* b,
             int64_t ldb, int begin, int end, int64_t K) {
  if (add) product<true, E>(c, ldc, a, lda, b, ldb, begin, end, K);
  else product<false, E>(c, ldc, a, lda, b, ldb, begin, end, K);
}

// ---- operands ---------------------------------------------------------------------------------

constexpr int kAhead = 8;  // how many rows before it is read a row is fetched
template <bool kToWrite = false, class T> inline void prefetch(const T* row, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = 0; j < D; j += kLine) __builtin_prefetch(row + j, kToWrite);
}

// out (padded rows, ld units) = lines of x, whose n rows of D lie `stride` apart.
template <class E, class T>
void lines(Acc<E>* out, int64_t ld, int64_t padded, const T* x, int64_t stride, int64_t n,
           int64_t D) {
  for (int64_t i = 0; i < padded; i++) {
    Acc<E>* line = out + i * ld;
    if (i >= n) {
      memset(line, 0, ld * sizeof(Acc<E>));
    } else if constexpr (std::is_same_v<E, T>) {
      constexpr int64_t kStep = kVecBytes / sizeof(T);
      const T* from = x + i * stride;
      T* to = reinterpret_cast<T*>(line);
      prefetch(from + kAhead * stride, D);
      int64_t j = 0;
      for (; j + kStep <= D; j += kStep) memcpy(to + j, from + j, kVecBytes);
      if (j < D) memcpy(to + j, from + j, (D - j) * sizeof(T));
      if (const int64_t rest = ld * sizeof(Acc<E>) - D * sizeof(T)) memset(to + D, 0, rest);
    } else {
      for_each_vec<Acc<E>>(D, [&](int64_t j, auto w) {
        store(line + j, load(x + i * stride + j, w), w);
      });
      for (int64_t j = D; j < ld; j++) line[j] = 0;
    }
  }
}

#if defined(__AVX512BF16__)
// The bf16 of one half of a vector, then of the other, as units of one of each.
inline Vec32 interleave(__m512i halves) {
  alignas(64) static constexpr uint16_t order[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec32)_mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}
#endif

// The bits of two rows of numbers as units: a first, b second. With one number a unit: a.
template <class E> inline Vec<Acc<E>> unit(Vec<Acc<E>> a, [[maybe_unused]] Vec<Acc<E>> b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bf16>)
    return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
  else
#endif
    return a;
}

// Likewise of kLanes numbers at a and at b, of zeros where one is null; n as load takes it.
template <class E, class T, class N>
inline Vec<Acc<E>> unit(const T* a, [[maybe_unused]] const T* b, N n) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bf16>) {
    const auto bits = [=](const T* p) {
      __m256i h = _mm256_setzero_si256();
      if constexpr (std::is_same_v<N, Whole<float>>) memcpy(&h, p, sizeof h);
      else memcpy(&h, p, n * sizeof(T));
      return h;
    };
    const __m512i first = _mm512_zextsi256_si512(a ? bits(a) : _mm256_setzero_si256());
    return interleave(b ? _mm512_inserti64x4(first, bits(b), 1) : first);
  } else
#endif
    return a ? load(a, n) : Vec<Acc<E>>{};
}

// Two vectors of a row of numbers, a then b, as units. With one number a unit: a.
template <class E> inline Vec<Acc<E>> line(Vec<Acc<E>> a, [[maybe_unused]] Vec<Acc<E>> b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bf16>)
    return (Vec32)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  else
#endif
    return a;
}

// Factors that a vector holds.
template <class E> constexpr int kFactors = kLanes<Acc<E>> * kUnit<E>;

// kLanes int8 as numbers.
template <class A> inline Vec<A> numbers(const int8_t* p) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>)
    return (Vec32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>)
    return (Vec32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; i++) v[i] = p[i];
  return v;
}

// kFactors elements at p, int8 or of a storage type, as a vector of units.
template <class E, class T> inline Vec<Acc<E>> factors(const T* p) {
  using A = Acc<E>;
  if constexpr (std::is_same_v<T, E>) {
    Vec<A> v;
    memcpy(&v, p, sizeof v);
    return v;
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return line<E>(numbers<A>(p), kUnit<E> == 2 ? numbers<A>(p + kLanes<A>) : Vec<A>{});
  } else {
    return load(p);
  }
}

// The first n of them, the rest 0.
template <class E, class T> inline Vec<Acc<E>> factors(const T* p, int64_t n) {
  T part[kFactors<E>] = {};
  memcpy(part, p, n * sizeof(T));
  return factors<E>(part);
}

// The next kFactors factors at p, of which `left` are there, the rest 0.
template <class E, class T> inline Vec<Acc<E>> factors_left(const T* p, int64_t left) {
  return left >= kFactors<E> ? factors<E>(p) : factors<E>(p, left);
}

// c + a * b, unit by unit.
template <class E>
inline Vec<Acc<E>> multiply_add(Vec<Acc<E>> c, Vec<Acc<E>> a, Vec<Acc<E>> b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bf16>)
    return (Vec32)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  else
#endif
    return c + a * b;
}

// out (padded / kUnit, ld) = pairs of x, whose n rows of D lie `stride` apart: of rows that follow
// each other, or of those kApart apart in groups of twice as many.
template <class E, int64_t kApart = 1, class T>
void pairs(Acc<E>* out, int64_t ld, int64_t padded, const T* x, int64_t stride, int64_t n,
           int64_t D) {
  using A = Acc<E>;
  constexpr int kU = kUnit<E>;
  for (int64_t u = 0; u < padded / kU; u++, out += ld) {
    const int64_t i = u / kApart * kApart * kU + u % kApart;
    for (int r = 0; r < kU; r++) prefetch(x + (i + r * kApart + kAhead) * stride, D);
    for_each_vec<A>(D, [&](int64_t j, auto w) {
      const T* at = x + i * stride + j;
      const T* other = i + kApart < n ? at + kApart * stride : nullptr;
      store(out + j, unit<E>(i < n ? at : nullptr, other, w), w);
    });
    for (int64_t j = D; j < ld; j++) out[j] = 0;
  }
}

// Transposes kLanes vectors in place: log2(kLanes) rounds exchange blocks off the diagonal.
template <class A> inline void transpose(Vec<A>* rows) {
  using Index = std::conditional_t<sizeof(A) == 4, Int32, Int64>;
#pragma GCC unroll 4
  for (int half = 1; half < kLanes<A>; half *= 2) {
    Index low, high;
    for (int i = 0; i < kLanes<A>; i++) {
      low[i] = i & half ? kLanes<A> + i - half : i;
      high[i] = i & half ? kLanes<A> + i : i + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; i++)
      if (!(i & half)) {
        const Vec<A> a = rows[i], b = rows[i + half];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + half] = __builtin_shuffle(a, b, high);
      }
  }
}

// out (columns, rows) = x (rows, columns), both rounded up to whole vectors.
template <class A>
void transpose(A* out, int64_t ld_out, const A* x, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += kLanes<A>)
    for (int64_t j = 0; j < columns; j += kLanes<A>) {
      Vec<A> block[kLanes<A>];
      for (int r = 0; r < kLanes<A>; r++) block[r] = load(x + (i + r) * ld + j);
      transpose<A>(block);
      for (int r = 0; r < kLanes<A>; r++) store(out + (j + r) * ld_out + i, block[r]);
    }
}

// out (D units, ld), columns [0, columns) = the transposed lines of rows of D elements. row(i) is
// where row i lies; null: zeros. Rows beyond the columns are fetched for the next call.
template <class E, class Row>
void transposed_lines(Acc<E>* out, int64_t ld, int64_t columns, int64_t D, const Row& row) {
  using A = Acc<E>;
  constexpr int kLane = kLanes<A>;
  for (int64_t i = 0; i < columns; i += kLane)
    for (int64_t d = 0; d < D; d += kFactors<E>) {
      Vec<A> block[kLane];
      for (int r = 0; r < kLane; r++) {
        const auto *x = row(i + r), *next = row(i + kLane + r);
        if (next) __builtin_prefetch(next + d);
        block[r] = x ? factors_left<E>(x + d, D - d) : Vec<A>{};
      }
      transpose<A>(block);
      for (int r = 0; r < kLane; r++) store(out + (d / kUnit<E> + r) * ld + i, block[r]);
    }
}

// ---- scratch ----------------------------------------------------------------------------------

// Memory for the length of a kernel, cut into aligned arrays.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : begin_(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)))) {}
  ~Scratch() { std::free(begin_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* begin() const { return begin_; }  // null: no memory to be had

 private:
  char* begin_;
};

// Cuts arrays off a piece of memory; with null, counts what they would take.
class Cutter {
 public:
  explicit Cutter(char* begin) : begin_(begin) {}
  template <class A> A* array(int64_t count) {
    const int64_t at = used_;
    used_ += round_up(count * sizeof(A), 64);
    return begin_ ? reinterpret_cast<A*>(begin_ + at) : nullptr;
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

LX_NAMESPACE_END
