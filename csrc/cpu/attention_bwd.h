// Attention backward, by recomputation from lse. Formulas in csrc/api.h.
//
// Transposed: tiles of scores are (keys, queries), and have the bits of the forward's. One pass
// over the tiles makes all three gradients with five products a tile. An item of work is one
// key/value head with the query heads that share it; it takes kSpan keys at a time, with their
// gradients at hand, over all strips of queries, whose gradients wait in fp32 between the spans. So
// every gradient has one writer and one order of sums.
#pragma once
#include "attention.h"

LX_NAMESPACE_BEGIN

constexpr int64_t kQueries = 64;  // of a strip

// Keys whose scores are made, and used but for dq, before the next ones': they stay in the nearest
// cache.
constexpr int64_t kKeys = 16;

// The vectors [begin, end) of a strip's queries that see some key of a group of rows, and what
// whole groups of units need beside.
struct Seen {
  int begin, end;
};
template <class E>
Seen seen_by(const Sequence& s, int64_t j, int64_t i0, int64_t rows) {
  if (j >= s.S) return {0, 0};
  constexpr int64_t kStep = most(kLanes<Acc<E>>, kTileUnits<E> * kUnit<E>);
  constexpr int kVecs = kStep / kLanes<Acc<E>>;
  const int64_t last = least(j + kTileRows<E>, s.S) - 1;
  const int begin = clamp(s.first_query(j) - i0, 0, rows) / kStep * kVecs;
  const int end = (clamp(s.end_query(last) - i0, 0, rows) + kStep - 1) / kStep * kVecs;
  return {begin, end < begin ? begin : end};
}

// scores (kKeys, kQueries) = +-keys (kKeys lines) * queries (transposed lines), K units each; -inf
// where a key is not seen. Row n is key j0 + n, column r is query i0 + r, one of `rows`.
template <class E>
void scores_of(Acc<E>* scores, const Acc<E>* keys, const Acc<E>* queries, int64_t ld, int64_t K,
               bool negative, const Sequence& s, int64_t j0, int64_t i0, int64_t rows) {
  using A = Acc<E>;
  const A hidden = -std::numeric_limits<A>::infinity();
  const bool all_seen = rows == kQueries && j0 + kKeys <= s.S &&
                        s.first_query(j0 + kKeys - 1) <= i0 && s.end_query(j0) >= i0 + rows;
  for (int64_t n = 0; n < kKeys; n += kTileRows<E>) {
    const Seen seen = seen_by<E>(s, j0 + n, i0, rows);
    product<false, E>(scores + n * kQueries, kQueries, keys + n * ld, ld, queries, kQueries,
                      seen.begin, seen.end, K);
  }
  for (int64_t r = 0; negative && r < kKeys * kQueries; r++) scores[r] = -scores[r];
  for (int64_t m = 0; !all_seen && m < kKeys; m++) {
    const bool exists = j0 + m < s.S;
    const int64_t from = exists ? clamp(s.first_query(j0 + m) - i0, 0, kQueries) : kQueries;
    const int64_t end = exists ? least(s.end_query(j0 + m) - i0, rows) : kQueries;
    const int64_t to = clamp(end, from, kQueries);
    A* row = scores + m * kQueries;
    for (int64_t r = 0; r < from; r++) row[r] = hidden;
    for (int64_t r = to; r < kQueries; r++) row[r] = hidden;
  }
}

template <class E> constexpr int64_t kKeyGroup = most(4, kTileUnits<E> * kUnit<E>);

// Calls f(begin, end, n) for groups [begin, end) of the vectors of a strip's queries: of the keys
// from j0 on, a group sees none beyond the first n, a multiple of kKeyGroup. A tile that the
// diagonal crosses goes in narrow groups.
template <class E, class F>
void for_each_query_group(const Sequence& s, int64_t j0, int64_t i0, int64_t rows, const F& f) {
  constexpr int64_t kLane = kLanes<Acc<E>>;
  const int vecs = (rows + kLane - 1) / kLane;
  const int group = s.end_key(i0) >= j0 + kBlock ? vecs : 2;
  for (int v = 0; v < vecs; v += group) {
    const int end = least(v + group, vecs);
    const int64_t last = i0 + least(end * kLane, rows) - 1;
    const int64_t n = clamp(s.end_key(last) - j0, 0, kBlock);
    f(v, end, round_up(n, kKeyGroup<E>));
  }
}

