// Attention forward: softmax(scale * q k^T) v by online softmax. Formulas in csrc/api.h.
//
// Everything is transposed, queries along the vectors: scores (keys, queries), out (D, queries). So
// the softmax is elementwise over the rows of a tile, and no sum runs across lanes. An item of work
// is a chunk of queries of one head. It takes kSpan keys at a time, laid out once for all its
// strips; each strip takes them in block by block, while its sums are at hand. A block that no
// query of a strip sees is skipped, of the others nearly the seen part is computed.
#pragma once
#include "attention.h"

LX_NAMESPACE_BEGIN

template <class E> constexpr int64_t kForwardStrip = kAmx<E> ? 32 : 64;
constexpr int64_t kMostChunk = 1024, kLeastChunk = 256;
constexpr int64_t kFewQueries = 2;  // up to so many are worked on one by one

template <class E> struct ForwardScratch {
  static constexpr int64_t kStrip = kForwardStrip<E>;
  using A = Acc<E>;
  int64_t lines_ld, out_rows;
  A *keys, *values;                // per block: (kBlock, D units), (D, kBlock units)
  A *value_pairs;                  // (kBlock units, D)
  A* scores;                       // (kBlock, kStrip); of softmax, (kBlock units, kStrip)
  A *queries, *out, *top, *sum;    // per strip: (D units, kStrip), (D, kStrip), (kStrip) twice
  A* rows;                         // (kStrip, D)
  int64_t bytes;

  ForwardScratch(char* memory, int64_t D, int64_t chunk) {
    Cutter cut(memory);
    const int64_t strips = chunk / kStrip;
    lines_ld = round_up((D + kUnit<E> - 1) / kUnit<E>, kPad<E>);
    out_rows = round_up(D, kPad<E>);
    keys = cut.template array<A>(kSpan * lines_ld);
    values = cut.template array<A>(kSpan / kUnit<E> * out_rows);
    value_pairs = cut.template array<A>(kBlock / kUnit<E> * out_rows);
    scores = cut.template array<A>(kBlock * kStrip);
    queries = cut.template array<A>(strips * lines_ld * kStrip);
    out = cut.template array<A>(strips * out_rows * kStrip);
    top = cut.template array<A>(strips * kStrip);
    sum = cut.template array<A>(strips * kStrip);
    rows = cut.template array<A>(kStrip * most(out_rows, lines_ld));
    bytes = cut.used();
  }
};

// How far above top a score may lie, in powers of the base, before it becomes the top and the sums
// so far are scaled down: few blocks after the first have one.
constexpr int kRise = 8;

// Puts weights, in units, in place of the scores (keys, kStrip) of n keys for one vector of
// queries, and adds them to sum. The sums so far are sum and the columns out (D, kStrip).
template <class E>
void softmax_step(Acc<E>* scores, Acc<E>* top, Acc<E>* sum, Acc<E>* out, int64_t D, int64_t n,
                  Acc<E> factor) {
  using A = Acc<E>;
  constexpr int64_t kStrip = kForwardStrip<E>;
  const Vec<A> none = splat(-std::numeric_limits<A>::infinity()), before = load(top);
  Vec<A> largest[4] = {none, none, none, none};
  for (int64_t j = 0; j < n; j += 4)  // n is a multiple of kKeyGroup
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const Vec<A> s = load(scores + (j + i) * kStrip);
      largest[i] = largest[i] > s ? largest[i] : s;
    }
  for (int i : {1, 2, 3}) largest[0] = largest[0] > largest[i] ? largest[0] : largest[i];
  const Vec<A> after = largest[0] * factor;
  const auto rises = after > before + kRise;
  const Vec<A> now = rises ? after : before, shift = now == none ? Vec<A>{} : now;
  if (any(rises)) {
    store(top, now);
    if (any(rises & (before != none))) {
      const Vec<A> decay = weight_of<E>(before, 1, shift);
      store(sum, load(sum) * decay);
      for (int64_t d = 0; d < D; d++) store(out + d * kStrip, load(out + d * kStrip) * decay);
    }
  }
  Vec<A> sums[2] = {};
  for (int64_t j = 0; j < n; j += 2) {
    const Vec<A> a = weight_of<E>(load(scores + j * kStrip), factor, shift);
    const Vec<A> b = weight_of<E>(load(scores + (j + 1) * kStrip), factor, shift);
    sums[0] += a;
    sums[1] += b;
    if constexpr (kUnit<E> == 2) {
      store(scores + j / 2 * kStrip, unit<E>(a, b));
    } else {
      store(scores + j * kStrip, a);
      store(scores + (j + 1) * kStrip, b);
    }
  }
  store(sum, load(sum) + (sums[0] + sums[1]));
}

