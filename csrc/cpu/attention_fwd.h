// Attention forward: softmax(scale * q k^T) v by online softmax. Formulas in csrc/api.h.
//
// Everything is transposed, queries along the vectors: scores (keys, queries), out (D, queries). So
// the softmax is elementwise over the rows of a tile, and no sum runs across lanes. An item of work
// is kChunk queries of one head; each block of keys is laid out once for all its strips. A block
// that no query of a strip sees is skipped, of the others nearly the seen part is computed.
#pragma once
#include "attention.h"

LX_NAMESPACE_BEGIN

constexpr int64_t kChunk = 256;    // queries for which a block of keys is laid out once
constexpr int64_t kFewQueries = 2;  // up to so many are worked on one by one

template <class E> struct ForwardScratch {
  using A = Acc<E>;
  int64_t lines_ld, out_rows;
  A *keys, *value_pairs, *values;  // (kBlock, D), (kBlock, D) and (D, kBlock) units
  A *scores, *weights;             // (kBlock, kStrip); weights (kBlock units, kStrip) of softmax
  A *queries, *out, *top, *sum;    // per strip: (D units, kStrip), (D, kStrip), (kStrip) twice
  A *decay, *rows;                 // (kStrip); (kStrip, D)
  int64_t bytes;

  ForwardScratch(char* memory, int64_t D) {
    Cutter cut(memory);
    constexpr int64_t kStrips = kChunk / kStrip;
    lines_ld = round_up((D + kUnit<E> - 1) / kUnit<E>, kPad<A>);
    out_rows = round_up(D, kPad<A>);
    keys = cut.template array<A>(kBlock * lines_ld);
    value_pairs = cut.template array<A>(kBlock / kUnit<E> * out_rows);
    values = cut.template array<A>(kBlock / kUnit<E> * out_rows);
    scores = cut.template array<A>(kBlock * kStrip);
    weights = kUnit<E> == 1 ? scores : cut.template array<A>(kBlock / kUnit<E> * kStrip);
    queries = cut.template array<A>(kStrips * lines_ld * kStrip);
    out = cut.template array<A>(kStrips * out_rows * kStrip);
    top = cut.template array<A>(kStrips * kStrip);
    sum = cut.template array<A>(kStrips * kStrip);
    decay = cut.template array<A>(kStrip);
    rows = cut.template array<A>(kStrip * most(out_rows, lines_ld));
    bytes = cut.used();
  }
};

// weights = exp(scores - top) and their sum, for one vector of queries, after top has risen to the
// block's largest score; decay = exp(old top - new top), by which earlier sums shrink.
template <class E>
void softmax_step(Acc<E>* weights, Acc<E>* decay, Acc<E>* top, Acc<E>* sum, const Acc<E>* scores) {
  using A = Acc<E>;
  const Vec<A> none = splat(-std::numeric_limits<A>::infinity()), before = load(top);
  Vec<A> tops[2] = {before, load(scores)};
  for (int64_t n = 1; n < kBlock; n++) {
    const Vec<A> s = load(scores + n * kStrip);
    tops[n & 1] = tops[n & 1] > s ? tops[n & 1] : s;
  }
  const Vec<A> after = tops[0] > tops[1] ? tops[0] : tops[1];
  const Vec<A> shift = after == none ? Vec<A>{} : after;
  Vec<A> sums[2] = {};
  for (int64_t n = 0; n < kBlock; n += 2) {
    const Vec<A> a = exp_negative(load(scores + n * kStrip) - shift);
    const Vec<A> b = exp_negative(load(scores + (n + 1) * kStrip) - shift);
    sums[0] += a;
    sums[1] += b;
    if constexpr (kUnit<E> == 2) {
      store(weights + n / 2 * kStrip, unit<E>(a, b));
    } else {
      store(weights + n * kStrip, a);
      store(weights + (n + 1) * kStrip, b);
    }
  }
  const Vec<A> factor = exp_negative(before - shift);
  store(top, after);
  store(decay, factor);
  store(sum, load(sum) * factor + (sums[0] + sums[1]));
}

// What the sums over the keys are divided by, as its inverse, and lse, for a query whose largest
// score is top and whose weights add up to sum. One that sees no key gives zeros; one that sees only
// scores of -inf gives NaN, as softmax does; a score of inf gives an lse of inf.
template <class A> A inverse_of(A sum, bool sees) {
  if (sum == 0) return sees ? std::numeric_limits<A>::quiet_NaN() : 0;
  return 1 / sum;
}
template <class A> A lse_of(A top, A sum) {
  constexpr A kInf = std::numeric_limits<A>::infinity();
  if (sum == 0) return -kInf;
  if (top == kInf) return kInf;
  return static_cast<A>(top + std::log(double(sum)));
}