// c (D, kQueries) = or, where `add`, += keys (D lines of kBlock) * weights (kBlock units, kQueries)
// of the first n keys and the vectors [begin, end) of queries.
template <class E>
void accumulate_over_keys(bool add, Acc<E>* c, const Acc<E>* keys, const Acc<E>* weights,
                          int begin, int end, int64_t n, int64_t D) {
  constexpr int64_t kUnits = kBlock / kUnit<E>;
  for (int64_t d = 0; d < D; d += kTileRows<E>)
    product<E>(add, c + d * kQueries, kQueries, keys + d * kUnits, kUnits, weights, kQueries, begin,
               end, n / kUnit<E>);
}

template <class E> struct BackwardScratch {
  using A = Acc<E>;
  int64_t lines_ld, width;                // units of a line of D; D in whole vectors
  A *keys, *values, *key_pairs, *keys_t;  // per block: lines, lines, pairs, transposed pairs
  A *dk, *dv;                             // per block (kBlock, width)
  A *queries, *douts;                     // (D units, kQueries) transposed lines
  A *query_pairs, *dout_pairs;            // (kQueries units, width)
  A *lse, *delta;                         // (kQueries)
  A *scores, *dweights;                   // (kKeys, kQueries)
  A *weight_lines, *ds_lines;             // (kKeys, kQueries units)
  A *ds_pairs;                            // (kBlock units, kQueries)
  A *rows;                                // (kQueries, width)
  A *dq;                                  // per head and strip (width, kQueries)
  int64_t bytes;

  BackwardScratch(char* memory, int64_t D, int64_t heads, int64_t strips) {
    Cutter cut(memory);
    constexpr int64_t kBlocks = kSpan / kBlock, kTile = kKeys * kQueries;
    lines_ld = round_up((D + kUnit<E> - 1) / kUnit<E>, kPad<E>);
    width = round_up(D, kPad<E>);
    keys = cut.template array<A>(kBlocks * kBlock * lines_ld);
    values = cut.template array<A>(kBlocks * kBlock * lines_ld);
    key_pairs = cut.template array<A>(kBlock / kUnit<E> * width);
    keys_t = cut.template array<A>(kBlocks * kBlock / kUnit<E> * width);
    dk = cut.template array<A>(kBlocks * kBlock * width);
    dv = cut.template array<A>(kBlocks * kBlock * width);
    queries = cut.template array<A>(lines_ld * kQueries);
    douts = cut.template array<A>(lines_ld * kQueries);
    query_pairs = cut.template array<A>(kQueries / kUnit<E> * width);
    dout_pairs = cut.template array<A>(kQueries / kUnit<E> * width);
    lse = cut.template array<A>(kQueries);
    delta = cut.template array<A>(kQueries);
    scores = cut.template array<A>(kTile);
    dweights = cut.template array<A>(kTile);
    weight_lines = kUnit<E> == 1 ? scores : cut.template array<A>(kTile / kUnit<E>);
    ds_pairs = cut.template array<A>(kBlock / kUnit<E> * kQueries);
    ds_lines = kUnit<E> == 1 ? nullptr : cut.template array<A>(kTile / kUnit<E>);
    rows = cut.template array<A>(kQueries * width);
    dq = cut.template array<A>(heads * strips * width * kQueries);
    bytes = cut.used();
  }
};

