// What attention's forward and backward share: where sequences lie, and who sees whom.
#pragma once
#include <cmath>

#include "tiles.h"

LX_NAMESPACE_BEGIN

constexpr int64_t kStrip = 64;  // queries worked on at once: the columns of a tile of scores
constexpr int64_t kBlock = 64;  // keys at once: its rows

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

// The vectors [begin, end) of a strip's queries that see some key of a group of rows.
struct Seen {
  int begin, end;
};
template <class A>
Seen seen_by(const Sequence& s, int64_t j, int64_t i0, int64_t rows) {
  if (j >= s.S) return {0, 0};
  const int64_t from = s.first_query(j) - i0, to = s.end_query(least(j + kTileRows, s.S) - 1) - i0;
  const int begin = clamp(from, 0, rows) / kLanes<A>;
  const int end = (clamp(to, 0, rows) + kLanes<A> - 1) / kLanes<A>;
  return {begin, end < begin ? begin : end};
}

// scores (kBlock, kStrip) = scale * keys (kBlock lines) * queries (transposed lines), K units each;
// -inf where a key is not seen. Row n is key j0 + n, column r is query i0 + r, one of `rows`.
template <class E>
void scores_of(Acc<E>* scores, const Acc<E>* keys, const Acc<E>* queries, int64_t ld, int64_t K,
               Acc<E> scale, const Sequence& s, int64_t j0, int64_t i0, int64_t rows) {
  using A = Acc<E>;
  const A hidden = -std::numeric_limits<A>::infinity();
  for (int64_t n = 0; n < kBlock; n += kTileRows) {
    const Seen seen = seen_by<A>(s, j0 + n, i0, rows);
    product<E>(scores + n * kStrip, kStrip, keys + n * ld, ld, queries, kStrip, seen.begin,
               seen.end, K, scale);
    for (int64_t m = n; m < n + kTileRows; m++) {
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

// c (D, kStrip) = c * decay + keys (D lines of kBlock) * weights (kBlock units, kStrip), decay one
// number a query, 1 when null. weights are zero where a key is not seen; columns of a tile that the
// diagonal crosses go in narrow groups, each only as far as its last query sees.
template <class E>
void accumulate_over_keys(Acc<E>* c, const Acc<E>* keys, const Acc<E>* weights,
                          const Acc<E>* decay, const Sequence& s, int64_t j0, int64_t i0,
                          int64_t rows, int64_t D) {
  using A = Acc<E>;
  constexpr int64_t kUnits = kBlock / kUnit<E>;
  const int vecs = (rows + kLanes<A> - 1) / kLanes<A>;
  const int group = s.end_key(i0) >= j0 + kBlock ? vecs : 2;
  for (int v = 0; v < vecs; v += group) {
    const int end = v + group < vecs ? v + group : vecs;
    const int64_t last = i0 + least(end * kLanes<A>, rows) - 1;
    const int64_t n = clamp(s.end_key(last) - j0, 0, kBlock);
    for (int64_t d = 0; d < D; d += kTileRows)
      accumulate<E>(c + d * kStrip, kStrip, keys + d * kUnits, kUnits, weights, kStrip, v, end,
                    (n + kUnit<E> - 1) / kUnit<E>, decay);
  }
}

LX_NAMESPACE_END
