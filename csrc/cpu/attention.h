// What attention's forward and backward share: where sequences lie, and who sees whom.
#pragma once
#include "tiles.h"

LX_NAMESPACE_BEGIN

constexpr int64_t kBlock = 64;  // keys of a tile of scores
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

// The longest of a batch's sequences, which begin and end at cu, if it is not null, else have n.
inline int64_t longest(const Attention& a, const int32_t* cu, int64_t n) {
  for (int64_t b = 0; cu && b < a.B; b++) n = most(b ? n : 0, cu[b + 1] - cu[b]);
  return n;
}
inline int64_t longest(const Attention& a) { return longest(a, a.cu_q, a.T); }
inline int64_t longest_keys(const Attention& a) { return longest(a, a.cu_k, a.S); }

// Weights are base^(factor * score - top). With factors in bf16 the base is 2 and the difference is
// rounded once, which costs least; else the base is e, and the difference is exactly 0 at the top.
template <class E> constexpr bool kFused = std::is_same_v<E, bf16>;
template <class E> constexpr double kLnOfBase = kFused<E> ? 0.693147180559945309 : 1;

template <class E> inline Vec<Acc<E>> weight_of(Vec<Acc<E>> score, Acc<E> factor, Vec<Acc<E>> top) {
  Vec<Acc<E>> x = score * factor;
  if constexpr (kFused<E>) {
    return exp2_near<E>(x - top);
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

LX_NAMESPACE_END