// weights = base^(factor * scores - lse) and ds = weights * (dweights - delta), as operands; lse in
// powers of the base. Both are 0 where the score is -inf, as it is where a key is not seen, even if
// lse, dweights or delta are NaN.
template <class E>
void weights_and_ds(const BackwardScratch<E>& w, Acc<E>* ds_lines, Acc<E>* ds_pairs,
                    Acc<E> factor) {
  using A = Acc<E>;
  constexpr int kU = kUnit<E>;
  constexpr int64_t kLane = kLanes<A>, kLine = kQueries / kU;
  const Vec<A> hidden = splat(-std::numeric_limits<A>::infinity()), zero{};
  for (int64_t n = 0; n < kKeys; n += kU)
    for (int64_t r = 0; r < kQueries; r += kU * kLane) {
      Vec<A> p[kU][kU], ds[kU][kU];  // kU keys, kU vectors of queries
      for (int i = 0; i < kU; i++)
        for (int v = 0; v < kU; v++) {
          const int64_t column = r + v * kLane, at = (n + i) * kQueries + column;
          const Vec<A> score = load(w.scores + at);
          const Vec<A> weight = weight_of<E>(score, factor, load(w.lse + column));
          const Vec<A> dscore = weight * (load(w.dweights + at) - load(w.delta + column));
          p[i][v] = score == hidden ? zero : weight;
          ds[i][v] = score == hidden ? zero : dscore;
        }
      for (int i = 0; i < kU; i++) {
        store(w.weight_lines + (n + i) * kLine + r / kU, line<E>(p[i][0], p[i][kU - 1]));
        store(ds_lines + (n + i) * kLine + r / kU, line<E>(ds[i][0], ds[i][kU - 1]));
      }
      if constexpr (kU > 1)
        for (int v = 0; v < kU; v++)
          store(ds_pairs + n / kU * kQueries + r + v * kLane, unit<E>(ds[0][v], ds[1][v]));
    }
}

// The tile of block `block` (of the span; keys from j0 on) and the strip of queries from i0 on.
// begun: whether dk and dv of the block have sums already.
template <class E>
void backward_tile(const BackwardScratch<E>& w, int block, bool begun, Acc<E>* dq,
                   const Sequence& s, int64_t j0, int64_t i0, int64_t rows, int64_t D,
                   Scale<E> scale) {
  using A = Acc<E>;
  constexpr int kU = kUnit<E>;
  const int64_t units = (D + kU - 1) / kU;
  const int vecs = w.width / kLanes<A>;
  for (int64_t m = 0; m < kBlock; m += kKeys) {
    const int64_t row = block * kBlock + m;
    A* ds_pairs = w.ds_pairs + m / kU * kQueries;
    A* ds_lines = kU == 1 ? ds_pairs : w.ds_lines;
    scores_of<E>(w.scores, w.keys + row * w.lines_ld, w.queries, w.lines_ld, units, scale.negative,
                 s, j0 + m, i0, rows);
    for (int64_t n = 0; n < kKeys; n += kTileRows<E>) {
      const Seen seen = seen_by<E>(s, j0 + m + n, i0, rows);
      product<false, E>(w.dweights + n * kQueries, kQueries, w.values + (row + n) * w.lines_ld,
                        w.lines_ld, w.douts, kQueries, seen.begin, seen.end, units);
    }
    weights_and_ds(w, ds_lines, ds_pairs, scale.factor);
    for (int64_t n = 0; n < kKeys; n += kTileRows<E>) {
      const Seen seen = seen_by<E>(s, j0 + m + n, i0, rows);
      const int64_t first = seen.begin * kLanes<A> / kU;  // queries, in units
      const int64_t count = (seen.end - seen.begin) * kLanes<A> / kU;
      const int64_t at = (row + n) * w.width, line = n * (kQueries / kU) + first;
      product<E>(begun, w.dv + at, w.width, w.weight_lines + line, kQueries / kU,
                 w.dout_pairs + first * w.width, w.width, 0, vecs, count);
      product<E>(begun, w.dk + at, w.width, ds_lines + line, kQueries / kU,
                 w.query_pairs + first * w.width, w.width, 0, vecs, count);
    }
  }
  for_each_query_group<E>(s, j0, i0, rows, [&](int begin, int end, int64_t n) {
    accumulate_over_keys<E>(s.first_key(i0) < j0, dq,
                            w.keys_t + block * (kBlock / kU) * w.width, w.ds_pairs, begin, end, n,
                            D);
  });
}

// Lays out the n keys and values from j0 on as block `block`.
template <class T, class E>
void lay_out_keys(const BackwardScratch<E>& w, int block, const T* k, int64_t k_stride, const T* v,
                  int64_t v_stride, int64_t n, int64_t D) {
  constexpr int64_t kUnits = kBlock / kUnit<E>;
  lines<E>(w.keys + block * kBlock * w.lines_ld, w.lines_ld, kBlock, k, k_stride, n, D);
  lines<E>(w.values + block * kBlock * w.lines_ld, w.lines_ld, kBlock, v, v_stride, n, D);
  pairs<E>(w.key_pairs, w.width, kBlock, k, k_stride, n, D);
  transpose(w.keys_t + block * kUnits * w.width, kUnits, w.key_pairs, w.width, kUnits, w.width);
}