// One strip, queries [i0, i0 + rows), takes in the block of keys from j0 on.
template <class E>
void forward_block(const ForwardScratch<E>& w, int strip, const Sequence& s, int64_t i0,
                   int64_t rows, int64_t j0, int64_t D, Acc<E> scale) {
  using A = Acc<E>;
  constexpr int64_t kLane = kLanes<A>;
  A *top = w.top + strip * kStrip, *sum = w.sum + strip * kStrip;
  A* out = w.out + strip * w.out_rows * kStrip;
  scores_of<E>(w.scores, w.keys, w.queries + strip * w.lines_ld * kStrip, w.lines_ld,
               (D + kUnit<E> - 1) / kUnit<E>, scale, s, j0, i0, rows);
  const int vecs = (rows + kLane - 1) / kLane;
  for (int v = 0; v < vecs; v++)
    softmax_step<E>(w.weights + v * kLane, w.decay + v * kLane, top + v * kLane, sum + v * kLane,
                    w.scores + v * kLane);
  accumulate_over_keys<E>(out, w.values, w.weights, w.decay, s, j0, i0, rows, D);
}

template <class T, class E>
void forward_chunk(T* o, Acc<T>* lse, const Attention& a, const Sequence& s, int64_t h,
                   int64_t begin, int64_t end, const ForwardScratch<E>& w) {
  using A = Acc<E>;
  const int64_t D = a.D, stride = a.q_stride[1];
  const int64_t kv = h / (a.H / a.Hkv);
  const T* q = static_cast<const T*>(a.q) + s.q_at + h * a.q_stride[2];
  const T* k = static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2];
  const T* v = static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2];
  const int strips = (end - begin + kStrip - 1) / kStrip;
  for (int strip = 0; strip < strips; strip++) {
    const int64_t i0 = begin + strip * kStrip, rows = least(kStrip, end - i0);
    lines<E>(w.rows, w.lines_ld, kStrip, q + i0 * stride, stride, rows, D);
    transpose(w.queries + strip * w.lines_ld * kStrip, kStrip, w.rows, w.lines_ld, kStrip,
              w.lines_ld);
    memset(w.out + strip * w.out_rows * kStrip, 0, w.out_rows * kStrip * sizeof(A));
  }
  for (int64_t r = 0; r < strips * kStrip; r++) {
    w.top[r] = -std::numeric_limits<A>::infinity();
    w.sum[r] = 0;
  }
  const int64_t keys_end = s.end_key(end - 1);
  for (int64_t j0 = s.first_key(begin) / kBlock * kBlock; j0 < keys_end; j0 += kBlock) {
    const int64_t n = least(kBlock, s.S - j0);
    lines<E>(w.keys, w.lines_ld, kBlock, k + j0 * a.k_stride[1], a.k_stride[1], n, D);
    pairs<E>(w.value_pairs, w.out_rows, kBlock, v + j0 * a.v_stride[1], a.v_stride[1], n, D);
    transpose(w.values, kBlock / kUnit<E>, w.value_pairs, w.out_rows, kBlock / kUnit<E>,
              w.out_rows);
    for (int strip = 0; strip < strips; strip++) {
      const int64_t i0 = begin + strip * kStrip, rows = least(kStrip, end - i0);
      if (s.first_key(i0) < j0 + kBlock && s.end_key(i0 + rows - 1) > j0)
        forward_block<E>(w, strip, s, i0, rows, j0, D, static_cast<A>(a.scale));
    }
  }
  for (int strip = 0; strip < strips; strip++) {
    const int64_t i0 = begin + strip * kStrip, rows = least(kStrip, end - i0);
    const A *top = w.top + strip * kStrip, *sum = w.sum + strip * kStrip;
    transpose(w.rows, w.out_rows, w.out + strip * w.out_rows * kStrip, kStrip, w.out_rows, kStrip);
    for (int64_t r = 0; r < rows; r++) {
      const A inverse = inverse_of(sum[r], s.end_key(i0 + r) > s.first_key(i0 + r));
      T* row = o + ((s.q_row + i0 + r) * a.H + h) * D;
      for_each_vec<A>(D, [&](int64_t d, auto n) {
        store(row + d, load(w.rows + r * w.out_rows + d, n) * inverse, n);
      });
      lse[s.lse_at + h * s.lse_stride + i0 + r] = lse_of(top[r], sum[r]);
    }
  }
}

