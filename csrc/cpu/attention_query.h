// Attention forward for a query or two, as in generation: nothing is laid out, keys and values are
// read as they lie.
#pragma once
#include "attention_tile.h"

LX_NAMESPACE_BEGIN

// What one query of some heads needs, per head.
template <class T> struct QueryScratch {
  using A = Acc<T>;
  static constexpr int64_t kUnits = kBlock / kUnit<Factor<T>>;
  A *weights, *units;        // (kBlock) and, of the weights as factors, (kUnits)
  A *out, *total, *top;      // (D); (kLanes), to be added up; one number
  int64_t bytes;

  QueryScratch(char* memory, int64_t D, int64_t heads) {
    Cutter cut(memory);
    weights = cut.template array<A>(heads * kBlock);
    units = cut.template array<A>(heads * kUnits);
    out = cut.template array<A>(heads * D);
    total = cut.template array<A>(heads * kLanes<A>);
    top = cut.template array<A>(heads);
    bytes = cut.used();
  }
};

// The weights of a block's first n keys for one query: in place of its scores, and as factors. Adds
// them to total and raises top; returns by what the sums so far shrink.
template <class T>
Acc<T> query_softmax(Acc<T>* weights, Acc<T>* units, Acc<T>* total, Acc<T>* top, int64_t n,
                     Acc<T> scale) {
  using A = Acc<T>;
  using E = Factor<T>;
  constexpr int kU = kUnit<E>;
  constexpr int64_t kLane = kLanes<A>;
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  const A before = *top;
  Vec<A> largest = splat(before);
  for (int64_t j = 0; j < kBlock; j += kLane) {
    Vec<A> scores = load(weights + j) * scale;
    for (int64_t c = clamp(n - j, 0, kLane); c < kLane; c++) scores[c] = kNone;
    largest = largest > scores ? largest : scores;
    store(weights + j, scores);
  }
  for (int64_t c = 0; c < kLane; c++) *top = *top > largest[c] ? *top : largest[c];
  const A shift = *top == kNone ? 0 : *top;
  const Vec<A> decay = exp_negative(splat(before - shift));
  Vec<A> sum = load(total) * decay;
  for (int64_t j = 0; j < kBlock; j += kU * kLane) {
    Vec<A> part[kU];
    for (int u = 0; u < kU; u++)
      sum += part[u] = exp_negative(load(weights + j + u * kLane) - shift);
    store(units + j / kU, line<E>(part[0], part[kU - 1]));
  }
  store(total, sum);
  return decay[0];
}