// Lays out the strip's queries or output gradients: transposed lines and pairs.
template <class T, class E>
void lay_out_queries(const BackwardScratch<E>& w, Acc<E>* lines_t, Acc<E>* pair_rows, const T* x,
                     int64_t stride, int64_t n, int64_t D) {
  transposed_lines<E>(lines_t, kQueries, kQueries, D, [&](int64_t i) {
    return i < n ? x + i * stride : nullptr;
  });
  pairs<E>(pair_rows, w.width, kQueries, x, stride, n, D);
}

struct BackwardTensors {
  void *dq, *dk, *dv;
  const void *delta, *dout;
  const int64_t* dout_stride;
  const void* lse;
};

template <class T, class E>
void backward_head(const BackwardTensors& g, const Attention& a, const Sequence& s, int64_t kv,
                   const BackwardScratch<E>& w) {
  using A = Acc<E>;
  const int64_t D = a.D, heads = a.H / a.Hkv, strips = (s.T + kQueries - 1) / kQueries;
  const int64_t q_stride = a.q_stride[1], dout_stride = g.dout_stride[1];
  const T* k = static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2];
  const T* v = static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2];
  const int64_t dout_at = a.cu_q ? s.q_row * dout_stride : s.q_row / a.T * g.dout_stride[0];
  const A* lse = static_cast<const A*>(g.lse) + s.lse_at;
  const A* delta = static_cast<const A*>(g.delta) + s.lse_at;
  const auto dq = [&](int64_t h, int64_t i0) {  // of a strip
    return w.dq + (h * strips + i0 / kQueries) * w.width * kQueries;
  };
  const auto sees_none = [&](int64_t i0) {
    return s.end_key(least(i0 + kQueries, s.T) - 1) <= s.first_key(i0);
  };
  for (int64_t span = 0; span < s.S; span += kSpan) {
    const int64_t span_end = least(span + kSpan, s.S);
    const int blocks = (span_end - span + kBlock - 1) / kBlock;
    for (int block = 0; block < blocks; block++) {
      const int64_t j0 = span + block * kBlock;
      lay_out_keys<T, E>(w, block, k + j0 * a.k_stride[1], a.k_stride[1],
                         v + j0 * a.v_stride[1], a.v_stride[1], least(kBlock, s.S - j0), D);
    }
    bool begun[kSpan / kBlock] = {};
    for (int64_t h = 0; h < heads; h++) {
      const int64_t head = kv * heads + h;
      const T* q = static_cast<const T*>(a.q) + s.q_at + head * a.q_stride[2];
      const T* dout = static_cast<const T*>(g.dout) + dout_at + head * g.dout_stride[2];
      const int64_t last = s.end_query(span_end - 1);
      for (int64_t i0 = s.first_query(span) / kQueries * kQueries; i0 < last; i0 += kQueries) {
        const int64_t rows = least(kQueries, s.T - i0);
        lay_out_queries<T, E>(w, w.queries, w.query_pairs, q + i0 * q_stride, q_stride, rows, D);
        lay_out_queries<T, E>(w, w.douts, w.dout_pairs, dout + i0 * dout_stride, dout_stride, rows,
                              D);
        for (int64_t r = 0; r < kQueries; r++) {
          const A row_lse = r < rows ? lse[head * s.lse_stride + i0 + r] : 0;
          const bool sees = row_lse != -std::numeric_limits<A>::infinity();
          // Of a query that sees nothing the scores are -inf.
          w.lse[r] = sees ? static_cast<A>(row_lse / kLnOfBase<E>) : 0;
          w.delta[r] = r < rows ? delta[head * s.lse_stride + i0 + r] : 0;
        }
        for (int block = 0; block < blocks; block++) {
          const int64_t j0 = span + block * kBlock;
          if (sees_none(i0) || s.first_key(i0) >= j0 + kBlock || s.end_key(i0 + rows - 1) <= j0)
            continue;
          backward_tile<E>(w, block, begun[block], dq(h, i0), s, j0, i0, rows, D,
                           Scale<E>(a.scale));
          begun[block] = true;
        }
      }
    }
    for (int block = 0; block < blocks; block++)
      for (A* sums : {w.dk, w.dv})
        if (!begun[block])
          memset(sums + block * kBlock * w.width, 0, kBlock * w.width * sizeof(A));
    const A scale = static_cast<A>(a.scale);
    for (int64_t j = span; j < span_end; j++) {
      const int64_t at = ((s.k_row + j) * a.Hkv + kv) * D, from = (j - span) * w.width;
      if (const int64_t ahead = at + kAhead * a.Hkv * D; j + kAhead < span_end) {
        prefetch<true>(static_cast<T*>(g.dk) + ahead, D);
        prefetch<true>(static_cast<T*>(g.dv) + ahead, D);
      }
      for_each_vec<A>(D, [&](int64_t d, auto n) {
        store(static_cast<T*>(g.dk) + at + d, load(w.dk + from + d, n) * scale, n);
        store(static_cast<T*>(g.dv) + at + d, load(w.dv + from + d, n), n);
      });
    }
  }
  for (int64_t h = 0; h < heads; h++)
    for (int64_t i0 = 0; i0 < s.T; i0 += kQueries) {
      const int64_t rows = least(kQueries, s.T - i0);
      if (sees_none(i0)) memset(dq(h, i0), 0, w.width * kQueries * sizeof(A));
      transpose(w.rows, w.width, dq(h, i0), kQueries, w.width, kQueries);
      for (int64_t r = 0; r < rows; r++) {
        T* row = static_cast<T*>(g.dq) + ((s.q_row + i0 + r) * a.H + kv * heads + h) * D;
        if (r + kAhead < rows) prefetch<true>(row + kAhead * a.H * D, D);
        for_each_vec<A>(D, [&](int64_t d, auto n) {
          store(row + d, load(w.rows + r * w.width + d, n) * static_cast<A>(a.scale), n);
        });
      }
    }
}