// What the sums over the keys are divided by, as its inverse, and lse, for a query whose weights,
// exp(score - top), add up to sum. One that sees no key gives zeros; one that sees only scores of
// -inf gives NaN, as softmax does; a score of inf gives an lse of inf.
template <class A> A inverse_of(A sum, bool sees) {
  if (sum == 0) return sees ? std::numeric_limits<A>::quiet_NaN() : 0;
  return 1 / sum;
}
template <class A> A lse_of(double top, A sum) {
  constexpr A kInf = std::numeric_limits<A>::infinity();
  if (sum == 0) return -kInf;
  if (top == kInf) return kInf;
  return static_cast<A>(top + std::log(double(sum)));
}

// One strip, queries [i0, i0 + rows), takes in block `block` of the span, the keys from j0 on.
template <class E>
void forward_tile(const ForwardScratch<E>& w, int strip, int block, const Sequence& s, int64_t i0,
                  int64_t rows, int64_t j0, int64_t D, Scale<E> scale) {
  using A = Acc<E>;
  constexpr int64_t kStrip = kForwardStrip<E>;
  const A* keys = w.keys + block * kBlock * w.lines_ld;
  const A* values = w.values + block * (kBlock / kUnit<E>) * w.out_rows;
  A *top = w.top + strip * kStrip, *sum = w.sum + strip * kStrip;
  A* out = w.out + strip * w.out_rows * kStrip;
  scores_of<E, kStrip>(w.scores, keys, w.queries + strip * w.lines_ld * kStrip, w.lines_ld,
                       (D + kUnit<E> - 1) / kUnit<E>, scale.negative, s, j0, i0, rows);
  for_each_query_group<E>(s, j0, i0, rows, [&](int begin, int end, int64_t n) {
    for (int64_t r = begin * kLanes<A>; r < end * kLanes<A>; r += kLanes<A>)
      softmax_step<E>(w.scores + r, top + r, sum + r, out + r, D, n, scale.factor);
    accumulate_over_keys<E, kStrip>(out, values, w.scores, begin, end, n, D);
  });
}