// One query: the width along the vectors, nothing laid out.
template <class T>
void forward_query(T* o, Acc<T>* lse, const Attention& a, const Sequence& s, int64_t h, int64_t i,
                   Acc<T>* out) {
  using A = Acc<T>;
  const int64_t D = a.D, kv = h / (a.H / a.Hkv);
  const T* q = static_cast<const T*>(a.q) + s.q_at + i * a.q_stride[1] + h * a.q_stride[2];
  const T* k = static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2];
  const T* v = static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2];
  A top = -std::numeric_limits<A>::infinity(), total = 0;
  for (int64_t d = 0; d < D; d++) out[d] = 0;
  for (int64_t j0 = s.first_key(i); j0 < s.end_key(i); j0 += kBlock) {
    const int64_t n = least(kBlock, s.end_key(i) - j0);
    A weight[kBlock];
    const A before = top;
    for (int64_t j = 0; j < n; j++) {
      const T* key = k + (j0 + j) * a.k_stride[1];
      Vec<A> dots[4] = {};
      for_each_vec<A>(D, dots, [&](int64_t d, auto w, Vec<A>& dot) {
        dot += load(q + d, w) * load(key + d, w);
      });
      weight[j] = sum(dots) * static_cast<A>(a.scale);
      top = top > weight[j] ? top : weight[j];
    }
    const A shift = top == -std::numeric_limits<A>::infinity() ? 0 : top;
    for_each_vec<A>(n, [&](int64_t j, auto w) {
      store(weight + j, exp_negative(load(weight + j, w) - shift), w);
    });
    const A decay = exp_negative(splat(before - shift))[0];
    total *= decay;
    for (int64_t j = 0; j < n; j++) total += weight[j];
    for_each_vec<A>(D, [&](int64_t d, auto w) { store(out + d, load(out + d, w) * decay, w); });
    const auto add = [&](int64_t j, auto keys) {  // row by row: columns of rows share few cache sets
      constexpr int kKeys = decltype(keys)::value;
      const T* value = v + (j0 + j) * a.v_stride[1];
      for_each_vec<A>(D, [&](int64_t d, auto w) {
        Vec<A> sum = load(out + d, w);
        for (int i = 0; i < kKeys; i++)
          sum += weight[j + i] * load(value + i * a.v_stride[1] + d, w);
        store(out + d, sum, w);
      });
    };
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) add(j, std::integral_constant<int, 4>{});
    for (; j < n; j++) add(j, std::integral_constant<int, 1>{});
  }
  const A inverse = inverse_of(total, s.end_key(i) > s.first_key(i));
  T* row = o + ((s.q_row + i) * a.H + h) * D;
  for_each_vec<A>(D, [&](int64_t d, auto w) { store(row + d, load(out + d, w) * inverse, w); });
  lse[s.lse_at + h * s.lse_stride + i] = lse_of(top, total);
}

// Keys are not split.
int64_t attention_fwd_parts(const Attention*) { return 1; }

Status attention_fwd(void* o, void* lse, void*, const Attention* attention, Stream stream) {
  const Attention& a = *attention;
  return dispatch(a.dtype, [&](auto t) {
    using T = decltype(t);
    using E = Factor<T>;
    const int64_t chunks = (longest(a) + kChunk - 1) / kChunk, items = a.B * a.H * chunks;
    const int64_t bytes = ForwardScratch<E>(nullptr, a.D).bytes;
    const Scratch scratch(bytes * num_threads(stream));
    if (!scratch.begin()) return kOutOfMemory;
    parallel_items(stream, items, [&](int64_t item, int64_t thread) {
      const int64_t chunk = chunks - 1 - item / (a.B * a.H);  // the longest first
      const int64_t b = item / a.H % a.B, h = item % a.H;
      const Sequence s(a, b);
      const ForwardScratch<E> w(scratch.begin() + thread * bytes, a.D);
      const int64_t begin = chunk * kChunk, end = least(begin + kChunk, s.T);
      if (end - begin > kFewQueries)
        forward_chunk<T, E>(static_cast<T*>(o), static_cast<Acc<T>*>(lse), a, s, h, begin, end, w);
      else
        for (int64_t i = begin; i < end; i++)
          forward_query(static_cast<T*>(o), static_cast<Acc<T>*>(lse), a, s, h, i, w.rows);
    });
    return kOk;
  });
}

LX_NAMESPACE_END
