// Attention forward: softmax(scale * q k^T) v by online softmax. Formulas in csrc/api.h.
//
// Queries are rows: scores (queries, keys), out (queries, D). An item of work is a chunk of queries
// of one head. It takes kSpan keys at a time, laid out once for all its strips; each strip takes
// them in block by block, while its sums are at hand, as many queries at once as a tile has rows:
// their scores, their weights, their sums, of the keys that some of them see.
#pragma once
#include "attention.h"

LX_NAMESPACE_BEGIN

constexpr int64_t kStrip = 64;  // queries
constexpr int64_t kMostChunk = 1024, kLeastChunk = 256;
constexpr int64_t kFewQueries = 2;  // up to so many are worked on one by one

template <class E> struct ForwardScratch {
  using A = Acc<E>;
  int64_t units, width;  // of a row of D: units, numbers
  A *keys, *values;      // per block of the span: (units, kBlock), (kBlock units, width)
  A *scores;             // (kTileRows, kBlock); weights, in units, at the beginning of each row
  A *queries, *out;      // per query of the chunk: (units), (width)
  A *sum, *top;          // per query: (kLanes), to be added up; one number
  int64_t bytes;

  ForwardScratch(char* memory, int64_t D, int64_t chunk) {
    Cutter cut(memory);
    units = round_up(D, kFactors<E>) / kUnit<E>;
    width = round_up(D, kPad<E>);
    keys = cut.template array<A>(kSpan * units);
    values = cut.template array<A>(kSpan / kUnit<E> * width);
    scores = cut.template array<A>(kTileRows<E> * kBlock);
    queries = cut.template array<A>(chunk * units);
    out = cut.template array<A>(chunk * width);
    sum = cut.template array<A>(chunk * kLanes<A>);
    top = cut.template array<A>(chunk);
    bytes = cut.used();
  }
};

// Of a query that has seen no key yet.
template <class A> constexpr A kNoTop = std::numeric_limits<A>::lowest();

// How far above top a score may lie, in powers of the base, before it becomes the top and the sums
// so far are scaled down: few blocks after the first have one.
constexpr int kRise = 8;

// The weights, in units, of the scores (4, kBlock) that four queries have for n keys, a multiple of
// kFactors; adds them to sum (4, kLanes). The sums so far are sum and out (4, width).
template <class E, class N>
inline void softmax_step(Acc<E>* weights, const Acc<E>* scores, N n, Acc<E>* top, Acc<E>* sum,
                         Acc<E>* out, int64_t width, Acc<E> factor) {
  using A = Acc<E>;
  constexpr int kU = kUnit<E>;
  constexpr int64_t kLane = kLanes<A>;
  Vec<A> largest[4], rise{};
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) {
    largest[r] = load(scores + r * kBlock);
    for (int64_t j = kLane; j < n; j += kLane)
      largest[r] = kLarger(largest[r], load(scores + r * kBlock + j));
    rise = kLarger(largest[r] * factor - top[r], rise);  // NaN counts for nothing
  }
  if (any(rise > kRise)) {
    A tops[4];
    reduce_each(tops, largest, kLarger);
    for (int r = 0; r < 4; r++) {
      const A before = top[r];
      if (!(tops[r] * factor - before > kRise)) continue;
      top[r] = tops[r] * factor;
      if (before == kNoTop<A>) continue;
      const Vec<A> decay = weight_of<E>(splat(before), 1, splat(top[r]));
      store(sum + r * kLane, load(sum + r * kLane) * decay);
      for (A* at = out + r * width; at < out + (r + 1) * width; at += kLane)
        store(at, load(at) * decay);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) {
    const Vec<A> shift = splat(top[r]);
    Vec<A> total = load(sum + r * kLane);
    for (int64_t j = 0; j < n; j += kU * kLane) {
      Vec<A> part[kU];
      for (int u = 0; u < kU; u++) {
        part[u] = weight_of<E>(load(scores + r * kBlock + j + u * kLane), factor, shift);
        total += part[u];
      }
      store(weights + r * kBlock + j / kU, line<E>(part[0], part[kU - 1]));
    }
    store(sum + r * kLane, total);
  }
}