template <class T, class E>
void forward_chunk(T* o, Acc<T>* lse, const Attention& a, const Sequence& s, int64_t h,
                   int64_t begin, int64_t end, const ForwardScratch<E>& w) {
  using A = Acc<E>;
  constexpr int64_t kStrip = kForwardStrip<E>;
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
  constexpr int64_t kUnits = kBlock / kUnit<E>;
  for (int64_t span = s.first_key(begin) / kBlock * kBlock; span < keys_end; span += kSpan) {
    const int blocks = (least(kSpan, keys_end - span) + kBlock - 1) / kBlock;
    for (int block = 0; block < blocks; block++) {
      const int64_t j0 = span + block * kBlock, n = least(kBlock, s.S - j0);
      lines<E>(w.keys + block * kBlock * w.lines_ld, w.lines_ld, kBlock, k + j0 * a.k_stride[1],
               a.k_stride[1], n, D);
      pairs<E>(w.value_pairs, w.out_rows, kBlock, v + j0 * a.v_stride[1], a.v_stride[1], n, D);
      transpose(w.values + block * kUnits * w.out_rows, kUnits, w.value_pairs, w.out_rows, kUnits,
                w.out_rows);
    }
    for (int strip = 0; strip < strips; strip++) {
      const int64_t i0 = begin + strip * kStrip, rows = least(kStrip, end - i0);
      const int64_t first = s.first_key(i0), last = s.end_key(i0 + rows - 1);
      for (int block = 0; block < blocks; block++) {
        const int64_t j0 = span + block * kBlock;
        if (first < j0 + kBlock && last > j0)
          forward_tile<E>(w, strip, block, s, i0, rows, j0, D, Scale<E>(a.scale));
      }
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
      lse[s.lse_at + h * s.lse_stride + i0 + r] = lse_of(top[r] * kLnOfBase<E>, sum[r]);
    }
  }
}

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
    const A total = sum(load(scratch.total + (h - first) * kLanes<A>));
    const A inverse = inverse_of(total, s.end_key(i) > s.first_key(i));
    const A* out = scratch.out + (h - first) * D;
    T* row = o + ((s.q_row + i) * a.H + h) * D;
    for_each_vec<A>(D, [&](int64_t d, auto w) { store(row + d, load(out + d, w) * inverse, w); });
    lse[s.lse_at + h * s.lse_stride + i] = lse_of(scratch.top[h - first], total);
  }
}

// Heads for which one query goes through the keys at once: where the heads of a key lie side by
// side, so many that each thread has some.
inline int64_t heads_of(const Attention& a, int64_t threads) {
  int64_t kv = a.k_stride[2] < a.k_stride[1] ? a.Hkv : 1;
  while (kv > 1 && a.B * (a.Hkv / kv) < threads) kv = (kv + 1) / 2;
  return kv * (a.H / a.Hkv);
}

// Queries for which a span of keys is laid out once: many, but enough chunks to share out.
inline int64_t chunk_of(const Attention& a, int64_t threads) {
  int64_t chunk = kMostChunk;
  while (chunk > kLeastChunk && a.B * a.H * (longest(a) / chunk) < 4 * threads) chunk /= 2;
  return chunk;
}

// Keys are not split.
int64_t attention_fwd_parts(const Attention*) { return 1; }

Status attention_fwd(void* o, void* lse, void*, const Attention* attention, Stream stream) {
  const Attention& a = *attention;
  return dispatch(a.dtype, [&](auto t) {
    using T = decltype(t);
    using E = Factor<T>;
    const int64_t size = chunk_of(a, num_threads(stream));
    const int64_t chunks = (longest(a) + size - 1) / size, items = a.B * a.H * chunks;
    const int64_t heads = heads_of(a, num_threads(stream));
    const int64_t bytes = most(ForwardScratch<E>(nullptr, a.D, size).bytes,
                               QueryScratch<T>(nullptr, a.D, heads).bytes);
    const Scratch scratch(bytes * num_threads(stream));
    if (!scratch.begin()) return kOutOfMemory;
    parallel_items(stream, items, [&](int64_t item, int64_t thread) {
      const int64_t chunk = chunks - 1 - item / (a.B * a.H);  // the longest first
      const int64_t b = item / a.H % a.B, h = item % a.H;
      const Sequence s(a, b);
      char* memory = scratch.begin() + thread * bytes;
      const int64_t begin = chunk * size, end = least(begin + size, s.T);
      if (end - begin > kFewQueries) {
        [[maybe_unused]] const TileState<E> tiles;
        forward_chunk<T, E>(static_cast<T*>(o), static_cast<Acc<T>*>(lse), a, s, h, begin, end,
                            ForwardScratch<E>(memory, a.D, size));
      } else if (h % heads == 0) {
        for (int64_t i = begin; i < end; i++)
          forward_query<T>(static_cast<T*>(o), static_cast<Acc<T>*>(lse), a, s, h,
                           least(h + heads, a.H), i, QueryScratch<T>(memory, a.D, heads));
      }
    });
    return kOk;
  });
}

LX_NAMESPACE_END
