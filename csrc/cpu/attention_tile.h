// A tile of attention's forward: some queries take in a block of keys by online softmax.
#pragma once
#include "attention.h"

LX_NAMESPACE_BEGIN

template <class E> struct ForwardScratch {
  using A = Acc<E>;
  int64_t units, width;  // of a row of D: units, numbers
  int64_t span;          // keys that are laid out at once
  A *keys, *values;      // per block of the span: (units, kBlock), (kBlock units, width)
  A *scores;             // (kTileRows, kBlock); weights, in units, at the beginning of each row
  A *queries, *out;      // per query of the chunk: (units), (width)
  A *sum, *top;          // per query: (kLanes), to be added up; one number
  int64_t bytes;

  ForwardScratch(char* memory, int64_t D, int64_t chunk, int64_t most_keys)
      : span(most_keys) {
    Cutter cut(memory);
    units = round_up(D, kFactors<E>) / kUnit<E>;
    width = round_up(D, kPad<E>);
    keys = cut.template array<A>(span * units);
    values = cut.template array<A>(span / kUnit<E> * width);
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
// weights, exp(score - top), add up to sum. A query that sees only scores of -inf has sums of 0 and
// gets NaN, as softmax gives; a score of inf gives an lse of inf.
template <class A> inline void end_sums(Vec<A>& inverse, Vec<A>& lse, Vec<A> sum, Vec<A> top) {
  const Vec<A> inf = splat(std::numeric_limits<A>::infinity());
  inverse = 1 / sum;
  lse = sum == 0 ? -inf : (top == inf ? inf : top + log(sum));
}

// Scores (n) of the keys of [0, n) outside [from, to) become -inf.
template <class A> void hide(A* scores, int64_t n, int64_t from, int64_t to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const uint64_t seen = (to < 64 ? uint64_t{1} << to : 0) - (from < 64 ? uint64_t{1} << from : 0);
    const __m512 hidden = _mm512_set1_ps(-__builtin_inff());
    for (int64_t j = 0; j < n; j += 16)
      _mm512_storeu_ps(scores + j, _mm512_mask_loadu_ps(hidden, seen >> j, scores + j));
    return;
  }
#endif
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
  product<E>(!first, w.out + at * w.width, w.width, weights, kBlock,
             w.values + (block * kBlock + begin) / kU * w.width, w.width, 0, w.width / kLane,
             (end - begin + kU - 1) / kU);
}

LX_NAMESPACE_END