// What the sums over the keys are divided by, as its inverse, and lse, for kLanes queries whose
// weights, exp(score - top), add up to sum. A query that sees only scores of -inf gives NaN, as
// softmax does; a score of inf gives an lse of inf.
template <class A> inline void end_sums(Vec<A>& inverse, Vec<A>& lse, Vec<A> sum, Vec<A> top) {
  const Vec<A> inf = splat(std::numeric_limits<A>::infinity());
  const Vec<A> none = splat(std::numeric_limits<A>::quiet_NaN());
  inverse = sum == 0 ? none : 1 / sum;
  lse = sum == 0 ? -inf : (top == inf ? inf : top + log(sum));
}

// Scores (n) of the keys of [0, n) outside [from, to) become -inf.
template <class A> void hide(A* scores, int64_t n, int64_t from, int64_t to) {
  using Index = std::conditional_t<sizeof(A) == 4, Int32, Int64>;
  Index key;
  for (int i = 0; i < kLanes<A>; i++) key[i] = i;
  const Vec<A> hidden = splat(-std::numeric_limits<A>::infinity());
  for (int64_t j = 0; j < n; j += kLanes<A>, key += kLanes<A>) {
    const auto seen = (key >= Lane<Index>(from)) & (key < Lane<Index>(to));
    store(scores + j, seen ? load(scores + j) : hidden);
  }
}

// Forgets the sums of kTileRows queries, the chunk's from `at` on; the first product sets out.
template <class E> void begin_tile(const ForwardScratch<E>& w, int64_t at) {
  using A = Acc<E>;
  memset(w.sum + at * kLanes<A>, 0, kTileRows<E> * kLanes<A> * sizeof(A));
  for (int64_t r = at; r < at + kTileRows<E>; r++) w.top[r] = kNoTop<A>;
}

// kTileRows queries from i0 on, of which n are there, the chunk's from `at` on, take in block
// `block` of the span, the keys from j0 on.
template <class E>
void forward_tile(const ForwardScratch<E>& w, int64_t at, int block, const Sequence& s, int64_t i0,
                  int64_t n, int64_t j0, int64_t D, Scale<E> scale) {
  using A = Acc<E>;
  constexpr int kU = kUnit<E>;
  constexpr int64_t kLane = kLanes<A>;
  // The keys that some of the queries see, and whole factors of them.
  const int64_t begin = clamp(s.first_key(i0) - j0, 0, kBlock) / kFactors<E> * kFactors<E>;
  const int64_t end = clamp(s.end_key(i0 + n - 1) - j0, 0, kBlock);
  if (begin >= end) return;
  const bool first = s.first_key(i0) >= j0;
  if (first) begin_tile(w, at);
  const int64_t keys = round_up(end - begin, kFactors<E>);
  product<false, E>(w.scores, kBlock, w.queries + at * w.units, w.units,
                    w.keys + block * kBlock * w.units, kBlock, begin / kLane,
                    (end + kLane - 1) / kLane, (D + kU - 1) / kU);
  A *scores = w.scores + begin, *weights = w.scores + begin / kU;
  for (int64_t r = 0; scale.negative && r < kTileRows<E>; r++)
    for (int64_t j = 0; j < keys; j++) scores[r * kBlock + j] = -scores[r * kBlock + j];
  if (s.first_key(i0 + n - 1) > j0 + begin || s.end_key(i0) < j0 + begin + keys)
    for (int64_t r = 0; r < kTileRows<E>; r++)
      hide(scores + r * kBlock, keys, clamp(s.first_key(i0 + r) - j0 - begin, 0, keys),
           clamp(s.end_key(i0 + r) - j0 - begin, 0, keys));
  for (int64_t r = 0; r < kTileRows<E>; r += 4) {
    const auto step = [&](auto keys) {
      softmax_step<E>(weights + r * kBlock, scores + r * kBlock, keys, w.top + at + r,
                      w.sum + (at + r) * kLane, w.out + (at + r) * w.width, w.width,
                      scale.factor);
    };
    if (keys == kBlock) step(std::integral_constant<int64_t, kBlock>{});
    else step(keys);
  }
  const auto add_values = [&](auto to_sums) {
    product<to_sums, E>(w.out + at * w.width, w.width, weights, kBlock,
                        w.values + (block * kBlock + begin) / kU * w.width, w.width, 0,
                        w.width / kLane, (end - begin + kU - 1) / kU);
  };
  first ? add_values(std::false_type{}) : add_values(std::true_type{});
}