// Query i of the heads [first, last): the width along the vectors, nothing laid out. Keys and
// values are read row by row, all heads of a row after each other.
template <class T>
void forward_query(T* o, Acc<T>* lse, const Attention& a, const Sequence& s, int64_t first,
                   int64_t last, int64_t i, const QueryScratch<T>& scratch) {
  using A = Acc<T>;
  using E = Factor<T>;
  constexpr int kU = kUnit<E>, kKeys = 4;
  constexpr int64_t kUnits = QueryScratch<T>::kUnits;
  const int64_t D = a.D, sharing = a.H / a.Hkv;
  const T* q = static_cast<const T*>(a.q) + s.q_at + i * a.q_stride[1];
  const T* k = static_cast<const T*>(a.k) + s.k_at;
  const T* v = static_cast<const T*>(a.v) + s.v_at;
  for (int64_t x = 0; x < (last - first) * D; x++) scratch.out[x] = 0;
  for (int64_t x = 0; x < (last - first) * kLanes<A>; x++) scratch.total[x] = 0;
  for (int64_t x = 0; x < last - first; x++)
    scratch.top[x] = -std::numeric_limits<A>::infinity();
  for (int64_t j0 = s.first_key(i); j0 < s.end_key(i); j0 += kBlock) {
    const int64_t n = least(kBlock, s.end_key(i) - j0);
    for (int64_t j = 0; j < n; j += kKeys)
      for (int64_t h = first; h < last; h++) {
        const T* query = q + h * a.q_stride[2];
        const T* key[kKeys];
        for (int c = 0; c < kKeys; c++) {
          const int64_t row = j0 + least(j + c, n - 1);
          key[c] = k + row * a.k_stride[1] + h / sharing * a.k_stride[2];
          if (h % sharing == 0) prefetch(key[c] + kAhead * a.k_stride[1], D);
        }
        Vec<A> dots[kKeys] = {};
        const auto add = [&](int64_t d, auto... left) {
          const Vec<A> x = factors<E>(query + d, left...);
#pragma GCC unroll 4
          for (int c = 0; c < kKeys; c++)
            dots[c] = multiply_add<E>(dots[c], x, factors<E>(key[c] + d, left...));
        };
        int64_t d = 0;
        for (; d + kFactors<E> <= D; d += kFactors<E>) add(d);
        if (d < D) add(d, D - d);
        sum_each(scratch.weights + (h - first) * kBlock + j, dots);
      }
    for (int64_t x = 0; x < last - first; x++) {
      const A decay = query_softmax<T>(scratch.weights + x * kBlock,
                                       scratch.units + x * kUnits, scratch.total + x * kLanes<A>,
                                       scratch.top + x, n, static_cast<A>(a.scale));
      A* out = scratch.out + x * D;
      for_each_vec<A>(D, [&](int64_t d, auto w) { store(out + d, load(out + d, w) * decay, w); });
    }
    for (int64_t j = 0; j < n; j += kKeys)
      for (int64_t h = first; h < last; h++) {
        const A* units = scratch.units + (h - first) * kUnits + j / kU;
        A* out = scratch.out + (h - first) * D;
        const T* value[kKeys];
        for (int c = 0; c < kKeys; c++) {
          value[c] = v + (j0 + j + c) * a.v_stride[1] + h / sharing * a.v_stride[2];
          if (h % sharing == 0) prefetch(value[c] + kAhead * a.v_stride[1], D);
        }
        for_each_vec<A>(D, [&](int64_t d, auto w) {
          Vec<A> sum = load(out + d, w);
#pragma GCC unroll 4
          for (int c = 0; c < kKeys; c += kU)
            if (j + c < n)
              sum = multiply_add<E>(sum, units[c / kU], unit<E>(
                  value[c] + d, j + c + kU - 1 < n ? value[c + kU - 1] + d : nullptr, w));
          store(out + d, sum, w);
        });
      }
  }
  for (int64_t h = first; h < last; h++) {
    Vec<A> inverse, lses;
    end_sums<A>(inverse, lses, splat(sum(load(scratch.total + (h - first) * kLanes<A>))),
                splat(scratch.top[h - first]));
    if (s.end_key(i) <= s.first_key(i)) inverse = Vec<A>{};
    const A* out = scratch.out + (h - first) * D;
    T* row = o + ((s.q_row + i) * a.H + h) * D;
    for_each_vec<A>(D, [&](int64_t d, auto w) { store(row + d, load(out + d, w) * inverse, w); });
    lse[s.lse_at + h * s.lse_stride + i] = lses[0];
  }
}

// Sequences that have queries.
inline int64_t sequences(const Attention& a) {
  if (!a.cu_q) return a.B;
  int64_t count = 0;
  for (int64_t b = 0; b < a.B; b++) count += a.cu_q[b + 1] > a.cu_q[b];
  return count;
}

// Heads for which one query goes through the keys at once: where the heads of a key lie side by
// side, so many that each thread has some.
inline int64_t heads_of(const Attention& a, int64_t threads) {
  int64_t kv = a.k_stride[2] < a.k_stride[1] ? a.Hkv : 1;
  while (kv > 1 && sequences(a) * (a.Hkv / kv) < threads) kv = (kv + 1) / 2;
  return kv * (a.H / a.Hkv);
}

LX_NAMESPACE_END
