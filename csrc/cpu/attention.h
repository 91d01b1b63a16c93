// What attention's forward and backward share: where sequences lie, and who sees whom.
#pragma once
#include <cmath>

#include "tiles.h"

LX_NAMESPACE_BEGIN

// A tile of scores has kBlock keys as rows and a strip of kStrip queries as columns.
constexpr int64_t kBlock = 64;
constexpr int64_t kSpan = 256;  // keys that are laid out at once

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return most(low, least(x, high)); }

// One sequence of a batch. Query i sees the keys [first_key(i), end_key(i)); key j is seen by the
// queries [first_query(j), end_query(j)); all four rise, and stay within the sequence.
struct Sequence {
  int64_t T, S;            // its queries and keys
  int64_t q_row, k_row;    // its first row in o and dq, in dk and dv
  int64_t q_at, k_at, v_at;  // element offset of its first token, head 0
  int64_t lse_at, lse_stride;  // lse of head h, query i is at lse_at + h * lse_stride + i
  int64_t window;
  bool causal;

  Sequence(const Attention& a, int64_t b) : window(a.window), causal(a.causal) {
    const bool packed = a.cu_q;
    T = packed ? a.cu_q[b + 1] - a.cu_q[b] : a.T;
    S = packed ? a.cu_k[b + 1] - a.cu_k[b] : a.S;
    q_row = packed ? a.cu_q[b] : b * a.T;
    k_row = packed ? a.cu_k[b] : b * a.S;
    q_at = packed ? q_row * a.q_stride[1] : b * a.q_stride[0];
    k_at = packed ? k_row * a.k_stride[1] : b * a.k_stride[0];
    v_at = packed ? k_row * a.v_stride[1] : b * a.v_stride[0];
    lse_at = packed ? q_row : b * a.H * a.T;
    lse_stride = a.T;
  }
  int64_t first_key(int64_t i) const { return window ? clamp(i + S - T - window + 1, 0, S) : 0; }
  int64_t end_key(int64_t i) const {
    return causal ? clamp(i + S - T + 1, 0, S) : window ? clamp(i + S - T + window, 0, S) : S;
  }
  int64_t first_query(int64_t j) const {
    return causal ? clamp(j - S + T, 0, T) : window ? clamp(j - S + T - window + 1, 0, T) : 0;
  }
  int64_t end_query(int64_t j) const { return window ? clamp(j - S + T + window, 0, T) : T; }
};

// The longest sequence's queries.
inline int64_t longest(const Attention& a) {
  if (!a.cu_q) return a.T;
  int64_t T = 0;
  for (int64_t b = 0; b < a.B; b++) T = most(T, a.cu_q[b + 1] - a.cu_q[b]);
  return T;
}

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

// Weights are base^(factor * score - top). With factors in bf16 the base is 2 and the difference is
// rounded once, which costs least; else the base is e, and the difference is exactly 0 at the top.
template <class E> constexpr bool kFused = std::is_same_v<E, bf16>;
template <class E> constexpr double kLnOfBase = kFused<E> ? 0.693147180559945309 : 1;

template <class E> inline Vec<Acc<E>> weight_of(Vec<Acc<E>> score, Acc<E> factor, Vec<Acc<E>> top) {
  Vec<Acc<E>> x = score * factor;
  if constexpr (kFused<E>) {
    return exp2_near(x - top);
  } else {
    asm("" : "+v"(x));  // no fused multiplication and subtraction
    return exp_negative(x - top);
  }
}

// What scores q k^T are multiplied by: a positive factor, after their sign has been turned where
// scale is negative.
template <class E> struct Scale {
  Acc<E> factor;
  bool negative;

  explicit Scale(double scale) : negative(scale < 0) {
    factor = static_cast<Acc<E>>((negative ? -scale : scale) / kLnOfBase<E>);
    // What hides a key is -inf, and must stay so.
    if (factor == 0) factor = std::numeric_limits<Acc<E>>::min();
  }
};

// scores (kBlock, kStrip) = +-keys (kBlock lines) * queries (transposed lines), K units each; -inf
// where a key is not seen. Row n is key j0 + n, column r is query i0 + r, one of `rows`.
template <class E, int64_t kStrip>
void scores_of(Acc<E>* scores, const Acc<E>* keys, const Acc<E>* queries, int64_t ld, int64_t K,
               bool negative, const Sequence& s, int64_t j0, int64_t i0, int64_t rows) {
  using A = Acc<E>;
  const A hidden = -std::numeric_limits<A>::infinity();
  const bool all_seen = rows == kStrip && j0 + kBlock <= s.S &&
                        s.first_query(j0 + kBlock - 1) <= i0 && s.end_query(j0) >= i0 + rows;
  for (int64_t n = 0; n < kBlock; n += kTileRows<E>) {
    const Seen seen = seen_by<E>(s, j0 + n, i0, rows);
    product<false, E>(scores + n * kStrip, kStrip, keys + n * ld, ld, queries, kStrip, seen.begin,
                      seen.end, K);
    if (negative)
      for (int64_t r = n * kStrip; r < (n + kTileRows<E>) * kStrip; r++) scores[r] = -scores[r];
    for (int64_t m = n; !all_seen && m < n + kTileRows<E>; m++) {
      const bool exists = j0 + m < s.S;
      const int64_t from = exists ? clamp(s.first_query(j0 + m) - i0, 0, kStrip) : kStrip;
      const int64_t end = exists ? least(s.end_query(j0 + m) - i0, rows) : kStrip;
      const int64_t to = clamp(end, from, kStrip);
      A* row = scores + m * kStrip;
      for (int64_t r = 0; r < from; r++) row[r] = hidden;
      for (int64_t r = to; r < kStrip; r++) row[r] = hidden;
    }
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

// c (D, kStrip) += keys (D lines of kBlock) * weights (kBlock units, kStrip), of the first n keys
// and the vectors [begin, end) of queries.
template <class E, int64_t kStrip>
void accumulate_over_keys(Acc<E>* c, const Acc<E>* keys, const Acc<E>* weights, int begin, int end,
                          int64_t n, int64_t D) {
  constexpr int64_t kUnits = kBlock / kUnit<E>;
  for (int64_t d = 0; d < D; d += kTileRows<E>)
    product<true, E>(c + d * kStrip, kStrip, keys + d * kUnits, kUnits, weights, kStrip, begin, end,
                     n / kUnit<E>);
}

LX_NAMESPACE_END