// Writes the rows of the n queries from i0 on, the chunk's from `at` on, and their lse.
template <class T, class E>
void finish_tile(T* o, Acc<T>* lse, const Attention& a, const Sequence& s, int64_t h, int64_t i0,
                 int64_t n, const ForwardScratch<E>& w, int64_t at) {
  using A = Acc<E>;
  constexpr int64_t kLane = kLanes<A>, kRows = most(kTileRows<E>, kLane);
  A total[kRows] = {}, top[kRows] = {}, inverse[kRows], ends[kRows];
  for (int r = 0; r < kTileRows<E>; r += 4) {
    Vec<A> sums[4];
    for (int m = 0; m < 4; m++) sums[m] = load(w.sum + (at + r + m) * kLane);
    sum_each(total + r, sums);
    for (int m = r; m < r + 4; m++) top[m] = w.top[at + m] * A(kLnOfBase<E>);
  }
  for (int r = 0; r < kTileRows<E>; r += kLane) {
    Vec<A> inverses, lses;
    end_sums<A>(inverses, lses, load(total + r), load(top + r));
    store(inverse + r, inverses);
    store(ends + r, lses);
  }
  for (int64_t r = 0; r < n; r++) {
    const int64_t i = i0 + r;
    const A by = s.end_key(i) > s.first_key(i) ? inverse[r] : 0;
    const A* out = w.out + (at + r) * w.width;
    T* row = o + ((s.q_row + i) * a.H + h) * a.D;
    for_each_vec<A>(a.D, [&](int64_t d, auto n) { store(row + d, load(out + d, n) * by, n); });
  }
  memcpy(lse + s.lse_at + h * s.lse_stride + i0, ends, n * sizeof(A));
}

template <class T, class E>
void forward_chunk(T* o, Acc<T>* lse, const Attention& a, const Sequence& s, int64_t h,
                   int64_t begin, int64_t end, const ForwardScratch<E>& w) {
  using A = Acc<E>;
  const int64_t D = a.D, queries = end - begin;
  const int64_t kv = h / (a.H / a.Hkv);
  const T* q = static_cast<const T*>(a.q) + s.q_at + h * a.q_stride[2];
  const T* k = static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2];
  const T* v = static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2];
  // Queries that see no key.
  for (int64_t i = begin; i < end; i += kTileRows<E>) {
    const int64_t n = least(kTileRows<E>, end - i), at = i - begin;
    if (s.end_key(i + n - 1) > s.first_key(i)) continue;
    begin_tile(w, at);
    memset(w.out + at * w.width, 0, kTileRows<E> * w.width * sizeof(A));
    finish_tile(o, lse, a, s, h, i, n, w, at);
  }
  const int64_t padded = round_up(queries, kTileRows<E>);
  lines<E>(w.queries, w.units, padded, q + begin * a.q_stride[1], a.q_stride[1], queries, D);
  const int64_t keys_end = s.end_key(end - 1);
  for (int64_t span = s.first_key(begin) / kBlock * kBlock; span < keys_end; span += kSpan) {
    int ready = 0;  // blocks laid out, as soon as a strip sees them
    for (int64_t strip = begin; strip < end; strip += kStrip) {
      const int64_t strip_end = least(strip + kStrip, end);
      const int64_t seen = least(s.end_key(strip_end - 1), span + kSpan);
      for (; span + ready * kBlock < seen; ready++) {
        const int64_t j0 = span + ready * kBlock, left = s.S - j0;
        transposed_lines<E>(w.keys + ready * kBlock * w.units, kBlock, kBlock, D, [&](int64_t j) {
          return j < left ? k + (j0 + j) * a.k_stride[1] : nullptr;
        });
        pairs<E>(w.values + ready * (kBlock / kUnit<E>) * w.width, w.width, kBlock,
                 v + j0 * a.v_stride[1], a.v_stride[1], least(kBlock, left), D);
      }
      for (int64_t j0 = span; j0 < seen; j0 += kBlock)
        for (int64_t i = strip; i < strip_end; i += kTileRows<E>) {
          const int64_t n = least(kTileRows<E>, strip_end - i), last = s.end_key(i + n - 1);
          forward_tile<E>(w, i - begin, (j0 - span) / kBlock, s, i, n, j0, D, Scale<E>(a.scale));
          if (last > j0 && last <= j0 + kBlock && last > s.first_key(i))
            finish_tile(o, lse, a, s, h, i, n, w, i - begin);
        }
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

// Queries for which a span of keys is laid out once: many, but enough chunks to share out.
inline int64_t chunk_of(const Attention& a, int64_t threads) {
  int64_t chunk = kMostChunk;
  while (chunk > kLeastChunk && sequences(a) * a.H * (longest(a) / chunk) < 4 * threads)
    chunk /= 2;
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