// delta = sum(dout * o) - dlse of every query.
template <class T>
void attention_delta(Acc<T>* delta, const T* dout, const int64_t* stride, const T* o,
                     const Acc<T>* dlse, const Attention& a, Stream stream) {
  const int64_t tokens = a.cu_q ? a.T : a.B * a.T;
  parallel_for(stream, tokens, grain_rows(a.H * a.D), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      const int64_t b = a.cu_q ? 0 : token / a.T, t = token - b * a.T;
      for (int64_t h = 0; h < a.H; h++) {
        const T* grad = dout + (a.cu_q ? 0 : b * stride[0]) + t * stride[1] + h * stride[2];
        const T* out = o + (token * a.H + h) * a.D;
        Vec<Acc<T>> dot{};
        for_each_vec<Acc<T>>(a.D, [&](int64_t d, auto n) {
          dot += load(grad + d, n) * load(out + d, n);
        });
        const int64_t at = (b * a.H + h) * a.T + t;
        delta[at] = sum(dot) - (dlse ? dlse[at] : 0);
      }
    }
  });
}

Status attention_bwd(void* dq, void* dk, void* dv, void* delta, const void* dout,
                     const int64_t dout_stride[3], const void* o, const void* lse,
                     const void* dlse, const Attention* attention, Stream stream) {
  const Attention& a = *attention;
  return dispatch(a.dtype, [&](auto t) {
    using T = decltype(t);
    using E = Factor<T>;
    using A = Acc<T>;
    const int64_t strips = (longest(a) + kQueries - 1) / kQueries;
    const int64_t bytes = BackwardScratch<E>(nullptr, a.D, a.H / a.Hkv, strips).bytes;
    const Scratch scratch(bytes * num_threads(stream));
    if (!scratch.begin()) return kOutOfMemory;
    attention_delta(static_cast<A*>(delta), static_cast<const T*>(dout), dout_stride,
                    static_cast<const T*>(o), static_cast<const A*>(dlse), a, stream);
    const BackwardTensors g = {dq, dk, dv, delta, dout, dout_stride, lse};
    parallel_items(stream, a.B * a.Hkv, [&](int64_t item, int64_t thread) {
      [[maybe_unused]] const TileState<E> tiles;
      const BackwardScratch<E> w(scratch.begin() + thread * bytes, a.D, a.H / a.Hkv, strips);
      backward_head<T, E>(g, a, Sequence(a, item / a.Hkv), item % a.Hkv, w);
    });
    return kOk;
  });
}

LX_NAMESPACE_END
